"""Options that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path

from pg_freeze import DRAIN_TIMEOUT, LEASE, Admit, FreezeRequest, OnDrainTimeout
from pg_freeze.cli.words import duration, person, process_age, spoken
from pg_freeze.request import OPTIONS
from pg_freeze.strategies import OURS


def add_databases(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--database``, as often as there are databases."""
    parser.add_argument(
        "--database",
        "-d",
        action="append",
        required=required,
        metavar="NAME",
        help="a database; give it several times for several, which are then one freeze"
        if required
        else "only this database; may be given several times (default: all)",
    )


def add_holder(parser: argparse.ArgumentParser) -> None:
    """Add ``--holder``."""
    me = person()
    parser.add_argument(
        "--holder", default=me, metavar="NAME", help=f"who owns the freeze (default: {me.replace('%', '%%')})"
    )


def add_attestation(parser: argparse.ArgumentParser) -> None:
    """Add ``--attestation``, where the closed attestation is written to."""
    parser.add_argument(
        "--attestation",
        type=Path,
        metavar="FILE",
        help="write the closed attestation there, for verify-copy: in the copy itself it is never closed yet",
    )


def add_kind(parser: argparse.ArgumentParser, *, checkpoint: bool = False) -> None:
    """Add what kind of freeze it is to be: ``--admit``, ``--checkpoint``, ``--switch-wal``.

    :param checkpoint: whether the final checkpoint is the default; then there is ``--no-checkpoint``.
    """
    parser.add_argument(
        "--admit",
        choices=[one.value for one in Admit],
        default=Admit.READERS_ONCE_DRAINED.value,
        help="who may connect meanwhile: readers once it is drained (default), readers always, or nobody",
    )
    if checkpoint:
        parser.add_argument(
            "--no-checkpoint", dest="checkpoint", action="store_false", help="leave out the final checkpoint"
        )
    else:
        parser.add_argument("--checkpoint", action="store_true", help="make the final checkpoint as well")
    parser.add_argument("--switch-wal", action="store_true", help="and switch to a new WAL file; implies --checkpoint")


def add_strategy(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--strategy``, and what only some strategies know."""
    said = "; ".join(f"{name}: {what}" + " (default)" * (name == default) for name, what in OURS.items())
    parser.add_argument(
        "--strategy", default=default, metavar="NAME", help=f"{said}; or one that another distribution adds"
    )
    parser.add_argument(
        "--role",
        dest="roles",
        action="append",
        default=[],
        metavar="NAME",
        help="with --strategy privileges: revoke only what this role may write, or public for what was granted to "
        "everybody; may be repeated (default: all roles)",
    )


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add how long a freeze may take and last, and how strict it is."""
    parser.add_argument(
        "--lease",
        type=duration,
        default=LEASE,
        metavar="TIME",
        help=f"after this time the server thaws by itself (default: {spoken(LEASE)})",
    )
    parser.add_argument(
        "--drain-timeout",
        type=duration,
        default=DRAIN_TIMEOUT,
        metavar="TIME",
        help=f"how long transactions that are open already may go on (default: {spoken(DRAIN_TIMEOUT)})",
    )
    parser.add_argument(
        "--on-drain-timeout",
        choices=[one.value for one in OnDrainTimeout],
        default=OnDrainTimeout.TERMINATE.value,
        help="then: terminate what is left (default), or abort: undo everything and exit with 4",
    )
    parser.add_argument("--strict", action="store_true", help="refuse what preflight only warns of")
    parser.add_argument(
        "--no-dead-man",
        dest="dead_man",
        action="store_false",
        help="leave no session behind in the server to enforce the lease; then only `pg-freeze guard` does",
    )


def request(args: argparse.Namespace) -> FreezeRequest:
    """Return the freeze that these options ask for.

    :raises InvalidRequest: if they make no sense.
    """
    given = {name: value for name, value in vars(args).items() if name in OPTIONS}
    return FreezeRequest.of(args.database, args.holder, age=process_age(), **given)
