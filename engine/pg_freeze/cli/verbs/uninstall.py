"""The verb that removes the journal: uninstall."""

from __future__ import annotations

import argparse

from rich.text import Text

import pg_freeze as core
from pg_freeze.cli.verb import Call, Outcome, Verb


def _arguments(_: argparse.ArgumentParser) -> None:
    """Add no options of its own."""


def _run(call: Call) -> Outcome:
    removed = core.uninstall(call.connect)
    said = "The journal is removed, with its history." if removed else "There was no journal."
    return Outcome({"uninstalled": removed}, (Text(said),))


VERB = Verb(
    description=(
        "Remove the journal from the maintenance database, with all of its history. Run this as its owner or a "
        "superuser. Refused while anything is frozen, and while anything depends on the journal that is not part of "
        "it. Safe to repeat. The strategy privileges has a journal in each database that it froze: remove that with "
        "--maintenance-database."
    ),
    examples=("uninstall", "uninstall --maintenance-database gitlabhq"),
    arguments=_arguments,
    run=_run,
    interrupted="stopped; run it again",
)
