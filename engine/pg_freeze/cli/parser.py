"""The parser of the command line."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Sequence
from typing import Final, NoReturn

from pg_freeze import __version__
from pg_freeze.cli.verb import Verb
from pg_freeze.cli.verbs import SUMMARIES, load

#: The environment variable that holds a DSN.
ENVIRONMENT: Final = "PG_FREEZE_DSN"
_EXIT_CODES: Final = """\
  0  done
  1  failed; nothing is left frozen by this attempt
  2  bad usage
  3  refused, by preflight or because another holder has it; nothing was changed
  4  drain timeout; everything was undone
  5  STILL FROZEN: something could not be thawed, or is overdue
  128+n  ended by signal n; a pause is undone"""
_OTHERS: Final = "  resume, status and verify-copy list theirs, which may be 6, 7 and 8, too"

_WITH_SERVER = f" (with {ENVIRONMENT} set, or with --dsn or --conn-id)"


class UsageError(Exception):
    """The command line cannot be understood."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; ``verb`` is the :class:`Verb`.

    :raises UsageError: for a command line that cannot be understood.
    """
    parser = _Parser(
        prog="pg-freeze",
        description="Freeze PostgreSQL databases for as long as a snapshot takes, and never longer.",
        epilog=f"pg-freeze VERB --help says more, with examples.\n\nexit codes:\n{_EXIT_CODES}\n{_OTHERS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pg-freeze {__version__}")
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=_Parser)
    # The options before it take no value.
    asked: argparse.ArgumentParser | None = None
    called = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in SUMMARIES.items():
        sub = subparsers.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if name == called:
            verb = load(name)
            _fill(sub, verb)
            if verb.takes_command:
                asked = sub
    if any("\udc80" <= char <= "\udcff" for word in arguments for char in word):
        raise UsageError("an argument is not valid UTF-8", "")
    options = parser.parse_args(arguments) if asked is None else _with_command(parser, arguments, asked)
    if options.verb.server and not options.verb.several and len(options.dsn or ()) + len(options.conn_id or ()) > 1:
        raise UsageError("one server only: give one --dsn or one --conn-id", "")
    return options


def _with_command(
    parser: argparse.ArgumentParser, arguments: Sequence[str], verb: argparse.ArgumentParser
) -> argparse.Namespace:
    """Return the options before ``--``, and the command after it: an option of the command is never taken for ours."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    options, unknown = parser.parse_known_args(words[:end])
    options.command = words[end + 1 :]
    # What is not an option of ours before the -- may be the command, and then so may what follows it.
    if unknown:
        hint = "" if unknown[0].startswith("-") and options.command else ": put -- before the command"
        raise UsageError(f"unrecognized arguments: {shlex.join(unknown)}{hint}", verb.format_usage())
    if not options.command:
        raise UsageError("there is no command to run: put it after --", verb.format_usage())
    return options


def _fill(parser: argparse.ArgumentParser, verb: Verb) -> None:
    examples = "\n".join(f"  pg-freeze {line}" for line in verb.examples)
    codes = "\n".join(f"  {code}  {what}" for code, what in verb.exit_codes.items()) or _EXIT_CODES
    parser.description = textwrap.fill(verb.description, 80)
    parser.epilog = f"examples{_WITH_SERVER if verb.server else ''}:\n{examples}\n\nexit codes:\n{codes}"
    parser.set_defaults(verb=verb)
    verb.arguments(parser)
    if verb.server:
        _add_server(parser, verb)
    _add_output(parser)
    if verb.takes_command:
        parser.add_argument_group("command", "-- COMMAND ...  what to run; its exit code is ours")
        usage = parser.format_usage().removeprefix("usage: ").rstrip()
        parser.usage = f"{usage}\n{' ' * len(f'usage: {parser.prog} ')}-- COMMAND ...".replace("%", "%%")


def _add_server(parser: argparse.ArgumentParser, verb: Verb) -> None:
    server = parser.add_argument_group("server" + ("s, as many as you like" if verb.several else ""))
    server.add_argument(
        "--dsn",
        action="append",
        metavar="DSN",
        help=f"connection string or URI; Airflow is not loaded. Default: the environment variable {ENVIRONMENT}, which "
        "keeps a password out of the process list. PGHOST and its like and ~/.pgpass work too",
    )
    server.add_argument("--conn-id", action="append", metavar="ID", help="connection of Airflow instead")
    server.add_argument(
        "--maintenance-database",
        metavar="NAME",
        help="where the journal is, and never what is frozen (default: that of the DSN, or postgres)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print exactly one JSON object on stdout, for errors too")
    output.add_argument(
        "--verbose", "-v", action="store_true", help="log what is done to stderr, errors with traceback"
    )
