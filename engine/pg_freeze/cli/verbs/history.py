"""The verb that lists past freezes: history."""

from __future__ import annotations

import argparse

from rich.text import Text

import pg_freeze as core
from pg_freeze import Freeze
from pg_freeze.cli import show
from pg_freeze.cli.verb import Call, Outcome, Verb
from pg_freeze.cli.words import moment, spoken

_ELSEWHERE = (
    "Freezes by the strategy privileges are in the journal of the frozen database: --maintenance-database NAME."
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="how many, newest first (default: 20)")


def _run(call: Call) -> Outcome:
    freezes = core.history(call.connect, limit=call.args.limit)
    rows = (
        (
            moment(one.requested_at),
            ", ".join(one.databases),
            one.holder,
            one.strategy,
            one.state.value,
            _lasted(one),
            one.checkpoint_lsn,
            show.counted(one.terminated) if one.terminated else None,
            one.thawed_by,
        )
        for one in freezes
    )
    columns = (
        "requested",
        "databases",
        "holder",
        "strategy",
        "state",
        "lasted",
        "checkpoint",
        "sessions ended",
        "thawed by",
    )
    journal = bool(freezes) or core.has_journal(call.connect)
    none = "No freeze yet." if journal else "There is no journal in this maintenance database."
    shown = show.table(columns, rows) if freezes else Text(none)
    document = {"freezes": [one.as_dict() for one in freezes], "journal": journal}
    return Outcome(document, (shown, Text(f"\n{_ELSEWHERE}", style="dim")))


def _lasted(freeze: Freeze) -> str:
    if freeze.restored_at is None:
        return "until now" if freeze.holds else ""
    return spoken(freeze.restored_at - freeze.requested_at)


VERB = Verb(
    description="List past freezes, newest first: who, when, for how long, and what ended them.",
    examples=("history", "history --limit 100 --json"),
    arguments=_arguments,
    run=_run,
)
