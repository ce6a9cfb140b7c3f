"""The verb that freezes: pause."""

from __future__ import annotations

import argparse

from rich.console import RenderableType
from rich.text import Text

import pg_freeze as core
from pg_freeze import READ_ONLY, Freeze, Resumed
from pg_freeze.cli import show
from pg_freeze.cli.live import Draining
from pg_freeze.cli.options import add_databases, add_holder, add_kind, add_limits, add_strategy, request
from pg_freeze.cli.signals import Interrupted
from pg_freeze.cli.verb import Call, Outcome, Verb
from pg_freeze.cli.words import command, spoken


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_databases(parser)
    add_holder(parser)
    add_strategy(parser, READ_ONLY)
    add_limits(parser)
    add_kind(parser)


def _run(call: Call) -> Outcome:
    args = call.args
    wanted = request(args)
    freeze: Freeze | None = None
    try:
        with Draining(call.voice, args.database, wanted.on_drain_timeout) as progress:
            freeze = core.pause(call.connect, wanted, connect_to=call.target.connect_to, progress=progress)
        call.signals.settle()
    except Interrupted:
        if freeze is not None:
            # Between the end of the pause and ours: who asked us to stop cannot know that it was done.
            _undo(call)
        raise
    return Outcome(freeze.as_dict(), tuple(_paused(call, freeze)), undo=lambda: _undo(call))


def _undo(call: Call) -> Resumed:
    return core.resume(
        call.connect, databases=call.args.database, holder=call.args.holder, connect_to=call.target.connect_to
    )


def _paused(call: Call, freeze: Freeze) -> list[RenderableType]:
    took = (
        "" if freeze.drained_at is None or freeze.barrier_at is None else spoken(freeze.drained_at - freeze.barrier_at)
    )
    shown = [
        *show.findings(freeze.warnings),
        show.headline(freeze),
        show.details(freeze, freeze.frozen_at),
        show.pairs({"drained in": took}),
    ]
    if freeze.lingering:
        shown.append(
            Text(f"  {len(freeze.lingering)} session(s) could not be ended: see pg-freeze status", "bold yellow")
        )
    options = call.target.options
    steps = [command("resume", options, freeze.databases, freeze.holder)]
    if freeze.checkpoint_lsn is None:
        steps.insert(0, command("checkpoint", options, freeze.databases, freeze.holder))
    last = "Next: checkpoint, snapshot, resume" if len(steps) == 2 else "Next: snapshot, then resume"
    return [*shown, *show.to_type(last, *steps)]


VERB = Verb(
    description=(
        "Freeze databases: refuse writes, and make the sessions go that may still write. Comes back once that is done. "
        "Whatever ends it early (an error, Ctrl-C, SIGTERM) undoes everything. Repeated by the same holder, it extends "
        "the lease."
    ),
    examples=(
        "pause --database gitlabhq",
        "pause --database gitlabhq --database registry --lease 1h --checkpoint",
        "pause --database gitlabhq --drain-timeout 2m --on-drain-timeout abort",
        "pause --database gitlabhq --strategy privileges --role reporting",
        "pause --database gitlabhq --admit nobody --holder nightly --json",
    ),
    arguments=_arguments,
    run=_run,
    interrupted="stopped; whatever this pause had done is undone",
)
