"""The command line, ``pg-freeze``: the core for people and scripts, without Airflow unless ``--conn-id`` asks for it.

With ``--json`` exactly one JSON object is printed on stdout, whatever happens. Messages for people go to stderr,
results for people to stdout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pg_freeze.cli.parser import UsageError, parse
from pg_freeze.cli.signals import Interrupted, Signals
from pg_freeze.cli.streams import let_go, open_streams

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    open_streams()
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    finally:
        let_go()


def _main(words: list[str]) -> int:
    environment = dict(os.environ)
    signals = Signals()
    with signals.raising():
        try:
            with signals.held():  # what is loaded only in part cannot say that we were asked to stop
                args = parse(words)
                # Only now: psycopg and rich take longer to load than it takes to print a help text.
                from pg_freeze.cli import calling  # noqa: PLC0415
        except (UsageError, Interrupted) as error:
            from pg_freeze.cli import calling  # noqa: PLC0415

            return calling.not_called(error, as_json="--json" in words)
        return calling.call(args, signals, environment)
