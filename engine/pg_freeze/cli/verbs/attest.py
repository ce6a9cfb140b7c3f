"""The verb that says what state a snapshot is taken in: attest."""

from __future__ import annotations

import argparse

from rich.console import RenderableType
from rich.text import Text

from pg_freeze import InvalidRequest, attest
from pg_freeze.attestation import Attestation
from pg_freeze.cli import attestations, show
from pg_freeze.cli.options import add_attestation, add_databases, add_holder
from pg_freeze.cli.verb import Call, Outcome, Verb
from pg_freeze.cli.words import command


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_databases(parser)
    add_holder(parser)
    moment = parser.add_mutually_exclusive_group(required=True)
    moment.add_argument("--before", action="store_true", help="just before the snapshot: look, and open a record")
    moment.add_argument("--after", action="store_true", help="just after it: look again, compare, and say the level")
    add_attestation(parser)


def _run(call: Call) -> Outcome:
    if call.args.before and call.args.attestation is not None:
        raise InvalidRequest("--attestation goes with --after: before the snapshot there is no level yet")
    look = attest.before if call.args.before else attest.after
    found = look(
        call.connect,
        databases=call.args.database,
        holder=call.args.holder,
        connect_to=call.target.connect_to,
    )
    if call.args.attestation is not None:
        found.write(call.args.attestation)
    return Outcome(
        found.as_dict(),
        tuple(_opened(call, found) if found.level is None else attestations.shown(found)),
        exit_code=int(found.level is not None and not found.certified),
    )


def _opened(call: Call, found: Attestation) -> list[RenderableType]:
    after = command("attest", (*call.target.options, "--after"), found.databases, found.holder)
    return [Text(f"Attestation {found.id} is open."), *show.to_type("Next: snapshot, then", after)]


VERB = Verb(
    description=(
        "Check a freeze just before a snapshot and just after it, and keep the record in the journal. The second check "
        "says the level: strict, quiesced or crash-only, and what breaks it. Exit code 1 for crash-only."
    ),
    examples=("attest --database gitlabhq --before", "attest --database gitlabhq --after --json"),
    arguments=_arguments,
    run=_run,
)
