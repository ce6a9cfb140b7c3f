"""The verbs that look and change nothing: preflight, status, history."""

from __future__ import annotations

import argparse

from rich.console import RenderableType
from rich.text import Text

from airflow_pg_freeze import core
from airflow_pg_freeze.cli import show
from airflow_pg_freeze.cli.options import add_databases, add_holder, add_kind
from airflow_pg_freeze.cli.output import visible
from airflow_pg_freeze.cli.verb import Call, Outcome, Verb
from airflow_pg_freeze.cli.words import moment, spoken
from airflow_pg_freeze.core import Freeze
from airflow_pg_freeze.core.advise import Advice, advise


def _preflight_arguments(parser: argparse.ArgumentParser) -> None:
    add_databases(parser)
    add_holder(parser)
    add_kind(parser)
    parser.add_argument("--strict", action="store_true", help="take warnings for refusals, as pause --strict does")


def _preflight(call: Call) -> Outcome:
    args = call.args
    found = core.preflight(
        call.connect,
        databases=args.database,
        holder=args.holder,
        admit=args.admit,
        checkpoint=args.checkpoint,
        switch_wal=args.switch_wal,
    )
    reasons = found.findings if args.strict else found.refusals
    advice = None
    if not any(one.code in {"unknown-database", "maintenance-database"} for one in found.findings):
        advice = advise(call.target.connect, call.target.connect_to, databases=args.database)
    document = {**found.as_dict(), "ok": not reasons, "advice": None if advice is None else advice.as_dict()}
    shown = [*show.findings(one.as_dict() for one in found.findings), *_advised(advice)]
    if not reasons:
        ready = Text(f"{show.names(found.databases)}: ready to be frozen", style="bold green")
        return Outcome(document, (*shown, ready))
    message = f"a pause would be refused for {len(reasons)} reason(s)"
    document |= {"error": "FreezeRefused", "message": message, "exit_code": 3}
    return Outcome(document, (*shown, Text(f"{show.names(found.databases)}: {message}", style="bold red")), 3)


def _advised(advice: Advice | None) -> list[RenderableType]:
    if advice is None:
        return []
    lines = [f"Advice for `pg-freeze run` and one-task DAGs: --strategy {advice.strategy}"]
    lines += [f"  because {reason}" for reason in advice.reasons]
    lines += [f"  note: {note}" for note in advice.notes]
    return [Text(visible(line)) for line in lines]


def _status(call: Call) -> Outcome:
    found = core.status(call.connect, databases=call.args.database, connect_to=call.target.connect_to)
    shown: list[RenderableType] = []
    for freeze in found.freezes:
        shown += [show.headline(freeze), show.details(freeze, found.server_time)]
        those = [one for one in found.backends if one.database in freeze.databases]
        if those:
            shown += [Text(f"\n{len(those)} session(s) that may still write:"), show.backends(those)]
        if freeze.holds:
            shown += show.thaw(freeze, call.target)
        shown.append(Text())
    if not found.freezes:
        which = show.names(call.args.database) if call.args.database else f"Nothing on {call.target.name}"
        shown.append(Text(f"{which} is not frozen." if call.args.database else f"{which} is frozen.", style="green"))
    shown += show.unexplained(found.unexplained)
    return Outcome(found.as_dict(), tuple(shown))


def _history_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="how many, newest first (default: 20)")


def _history(call: Call) -> Outcome:
    freezes = core.history(call.connect, limit=call.args.limit)
    rows = (
        (
            moment(one.requested_at),
            ", ".join(one.databases),
            one.holder,
            one.state.value,
            _lasted(one),
            one.checkpoint_lsn,
            show.counted(one.terminated) if one.terminated else None,
            one.thawed_by,
        )
        for one in freezes
    )
    columns = ("requested", "databases", "holder", "state", "lasted", "checkpoint", "sessions ended", "thawed by")
    shown = show.table(columns, rows) if freezes else Text("No freeze yet.")
    return Outcome({"freezes": [one.as_dict() for one in freezes]}, (shown,))


def _lasted(freeze: Freeze) -> str:
    if freeze.restored_at is None:
        return "until now" if freeze.holds else ""
    return spoken(freeze.restored_at - freeze.requested_at)


PREFLIGHT = Verb(
    name="preflight",
    summary="tell everything that would make a freeze fail or leak, each with its remedy",
    description=(
        "Tell everything that would make a freeze fail (refused) or leak (warning), each with its remedy. "
        "Changes nothing. Exits with 3 if a pause would be refused."
    ),
    examples=("preflight --database gitlabhq", "preflight --database gitlabhq --checkpoint --strict --json"),
    arguments=_preflight_arguments,
    run=_preflight,
)
STATUS = Verb(
    name="status",
    summary="tell what is frozen, by whom, until when, who lingers, and what to type to thaw it",
    description=(
        "Tell what is frozen, by whom, since when and until when, whether the server would thaw it by itself, which "
        "sessions may still write and what will happen to each, and what to type to thaw it. Exits with 0 either way."
    ),
    examples=("status", "status --database gitlabhq --json"),
    arguments=lambda parser: add_databases(parser, required=False),
    run=_status,
)
HISTORY = Verb(
    name="history",
    summary="list past freezes: who, when, for how long, and what ended them",
    description="List past freezes, newest first: who, when, for how long, and what ended them.",
    examples=("history", "history --limit 100 --json"),
    arguments=_history_arguments,
    run=_history,
)
