"""The verb that thaws what has outlived its lease: guard."""

from __future__ import annotations

import argparse
import logging
import threading
import time
from datetime import timedelta
from typing import Any, NamedTuple

from rich.console import RenderableType
from rich.text import Text

import pg_freeze as core
from pg_freeze import Doubt, Freeze, InvalidRequest, ThawFailed
from pg_freeze.cli import show
from pg_freeze.cli.errors import exit_code
from pg_freeze.cli.signals import Interrupted
from pg_freeze.cli.target import Target
from pg_freeze.cli.verb import Call, Outcome, Verb
from pg_freeze.cli.words import duration, spoken
from pg_freeze.names import visible

log = logging.getLogger(__name__)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--every", type=duration, metavar="TIME", help="go on and look again at this interval, until stopped"
    )


def _run(call: Call) -> Outcome:
    every: timedelta | None = call.args.every
    if every is None:
        return _round(call)
    if every <= timedelta(0):
        raise InvalidRequest("--every must be more than zero")
    if call.args.json:
        raise InvalidRequest("--json prints one object, --every would need many: give one of them")
    rounds = worst = 0
    call.voice.say(f"pg-freeze: guarding {len(call.targets)} server(s), every {spoken(every)}", "dim")
    try:
        while True:
            began = time.monotonic()
            done = _round(call)
            rounds, worst = rounds + 1, max(worst, done.exit_code)
            if done.exit_code or done.document["thawed"]:
                call.voice.show(*done.shown)
            time.sleep(max(0.0, began + every.total_seconds() - time.monotonic()))
    except Interrupted:
        return Outcome({}, (Text(f"Stopped after {rounds} round(s)."),), worst)


def _round(call: Call) -> Outcome:
    """Look at every server at once: one that does not answer holds up none of the others."""
    found: dict[int, _Found | Exception] = {}
    threads = [
        threading.Thread(target=_look, args=(target, number, found), daemon=True)
        for number, target in enumerate(call.targets)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    servers: list[dict[str, Any]] = []
    shown: list[RenderableType] = []
    worst = 0
    for number, target in enumerate(call.targets):
        match found[number]:
            case Exception() as error:
                code = 5 if isinstance(error, ThawFailed) else 1
                worst = max(worst, code)
                kind = type(error).__name__
                servers.append(
                    {"server": target.name, "error": kind, "message": str(error), "exit_code": exit_code(error)}
                )
                shown.append(Text(f"{target.name}: {kind}: {visible(error)}", style="bold red"))
            case _Found(thawed, unknown):
                doubts = [doubt.as_dict() for doubt in unknown]
                servers.append({"server": target.name, "thawed": [one.as_dict() for one in thawed], "unknown": doubts})
                worst = max(worst, 1 if unknown else 0)
                said = "nothing has outlived its lease"
                if thawed:
                    said = "thawed " + "; ".join(f"{show.names(one.databases)} of {one.holder}" for one in thawed)
                shown += [Text(f"{target.name}: {visible(said)}"), *show.unknown(unknown)]
    document = {"servers": servers, "thawed": sum(len(one.get("thawed", ())) for one in servers)}
    return Outcome(document, tuple(shown), worst)


class _Found(NamedTuple):
    """What was thawed on a server, and of what it is not known whether it is frozen."""

    thawed: tuple[Freeze, ...]
    unknown: tuple[Doubt, ...]


def _look(target: Target, number: int, found: dict[int, _Found | Exception]) -> None:
    try:
        thawed = core.thaw_expired(target.connect, target.connect_to)
        found[number] = _Found(thawed, core.doubts(target.connect, target.connect_to))
    except Exception as error:  # reported with the results of the others
        log.debug("%s", target.name, exc_info=True)
        found[number] = error


VERB = Verb(
    description=(
        "Thaw what has outlived its lease. The dead-man switch does so by itself; the guard is for what that does not "
        "survive, such as a restart of the server, and for freezes made without one. A server that cannot be reached "
        "does not keep it from the others: it is reported, with exit code 1, or 5 if something is still frozen. So is "
        "a database that looks frozen by a role whose code we do not run."
    ),
    examples=(
        "guard --dsn postgresql://freezer@db1/postgres --dsn postgresql://freezer@db2/postgres",
        "guard --conn-id gitlab --every 30s",
    ),
    arguments=_arguments,
    run=_run,
    interrupted="stopped; what it had not thawed yet, the next round thaws",
    several=True,
)
