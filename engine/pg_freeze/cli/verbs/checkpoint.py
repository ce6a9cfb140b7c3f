"""The verb that makes the final checkpoint."""

from __future__ import annotations

import argparse

from rich.text import Text

import pg_freeze as core
from pg_freeze.cli import show
from pg_freeze.cli.options import add_databases, add_holder
from pg_freeze.cli.verb import Call, Outcome, Verb
from pg_freeze.cli.words import command


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_databases(parser)
    add_holder(parser)
    parser.add_argument("--switch-wal", action="store_true", help="switch to a new WAL file afterwards")


def _run(call: Call) -> Outcome:
    args = call.args
    freeze = core.checkpoint(
        call.connect,
        databases=args.database,
        holder=args.holder,
        switch_wal=args.switch_wal,
        connect_to=call.target.connect_to,
    )
    resume = command("resume", call.target.options, freeze.databases, freeze.holder)
    return Outcome(
        freeze.as_dict(),
        (
            Text(f"Checkpoint at {freeze.checkpoint_lsn}; {show.names(freeze.databases)} frozen still."),
            *show.to_type("Next: snapshot, then resume", resume),
        ),
    )


VERB = Verb(
    description="Write all that is in memory to the volume, and note where that stands. Only while frozen.",
    examples=("checkpoint --database gitlabhq", "checkpoint --database gitlabhq --switch-wal"),
    arguments=_arguments,
    run=_run,
    interrupted="stopped; the freeze stands as before: resume it when you are done",
)
