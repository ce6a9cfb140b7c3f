"""The verbs that prove something: attest and verify-copy."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from airflow_pg_freeze.cli import show
from airflow_pg_freeze.cli.options import add_databases, add_holder
from airflow_pg_freeze.cli.output import visible
from airflow_pg_freeze.cli.verb import Call, Outcome, Verb
from airflow_pg_freeze.core import attest
from airflow_pg_freeze.core.attestation import Attestation
from airflow_pg_freeze.core.verify import verify_copy


def _attest_arguments(parser: argparse.ArgumentParser) -> None:
    add_databases(parser)
    add_holder(parser)
    moment = parser.add_mutually_exclusive_group(required=True)
    moment.add_argument("--before", action="store_true", help="just before the snapshot: look, and open a record")
    moment.add_argument("--after", action="store_true", help="just after it: look again, compare, and say the level")


def _attest(call: Call) -> Outcome:
    look = attest.before if call.args.before else attest.after
    found = look(call.connect, databases=call.args.database, holder=call.args.holder)
    return Outcome(
        found.as_dict(), tuple(attested(found)), exit_code=int(found.level is not None and not found.certified)
    )


def attested(found: Attestation) -> list[RenderableType]:
    """Return an attestation for people."""
    if found.level is None:
        return [Text(f"Attestation {found.id} is open. Next: snapshot, then pg-freeze attest --after")]
    style = "bold green" if found.certified else "bold red"
    facts = {
        "token": str(found.token),
        "checkpoint": found.checkpoint_lsn or "none",
        "WAL": f"{found.wal_from} to {found.wal_to}, judged by {found.method}",
    }
    shown: list[RenderableType] = [
        Text(f"{show.names(found.databases)}: {found.level}", style=style),
        show.pairs(facts),
    ]
    if found.violations:
        rows = [(one.code, one.what, one.who, one.when) for one in found.violations]
        shown.append(show.table(("what breaks it", "", "who", "when"), rows))
    return shown


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", required=True, type=Path, metavar="DIR", help="the restored data directory")
    parser.add_argument(
        "--bin-dir", type=Path, metavar="DIR", help="where postgres of its version is (default: PATH, the usual places)"
    )
    parser.add_argument("--user", default="postgres", metavar="ROLE", help="a superuser of the copied server")
    parser.add_argument(
        "--maintenance-database", default="postgres", metavar="NAME", help="where the journal is (default: postgres)"
    )


def _verify(call: Call) -> Outcome:
    args = call.args
    call.voice.say(f"Starting PostgreSQL on {args.data_dir}; recovery may take a while")
    found = verify_copy(
        args.data_dir, bin_dir=args.bin_dir, user=args.user, maintenance_database=args.maintenance_database
    )
    shown: list[RenderableType] = []
    for freeze in found.freezes:
        shown += [
            Text(f"{show.names(freeze.databases)}: taken inside the freeze of {visible(freeze.holder)}"),
            show.pairs({"token": str(freeze.token), "checkpoint": freeze.checkpoint_lsn or "none"}),
        ]
    shown += [Text(f"Thawed: {show.names(found.thawed) or 'nothing'}"), Text(f"pg_amcheck: {visible(found.amcheck)}")]
    shown += [Text(f"  {visible(problem)}", style="red") for problem in found.problems]
    verdict = "The copy is good" if found.good else f"The copy is NOT good: {len(found.problems)} problem(s)"
    shown.append(Text(verdict, style="bold green" if found.good else "bold red"))
    return Outcome(found.as_dict(), tuple(shown), exit_code=int(not found.good))


ATTEST = Verb(
    name="attest",
    summary="record what state a snapshot is taken in: once before it, once after",
    description=(
        "Check a freeze just before a snapshot and just after it, and keep the record in the journal. The second check "
        "says the level: strict, read-only or crash-only, and what breaks it. Exit code 1 for crash-only."
    ),
    examples=("attest --database gitlabhq --before", "attest --database gitlabhq --after --json"),
    arguments=_attest_arguments,
    run=_attest,
)
VERIFY_COPY = Verb(
    name="verify-copy",
    summary="start PostgreSQL on a restored copy, thaw it there, and check it",
    description=(
        "Start PostgreSQL on a restored copy in isolation, thaw it there, check the journal's attestation, run "
        "pg_amcheck where it is installed, stop it and report. The copy is changed by this: give a "
        "clone of what must be kept."
    ),
    examples=(
        "verify-copy --data-dir /restore/pgdata",
        "verify-copy --data-dir /restore/pgdata --bin-dir /usr/lib/postgresql/16/bin",
    ),
    arguments=_verify_arguments,
    run=_verify,
    interrupted="stopped; the server on the copy was stopped, too",
    server=False,
)
