"""The verb that thaws: resume."""

from __future__ import annotations

import argparse

from rich.console import RenderableType
from rich.text import Text

import pg_freeze as core
from pg_freeze.cli import errors, show
from pg_freeze.cli.options import add_databases, add_holder
from pg_freeze.cli.verb import Call, Outcome, Verb
from pg_freeze.cli.words import duration, spoken
from pg_freeze.names import visible


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_databases(parser)
    add_holder(parser)
    parser.add_argument(
        "--reader-grace",
        type=duration,
        default="0",
        metavar="TIME",
        help="how long read-only sessions that run a query may go on (default: 0); writes are possible at once",
    )
    parser.add_argument("--force", action="store_true", help="thaw whoever's freeze it is")


def _run(call: Call) -> Outcome:
    args = call.args
    done = core.resume(
        call.connect,
        databases=args.database,
        holder=args.holder,
        reader_grace=args.reader_grace,
        force=args.force,
        connect_to=call.target.connect_to,
    )
    call.signals.settle()
    shown: list[RenderableType] = []
    for freeze in done.thawed:
        lasted = (
            "" if freeze.restored_at is None else f" after {spoken(freeze.restored_at - freeze.requested_at)}, held by "
        ) + (visible(freeze.holder) if freeze.restored_at is not None else "")
        shown.append(
            Text(
                f"{show.names(freeze.databases)} thawed{lasted}; ended {freeze.readers_ended} read-only session(s)",
                style="green",
            )
        )
    for freeze in done.others:
        shown += [
            Text(f"{show.names(freeze.databases)} left alone: held by another.", style="bold yellow"),
            show.details(freeze, None),
            *show.thaw(freeze, call.target),
        ]
    found = {name for freeze in (*done.thawed, *done.others) for name in freeze.databases}
    rest = [name for name in done.databases if name not in found]
    if not rest:
        return Outcome({**done.as_dict(), "unexplained": [], "unknown": []}, tuple(shown))
    # No journal, or another one than the freeze's: it may look frozen all the same.
    seen = core.status(call.connect, databases=rest, connect_to=call.target.connect_to)
    more = {"unexplained": list(seen.unexplained), "unknown": [doubt.as_dict() for doubt in seen.unknown]}
    shown.append(Text(f"{show.names(rest)}: the journal knows of no freeze to thaw."))
    shown += [*show.unknown(seen.unknown), *show.unexplained(seen.unexplained, seen.unknown)]
    code = errors.UNEXPLAINED if seen.unexplained else errors.UNKNOWN if seen.unknown else 0
    return Outcome({**done.as_dict(), **more}, tuple(shown), code)


VERB = Verb(
    description=(
        "Thaw: every write is possible again, with exactly the settings that were there before. Safe to repeat. "
        "A freeze of another holder is left alone, and named, unless --force is given."
    ),
    examples=(
        "resume --database gitlabhq",
        "resume --database gitlabhq --reader-grace 30s",
        "resume --database gitlabhq --force",
    ),
    arguments=_arguments,
    run=_run,
    exit_codes={
        "0": "thawed, or nothing of this holder was frozen",
        "1": "failed; what is frozen is as before",
        "2": "bad usage",
        "3": "refused: a right is missing",
        "5": "STILL FROZEN: something could not be thawed",
        "6": "no freeze was found, and a database is closed or read-only all the same",
        "8": "no freeze was found, and it cannot be known whether a database is frozen",
        "128+n": "ended by signal n; perhaps something is thawed: run it again",
    },
    interrupted="stopped midway: the database may still be frozen. Run it again",
)
