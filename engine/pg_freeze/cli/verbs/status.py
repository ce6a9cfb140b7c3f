"""The verb that tells what is frozen: status."""

from __future__ import annotations

import argparse

from rich.console import RenderableType
from rich.text import Text

import pg_freeze as core
from pg_freeze import FreezeError, InvalidRequest, ServerLost, State, Status
from pg_freeze.cli import errors, show
from pg_freeze.cli.options import add_databases
from pg_freeze.cli.verb import Call, Outcome, Verb


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_databases(parser, required=False)
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 0 if nothing is frozen, 5 if something is overdue, 6 if something is closed or read-only and "
        "no freeze explains it, 8 if it cannot be known, 7 if something is frozen within its lease; the most urgent "
        "one counts",
    )


def _run(call: Call) -> Outcome:
    try:
        found = core.status(call.connect, databases=call.args.database, connect_to=call.target.connect_to)
    except (ServerLost, InvalidRequest):
        raise
    except FreezeError as error:
        if not call.args.check:
            raise
        said = {**errors.document(error, str(error)), "check": "unknown", "exit_code": errors.UNKNOWN}
        return Outcome(said, tuple(errors.shown(error, str(error))), errors.UNKNOWN)
    shown: list[RenderableType] = []
    for freeze in found.freezes:
        shown += [show.headline(freeze), show.details(freeze, found.server_time)]
        those = [one for one in found.backends if one.database in freeze.databases]
        if those:
            shown += [Text(f"\n{len(those)} session(s) that may still write:"), show.backends(those)]
        if freeze.holds or freeze.left_over:
            shown += show.thaw(freeze, call.target)
        shown.append(Text())
    if not found.freezes and not found.unexplained and not found.unknown:
        which = show.names(call.args.database) if call.args.database else f"Nothing on {call.target.name}"
        shown.append(Text(f"{which} is not frozen." if call.args.database else f"{which} is frozen.", style="green"))
    shown += [*show.unknown(found.unknown), *show.unexplained(found.unexplained, found.unknown)]
    document = found.as_dict()
    if not call.args.check:
        return Outcome(document, tuple(shown))
    check, exit_code = _checked(found)
    return Outcome({**document, "check": check, "exit_code": exit_code}, tuple(shown), exit_code)


def _checked(found: Status) -> tuple[str, int]:
    """Return what a script is to know, in a word and as an exit code: what is most urgent, if there are several."""
    # A freeze that is being taken back holds nobody any more, but something of it is left.
    left = [one for one in found.freezes if one.holds or one.state is State.THAWING]
    if any(one.lease_until <= found.server_time for one in left):
        return "overdue", errors.STILL_FROZEN
    if found.unexplained:
        return "unexplained", errors.UNEXPLAINED
    if found.unknown:
        return "unknown", errors.UNKNOWN
    return ("frozen", errors.FROZEN) if left else ("clear", 0)


VERB = Verb(
    description=(
        "Tell what is frozen, by whom, since when and until when, whether the server would thaw it by itself, which "
        "sessions may still write and what will happen to each, and what to type to thaw it. Exits with 0 either way, "
        "unless --check is given."
    ),
    examples=("status", "status --database gitlabhq --json", "status --check"),
    arguments=_arguments,
    run=_run,
    exit_codes={
        "0": "the server was asked; with --check: nothing is frozen",
        "1": "failed: the server could not be asked",
        "2": "bad usage",
        "3": "refused: a right is missing",
        "5": "with --check: OVERDUE, something is frozen past its lease",
        "6": "with --check: something is closed or read-only, and no freeze explains it",
        "7": "with --check: something is frozen within its lease",
        "8": "with --check: it cannot be known whether something is frozen",
        "128+n": "ended by signal n",
    },
)
