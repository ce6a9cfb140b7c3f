"""The verb that freezes for the time of a command."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack

from rich.text import Text

from airflow_pg_freeze.cli.live import Draining
from airflow_pg_freeze.cli.options import add_databases, add_holder, add_kind, add_limits
from airflow_pg_freeze.cli.output import visible
from airflow_pg_freeze.cli.proving import attested
from airflow_pg_freeze.cli.signals import Interrupted
from airflow_pg_freeze.cli.verb import Call, Outcome, Verb
from airflow_pg_freeze.cli.words import process_age
from airflow_pg_freeze.core import Freeze, Hold, InvalidRequest, OnDrainTimeout, Strategy, frozen
from airflow_pg_freeze.core.attestation import ENOUGH, Level, required


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_databases(parser)
    add_holder(parser)
    parser.add_argument(
        "--strategy",
        choices=[one.value for one in Strategy],
        default=Strategy.LOCK.value,
        help="lock: writers wait, nobody is ended (default); database: writes are refused, sessions are ended; "
        "privileges: the rights to write are revoked, from inside one database",
    )
    parser.add_argument(
        "--role",
        action="append",
        default=[],
        metavar="NAME",
        help="with --strategy privileges: revoke only what this role may write, or public for what was granted to "
        "everybody; may be repeated (default: all roles)",
    )
    add_limits(parser)
    add_kind(parser, checkpoint=True)
    parser.add_argument(
        "--require",
        choices=[*(level.value for level in ENOUGH), "none"],
        default=Level.READ_ONLY.value,
        help="the level of the attestation below which this fails although COMMAND did not (default: read-only)",
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, after --; its exit code is ours")


def _run(call: Call) -> Outcome:
    args = call.args
    level = required(None if args.require == "none" else args.require, args.strategy, args.admit)
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
                        roles=args.role,
                        age=process_age(),
                        progress=progress,
                    )
                )
            call.voice.say(f"Frozen; running {args.command[0]}", "dim")
            # A group of its own: Ctrl-C at a terminal reaches us first, and the command only once it is thawed.
            with call.signals.held():  # or the command could be there, and we not know of it
                child = subprocess.Popen(
                    [program, *args.command[1:]],
                    stdout=sys.stderr if args.json else None,
                    env={**os.environ, **_environment(hold.freeze)},
                    start_new_session=True,
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
    shown = tuple(attested(attestation))
    if code == 0 and level is not None and not attestation.reaches(level):
        message = f"what was made while frozen is {attestation.level}, and {level} is required: {attestation.reasons}"
        document |= {"error": "FreezeError", "message": message, "exit_code": 1}
        return Outcome(document, (*shown, Text(visible(message), style="bold red")), exit_code=1)
    # A command ended by a signal: what a shell reports for it.
    return Outcome(document, shown, exit_code=code if code >= 0 else 128 - code)


def _environment(freeze: Freeze) -> dict[str, str]:
    """Return what the command is told, to name and tag what it makes."""
    return {
        "PG_FREEZE_TOKEN": str(freeze.token),
        "PG_FREEZE_HOLDER": freeze.holder,
        "PG_FREEZE_LEASE_UNTIL": freeze.lease_until.isoformat(),
        "PG_FREEZE_CHECKPOINT_LSN": freeze.checkpoint_lsn or "",
    }


RUN = Verb(
    name="run",
    summary="freeze for the time of a command",
    description=(
        "Freeze databases, run a command, and thaw, whatever becomes of it. Its exit code is passed on; 1 if the "
        "freeze did not last as long as the command, or the attestation is below --require. The command finds "
        "PG_FREEZE_TOKEN, PG_FREEZE_HOLDER, PG_FREEZE_LEASE_UNTIL and PG_FREEZE_CHECKPOINT_LSN in its environment. A "
        "signal thaws first, and then ends the command. The command must not write to these databases: with --strategy "
        "lock it would wait for itself."
    ),
    examples=(
        "run --database gitlabhq -- btrfs subvolume snapshot -r /data /snapshots/tonight",
        "run --database gitlabhq --strategy database --lease 5m -- ./snapshot.sh",
    ),
    arguments=_arguments,
    run=_run,
    interrupted="stopped; thawed, and the command was told to end",
)
