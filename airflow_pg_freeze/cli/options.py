"""Options that several verbs share."""

from __future__ import annotations

import argparse

from airflow_pg_freeze.cli.words import person
from airflow_pg_freeze.core import Admit


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


def add_kind(parser: argparse.ArgumentParser) -> None:
    """Add what kind of freeze it is to be: ``--admit``, ``--checkpoint``, ``--switch-wal``."""
    parser.add_argument(
        "--admit",
        choices=[one.value for one in Admit],
        default=Admit.READERS_ONCE_DRAINED.value,
        help="who may connect meanwhile: readers once it is drained (default), readers always, or nobody",
    )
    parser.add_argument("--checkpoint", action="store_true", help="make the final checkpoint as well")
    parser.add_argument("--switch-wal", action="store_true", help="and switch to a new WAL file; implies --checkpoint")
