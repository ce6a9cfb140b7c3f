"""The verbs that act: pause, checkpoint, resume."""

from __future__ import annotations

import argparse

from rich.console import RenderableType
from rich.text import Text

from airflow_pg_freeze import core
from airflow_pg_freeze.cli import show
from airflow_pg_freeze.cli.live import Draining
from airflow_pg_freeze.cli.options import add_databases, add_holder, add_kind, add_limits
from airflow_pg_freeze.cli.output import visible
from airflow_pg_freeze.cli.signals import Interrupted
from airflow_pg_freeze.cli.verb import Call, Outcome, Verb
from airflow_pg_freeze.cli.words import command, duration, process_age, spoken
from airflow_pg_freeze.core import Freeze, OnDrainTimeout, Resumed


def _pause_arguments(parser: argparse.ArgumentParser) -> None:
    add_databases(parser)
    add_holder(parser)
    add_limits(parser)
    add_kind(parser)


def _pause(call: Call) -> Outcome:
    args = call.args
    freeze: Freeze | None = None
    try:
        with Draining(call.voice, args.database, OnDrainTimeout(args.on_drain_timeout)) as progress:
            freeze = core.pause(
                call.connect,
                databases=args.database,
                holder=args.holder,
                lease=args.lease,
                drain_timeout=args.drain_timeout,
                on_drain_timeout=args.on_drain_timeout,
                admit=args.admit,
                checkpoint=args.checkpoint,
                switch_wal=args.switch_wal,
                strict=args.strict,
                dead_man=not args.no_dead_man,
                age=process_age(),
                progress=progress,
            )
        call.signals.settle()
    except Interrupted:
        if freeze is not None:
            # Between the end of the pause and ours: who asked us to stop cannot know that it was done.
            _undo(call)
        raise
    return Outcome(freeze.as_dict(), tuple(_paused(call, freeze)), undo=lambda: _undo(call))


def _undo(call: Call) -> Resumed:
    return core.resume(call.connect, databases=call.args.database, holder=call.args.holder)


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


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    add_databases(parser)
    add_holder(parser)
    parser.add_argument("--switch-wal", action="store_true", help="switch to a new WAL file afterwards")


def _checkpoint(call: Call) -> Outcome:
    args = call.args
    freeze = core.checkpoint(call.connect, databases=args.database, holder=args.holder, switch_wal=args.switch_wal)
    resume = command("resume", call.target.options, freeze.databases, freeze.holder)
    return Outcome(
        freeze.as_dict(),
        (
            Text(f"Checkpoint at {freeze.checkpoint_lsn}; {show.names(freeze.databases)} frozen still."),
            *show.to_type("Next: snapshot, then resume", resume),
        ),
    )


def _resume_arguments(parser: argparse.ArgumentParser) -> None:
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


def _resume(call: Call) -> Outcome:
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
    if shown:
        return Outcome({**done.as_dict(), "unexplained": []}, tuple(shown))
    # No journal, or another one than the freeze's: it may look frozen all the same.
    unexplained = core.status(call.connect, databases=args.database).unexplained
    said = Text(f"{show.names(done.databases)}: no freeze to thaw; nothing to do.")
    return Outcome({**done.as_dict(), "unexplained": list(unexplained)}, (said, *show.unexplained(unexplained)))


PAUSE = Verb(
    name="pause",
    summary="freeze databases: refuse writes, and make the sessions go that may still write",
    description=(
        "Freeze databases: refuse writes, and make the sessions go that may still write. Comes back once that is done. "
        "Whatever ends it early (an error, Ctrl-C, SIGTERM) undoes everything. Repeated by the same holder, it extends "
        "the lease."
    ),
    examples=(
        "pause --database gitlabhq",
        "pause --database gitlabhq --database registry --lease 1h --checkpoint",
        "pause --database gitlabhq --drain-timeout 2m --on-drain-timeout abort",
        "pause --database gitlabhq --admit nobody --holder nightly --json",
    ),
    arguments=_pause_arguments,
    run=_pause,
    interrupted="stopped; whatever this pause had done is undone",
)
CHECKPOINT = Verb(
    name="checkpoint",
    summary="write all that is in memory to the volume, and note where that stands",
    description="Write all that is in memory to the volume, and note where that stands. Only while frozen.",
    examples=("checkpoint --database gitlabhq", "checkpoint --database gitlabhq --switch-wal"),
    arguments=_checkpoint_arguments,
    run=_checkpoint,
    interrupted="stopped; the freeze stands as before: resume it when you are done",
)
RESUME = Verb(
    name="resume",
    summary="thaw: every write is possible again, with the settings that were there before",
    description=(
        "Thaw: every write is possible again, with exactly the settings that were there before. Safe to repeat. "
        "A freeze of another holder is left alone, and named, unless --force is given."
    ),
    examples=(
        "resume --database gitlabhq",
        "resume --database gitlabhq --reader-grace 30s",
        "resume --database gitlabhq --force",
    ),
    arguments=_resume_arguments,
    run=_resume,
    interrupted="stopped midway: the database may still be frozen. Run it again",
)
