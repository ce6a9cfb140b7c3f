"""The verb that tells beforehand what would go wrong: preflight."""

from __future__ import annotations

import argparse

from rich.console import RenderableType
from rich.text import Text

import pg_freeze as core
from pg_freeze import READ_ONLY
from pg_freeze.advise import Advice, advise
from pg_freeze.cli import show
from pg_freeze.cli.options import add_databases, add_holder, add_kind, add_strategy, request
from pg_freeze.cli.verb import Call, Outcome, Verb
from pg_freeze.names import visible


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_databases(parser)
    add_holder(parser)
    add_strategy(parser, READ_ONLY)
    add_kind(parser)
    parser.add_argument("--strict", action="store_true", help="take warnings for refusals, as pause --strict does")


def _run(call: Call) -> Outcome:
    args = call.args
    found = core.preflight(call.connect, request(args), connect_to=call.target.connect_to)
    reasons = found.findings if args.strict else found.refusals
    advice = None
    if not any(one.code in {"unknown-database", "maintenance-database"} for one in found.findings):
        advice = advise(call.target.connect, call.target.connect_to, databases=args.database)
    document = {**found.as_dict(), "ok": not reasons, "advice": None if advice is None else advice.as_dict()}
    shown = [*show.findings(one.as_dict() for one in found.findings), *_advised(advice)]
    if found.proof is not None:
        shown.append(
            Text(visible(f"Proof that nothing changed: by {found.proof.method}. {found.proof.advice}".rstrip()))
        )
    if not reasons:
        ready = Text(f"{show.names(found.databases)}: ready to be frozen", style="bold green")
        return Outcome(document, (*shown, ready))
    message = f"a freeze by the strategy {args.strategy} would be refused for {len(reasons)} reason(s)"
    document |= {"error": "FreezeRefused", "message": message, "exit_code": 3}
    return Outcome(document, (*shown, Text(f"{show.names(found.databases)}: {message}", style="bold red")), 3)


def _advised(advice: Advice | None) -> list[RenderableType]:
    if advice is None:
        return []
    lines = [f"Advice for `pg-freeze run` and one-task DAGs: --strategy {advice.strategy}"]
    lines += [f"  because {reason}" for reason in advice.reasons]
    lines += [f"  note: {note}" for note in advice.notes]
    return [Text(visible(line)) for line in lines]


VERB = Verb(
    description=(
        "Tell everything that would make a freeze fail (refused) or leak (warning), each with its remedy. "
        "Changes nothing. Exits with 3 if a freeze by this strategy would be refused."
    ),
    examples=(
        "preflight --database gitlabhq",
        "preflight --database gitlabhq --strategy lock",
        "preflight --database gitlabhq --checkpoint --strict --json",
    ),
    arguments=_arguments,
    run=_run,
)
