"""Calls a verb, and reports what came of it: a result, an error, a signal, or words that cannot be understood."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from pg_freeze import FreezeError
from pg_freeze.cli import errors
from pg_freeze.cli.output import Log, Voice, rendered
from pg_freeze.cli.parser import ENVIRONMENT, UsageError
from pg_freeze.cli.signals import Interrupted, Signals
from pg_freeze.cli.streams import write
from pg_freeze.cli.target import targets
from pg_freeze.cli.verb import Call, Outcome, Verb
from pg_freeze.names import visible


def call(args: argparse.Namespace, signals: Signals, environment: Mapping[str, str]) -> int:
    """Call the verb of a parsed command line, report what came of it, and return the exit code.

    :param environment: as it was given to us.
    """
    try:
        voice = Voice(silent=args.json)
        _log_to(voice, verbose=args.verbose, as_json=args.json)
        # Whatever else is written to stdout, by Airflow's logging above all, would spoil the one object.
        with contextlib.redirect_stdout(sys.stderr):
            servers = targets(args, environment) if args.verb.server else ()
            called = Call(args, servers, voice, signals, environment)
            if any(target.needs_password for target in called.targets):
                voice.say(
                    f"pg-freeze: others can read the password of --dsn in the process list: use {ENVIRONMENT} or "
                    "~/.pgpass",
                    "yellow",
                )
            outcome = args.verb.run(called)
    except (Exception, Interrupted) as error:  # noqa: BLE001 - a script that asked for JSON gets it even for what nobody foresaw
        return _failed(error, args.verb, as_json=args.json, verbose=args.verbose)
    signals.settle()
    return _report(outcome, as_json=args.json)


def not_called(error: UsageError | Interrupted, *, as_json: bool) -> int:
    """Tell of words that cannot be understood, or of a signal before anything was begun, and return the exit code."""
    if isinstance(error, Interrupted):
        return _told(error, f"{error}: stopped; nothing was changed", as_json=as_json)
    if as_json:
        with contextlib.suppress(OSError):
            _print({"error": "InvalidRequest", "message": str(error), "exit_code": errors.USAGE})
    else:
        Voice().show(Text(error.usage.rstrip()), Text(f"pg-freeze: {visible(error)}", style="bold red"))
    return errors.USAGE


def _log_to(voice: Voice, *, verbose: bool, as_json: bool) -> None:
    if verbose:
        logging.basicConfig(
            stream=sys.stderr, level=logging.DEBUG, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        return
    ours = logging.getLogger("pg_freeze")
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
    return _told(error, message, as_json=as_json)


def _told(error: BaseException, message: str, *, as_json: bool) -> int:
    try:
        if as_json:
            _print(errors.document(error, message))
        else:
            Voice().show(*errors.shown(error, message))
    except OSError:
        return errors.exit_code(error)  # the exit code says it to whoever is left
    return errors.exit_code(error)
