"""The command line, ``pg-freeze``: the core for people and scripts, without Airflow unless ``--conn-id`` asks for it.

With ``--json`` exactly one JSON object is printed on stdout, whatever happens. Messages for people go to stderr,
results for people to stdout.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from airflow_pg_freeze.cli import errors
from airflow_pg_freeze.cli.output import Log, Voice, rendered, visible, write
from airflow_pg_freeze.cli.parser import UsageError, parse
from airflow_pg_freeze.cli.signals import Interrupted, Signals
from airflow_pg_freeze.cli.target import ENVIRONMENT, targets
from airflow_pg_freeze.cli.verb import Call, Outcome, Verb
from airflow_pg_freeze.cli.verbs import VERBS
from airflow_pg_freeze.core import FreezeError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _open_streams()
    signals = Signals()
    with signals.raising():
        try:
            args = parse(words, VERBS)
        except UsageError as error:
            return _misused(error, as_json="--json" in words)
        voice = Voice(silent=args.json)
        _log_to(voice, verbose=args.verbose, as_json=args.json)
        try:
            # Whatever else is written to stdout, by Airflow's logging above all, would spoil the one object.
            with contextlib.redirect_stdout(sys.stderr):
                call = Call(args, targets(args) if args.verb.server else (), voice, signals)
                if any(target.needs_password for target in call.targets):
                    voice.say(
                        f"pg-freeze: others can read the password of --dsn in the process list: use {ENVIRONMENT} or "
                        "~/.pgpass",
                        "yellow",
                    )
                outcome = args.verb.run(call)
        except (FreezeError, Interrupted) as error:
            return _failed(error, args.verb, as_json=args.json, verbose=args.verbose)
        except Exception as error:  # noqa: BLE001 - a script that asked for JSON gets it even for what nobody foresaw
            return _failed(error, args.verb, as_json=args.json, verbose=args.verbose)
        signals.settle()
        return _report(outcome, as_json=args.json)


def _open_streams() -> None:
    """Make sure that writing to the standard streams works: they may be closed, or know too few characters."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            # Take the number, so that no connection gets it: it would receive our messages.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        else:
            stream.reconfigure(errors="backslashreplace")


def _log_to(voice: Voice, *, verbose: bool, as_json: bool) -> None:
    if verbose:
        logging.basicConfig(
            stream=sys.stderr, level=logging.DEBUG, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        return
    ours = logging.getLogger("airflow_pg_freeze")
    ours.setLevel(logging.ERROR if as_json else logging.INFO)
    ours.addHandler(Log(voice))
    ours.propagate = False


def _print(document: dict[str, Any]) -> None:
    write(json.dumps(document) + "\n")


def _report(outcome: Outcome, *, as_json: bool) -> int:
    try:
        if as_json:
            _print(outcome.document)
        else:
            write(rendered(outcome.shown, sys.stdout))
    except OSError as error:
        said = f"the result could not be written ({error.strerror})"
        if outcome.undo is None:
            Voice().say(f"pg-freeze: {said}", "bold red")
            return errors.FAILED
        try:
            outcome.undo()
        except FreezeError as failed:
            Voice().say(f"pg-freeze: {said}, and undoing failed: {failed}", "bold red")
            return errors.STILL_FROZEN
        Voice().say(f"pg-freeze: {said}: undone, since nobody would know of it", "bold red")
        return errors.FAILED
    return outcome.exit_code


def _failed(error: BaseException, verb: Verb, *, as_json: bool, verbose: bool) -> int:
    """Tell of an error, and return its exit code."""
    if verbose:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, FreezeError):
        message = str(error)
    elif isinstance(error, Interrupted):
        message = f"{error}: {verb.interrupted}"
    else:
        message = f"{type(error).__name__}: {error}" + ("" if verbose else " (--verbose shows where)")
    try:
        if as_json:
            _print(errors.document(error, message))
        else:
            Voice().show(*errors.shown(error, message))
    except OSError:
        return errors.exit_code(error)  # the exit code says it to whoever is left
    return errors.exit_code(error)


def _misused(error: UsageError, *, as_json: bool) -> int:
    if as_json:
        with contextlib.suppress(OSError):
            _print({"error": "InvalidRequest", "message": str(error), "exit_code": errors.USAGE})
    else:
        Voice().show(Text(error.usage.rstrip()), Text(f"pg-freeze: {visible(error)}", style="bold red"))
    return errors.USAGE
