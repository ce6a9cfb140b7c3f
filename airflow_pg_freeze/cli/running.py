"""The verb that freezes for the time of a command."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from contextlib import ExitStack

from airflow_pg_freeze.cli.live import Draining
from airflow_pg_freeze.cli.options import add_databases, add_holder, add_kind, add_limits
from airflow_pg_freeze.cli.proving import attested
from airflow_pg_freeze.cli.signals import Interrupted
from airflow_pg_freeze.cli.verb import Call, Outcome, Verb
from airflow_pg_freeze.cli.words import process_age
from airflow_pg_freeze.core import Hold, InvalidRequest, OnDrainTimeout, Strategy, frozen


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_databases(parser)
    add_holder(parser)
    parser.add_argument(
        "--strategy",
        choices=[one.value for one in Strategy],
        default=Strategy.LOCK.value,
        help="lock: writers wait, nobody is ended (default); database: writes are refused, sessions are ended",
    )
    add_limits(parser)
    add_kind(parser, checkpoint=True)
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, after --; its exit code is ours")


def _run(call: Call) -> Outcome:
    args = call.args
    program = shutil.which(args.command[0])
    if program is None:
        raise InvalidRequest(f"there is no program {args.command[0]!r}; nothing was frozen")
    child: subprocess.Popen[bytes] | None = None
    hold: Hold
    try:
        with ExitStack() as stack:
            with Draining(call.voice, args.database, OnDrainTimeout(args.on_drain_timeout)) as progress:
                hold = stack.enter_context(
                    frozen(
                        call.target.connect,
                        call.target.connect_to,
                        databases=args.database,
                        holder=args.holder,
                        strategy=args.strategy,
                        lease=args.lease,
                        drain_timeout=args.drain_timeout,
                        on_drain_timeout=args.on_drain_timeout,
                        admit=args.admit,
                        checkpoint=not args.no_checkpoint,
                        switch_wal=args.switch_wal,
                        strict=args.strict,
                        dead_man=not args.no_dead_man,
                        age=process_age(),
                        progress=progress,
                    )
                )
            # A group of its own: Ctrl-C at a terminal reaches us first, and the command only once it is thawed.
            child = subprocess.Popen(
                [program, *args.command[1:]], stdout=sys.stderr if args.json else None, start_new_session=True
            )
            code = child.wait()
    except BaseException as error:
        if child is not None and child.poll() is None:
            child.terminate()
            if isinstance(error, Interrupted):
                raise
            child.wait()
        raise
    call.signals.settle()
    attestation = hold.attestation
    assert attestation is not None
    document = {**hold.freeze.as_dict(), "command_exit_code": code, "attestation": attestation.as_dict()}
    # A command ended by a signal: what a shell reports for it.
    return Outcome(document, tuple(attested(attestation)), exit_code=code if code >= 0 else 128 - code)


RUN = Verb(
    name="run",
    summary="freeze for the time of a command",
    description=(
        "Freeze databases, run a command, and thaw, whatever becomes of it. Its exit code is passed on; 1 if the "
        "freeze did not last as long as the command. A signal thaws first, and then ends the command."
    ),
    examples=(
        "run --database gitlabhq -- btrfs subvolume snapshot -r /data /snapshots/tonight",
        "run --database gitlabhq --strategy database --lease 5m -- ./snapshot.sh",
    ),
    arguments=_arguments,
    run=_run,
    interrupted="stopped; thawed, and the command was told to end",
)
