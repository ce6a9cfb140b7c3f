"""The verb that freezes for the time of a command."""

from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import ExitStack
from datetime import timedelta
from enum import StrEnum
from typing import Final

from rich.text import Text

from pg_freeze import LOCK, Freeze, Hold, InvalidRequest, frozen
from pg_freeze.attestation import ENOUGH, Level, check_writable, required
from pg_freeze.cli import attestations
from pg_freeze.cli.command import Command
from pg_freeze.cli.live import Draining
from pg_freeze.cli.options import (
    add_attestation,
    add_databases,
    add_holder,
    add_kind,
    add_limits,
    add_strategy,
    request,
)
from pg_freeze.cli.verb import Call, Outcome, Verb
from pg_freeze.names import visible

#: How long the command may go on at most after the freeze was lost before its lease has ended.
_LOOK_EVERY: Final = timedelta(seconds=0.5)


class OnLost(StrEnum):
    """What becomes of the command when its freeze is lost, or the lease has ended."""

    TERMINATE = "terminate"
    IGNORE = "ignore"


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_databases(parser)
    add_holder(parser)
    add_strategy(parser, LOCK)
    add_limits(parser)
    add_kind(parser, checkpoint=True)
    parser.add_argument(
        "--require",
        choices=[*(level.value for level in ENOUGH), "none"],
        default=Level.QUIESCED.value,
        help="the level of the attestation below which this fails although COMMAND did not (default: quiesced)",
    )
    add_attestation(parser)
    parser.add_argument(
        "--on-lost",
        choices=[one.value for one in OnLost],
        default=OnLost.TERMINATE.value,
        help="what to do with COMMAND when the freeze is lost or its lease is over: terminate (SIGTERM to all of its "
        "processes, SIGKILL 5 s later; default), or ignore",
    )


def _run(call: Call) -> Outcome:
    args = call.args
    wanted = request(args)
    level = required(None if args.require == "none" else args.require, wanted.strategy, wanted.admit)
    program = shutil.which(args.command[0])
    if program is None:
        raise InvalidRequest(f"there is no program {args.command[0]!r}; nothing was frozen")
    check_writable(args.attestation)
    hold: Hold
    # Started before the freeze: nothing that takes time is left to do under it but the command itself.
    with call.signals.held():  # or the supervisor could be there, and we not know of it
        command = Command(program, args.command, sys.stderr.fileno() if args.json else None)
    with command, ExitStack() as stack:
        with Draining(call.voice, args.database, wanted.on_drain_timeout) as progress:
            hold = stack.enter_context(frozen(call.target.connect, call.target.connect_to, wanted, progress=progress))
        call.voice.say(f"Frozen; running {args.command[0]}", "dim")
        code = _finished(command, hold, call, OnLost(args.on_lost))
    call.signals.settle()
    attestation = hold.attestation
    assert attestation is not None
    if args.attestation is not None:
        attestation.write(args.attestation)
    document = {**hold.freeze.as_dict(), "command_exit_code": code, "attestation": attestation.as_dict()}
    shown = tuple(attestations.shown(attestation))
    if code == 0 and level is not None and not attestation.reaches(level):
        message = f"what was made while frozen is {attestation.level}, and {level} is required: {attestation.reasons}"
        document |= {"error": "FreezeError", "message": message, "exit_code": 1}
        return Outcome(document, (*shown, Text(visible(message), style="bold red")), exit_code=1)
    # A command ended by a signal: what a shell reports for it.
    return Outcome(document, shown, exit_code=code if code >= 0 else 128 - code)


def _finished(command: Command, hold: Hold, call: Call, on_lost: OnLost) -> int:
    """Run the command to its end, and return its exit code; tell it to end once the freeze does not stand any more."""
    try:
        with call.signals.held():
            command.start({**call.environment, **_environment(hold.freeze)})
        while True:
            if on_lost is OnLost.TERMINATE and not command.told:
                left = hold.left()
                if left <= 0:
                    call.voice.say("The freeze is over: telling the command to end", "bold red")
                    command.tell()
                else:
                    command.due_in(left)
            code = command.wait(_LOOK_EVERY)
            if code is not None:
                return code
    except BaseException:
        command.tell()  # at once; whether it is gone is looked at once all is thawed
        raise


def _environment(freeze: Freeze) -> dict[str, str]:
    """Return what the command is told, to name and tag what it makes."""
    return {
        "PG_FREEZE_TOKEN": str(freeze.token),
        "PG_FREEZE_HOLDER": freeze.holder,
        "PG_FREEZE_LEASE_UNTIL": freeze.lease_until.isoformat(),
        "PG_FREEZE_CHECKPOINT_LSN": freeze.checkpoint_lsn or "",
    }


VERB = Verb(
    description=(
        "Freeze databases, run a command, and thaw, whatever becomes of it. Its exit code is passed on; 1 if the "
        "freeze did not last as long as the command, or the attestation is below --require. The command finds "
        "PG_FREEZE_TOKEN, PG_FREEZE_HOLDER, PG_FREEZE_LEASE_UNTIL and PG_FREEZE_CHECKPOINT_LSN in its environment. A "
        "signal thaws, and ends the command with all that it has started; so does the death of this program. The "
        "command must not write to these databases: with --strategy lock it would wait for itself."
    ),
    examples=(
        "run --database gitlabhq -- btrfs subvolume snapshot -r /data /snapshots/tonight",
        "run --database gitlabhq --strategy read-only --lease 5m -- ./snapshot.sh",
    ),
    arguments=_arguments,
    run=_run,
    interrupted="stopped; thawed, and the command was told to end",
    takes_command=True,
)
