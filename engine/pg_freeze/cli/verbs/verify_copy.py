"""The verb that looks whether a restored copy is good: verify-copy."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from pg_freeze.cli import show
from pg_freeze.cli.verb import Call, Outcome, Verb
from pg_freeze.cli.words import duration, spoken
from pg_freeze.names import visible
from pg_freeze.verify import WITHIN, verify_copy


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", required=True, type=Path, metavar="DIR", help="the restored data directory")
    parser.add_argument(
        "--bin-dir", type=Path, metavar="DIR", help="where postgres of its version is (default: PATH, the usual places)"
    )
    parser.add_argument("--user", default="postgres", metavar="ROLE", help="a superuser of the copied server")
    parser.add_argument(
        "--maintenance-database", default="postgres", metavar="NAME", help="where the journal is (default: postgres)"
    )
    parser.add_argument(
        "--attestation",
        type=Path,
        metavar="FILE",
        help="the closed attestation, as run, attest --after or PgAttestOperator has written it; without it only the "
        "copy's own WAL can tell whether a row changed",
    )
    parser.add_argument(
        "--tablespace",
        action="append",
        type=_mapping,
        default=[],
        metavar="OLD=NEW",
        help="where the copy of the tablespace at OLD is; OLD may be its OID; may be repeated. The server of the copy "
        "writes there",
    )
    parser.add_argument("--wal", type=Path, metavar="DIR", help="where the copy of pg_wal is, if that is a link")
    parser.add_argument(
        "--stale-pid",
        action="store_true",
        help="no server runs on the directory anywhere, though that cannot be seen from here: in a container, or on a "
        "volume that another machine may have mounted",
    )
    parser.add_argument(
        "--trust-copy",
        action="store_true",
        help="run it without isolation, with the rights of its owner: for copies whose code you would run anyway",
    )
    parser.add_argument(
        "--within",
        type=duration,
        default=WITHIN,
        metavar="TIME",
        help=f"give up after this time (default: {spoken(WITHIN)})",
    )


def _mapping(text: str) -> tuple[str, Path]:
    old, equals, new = text.rpartition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW")
    return old, Path(new)


def _run(call: Call) -> Outcome:
    args = call.args
    found = verify_copy(
        args.data_dir,
        bin_dir=args.bin_dir,
        user=args.user,
        maintenance_database=args.maintenance_database,
        tablespaces=dict(args.tablespace),
        wal_dir=args.wal,
        attestation=args.attestation,
        stale_pid=args.stale_pid,
        trusted=args.trust_copy,
        within=args.within,
        starting=lambda: call.voice.say(f"Starting PostgreSQL on {args.data_dir}; recovery may take a while"),
    )
    shown: list[RenderableType] = []
    for freeze in found.freezes:
        shown += [
            Text(f"{show.names(freeze.databases)}: taken inside the freeze of {visible(freeze.holder)}"),
            show.pairs({"token": str(freeze.token), "checkpoint": freeze.checkpoint_lsn or "none"}),
        ]
    shown.append(Text(f"Thawed: {show.names(found.thawed) or 'nothing'}"))
    vacuumed = ", its tables were vacuumed" if found.thawed else ""
    shown.append(Text(f"Changed in the copy: it has recovered{vacuumed}; no row is another one"))
    shown += [Text(f"Looked at: {visible(one)}") for one in found.looked_at]
    shown += [Text(f"Not looked at: {visible(one)}") for one in found.unseen]
    shown += [Text(f"  {visible(problem)}", style="red") for problem in found.problems]
    verdict = "The copy is good" if found.good else f"The copy is NOT good: {len(found.problems)} problem(s)"
    shown.append(Text(verdict, style="bold green" if found.good else "bold red"))
    return Outcome(found.as_dict(), tuple(shown), exit_code=int(not found.good))


VERB = Verb(
    description=(
        "Start PostgreSQL on a restored copy, isolated from everything else (as root; or --trust-copy), thaw it there, "
        "see whether anything changed while it was made, check tables and indexes against each other, stop it and "
        "report what was looked at and what was not. The copy is changed by this: it recovers, is thawed, and the "
        "tables of what was frozen are vacuumed. Give a clone of what must be kept."
    ),
    examples=(
        "verify-copy --data-dir /restore/pgdata --attestation /restore/attestation.json",
        "verify-copy --data-dir /restore/pgdata --wal /restore/wal --tablespace /srv/fast=/restore/fast",
        "verify-copy --data-dir /restore/pgdata --bin-dir /usr/lib/postgresql/16/bin",
    ),
    arguments=_arguments,
    run=_run,
    interrupted="stopped; the server on the copy was stopped, too",
    server=False,
    exit_codes={
        "0": "the copy is good",
        "1": "the copy is NOT good, or PostgreSQL does not start on it",
        "2": "bad usage, or a file that is no closed attestation; nothing was looked at",
        "3": "refused: no data directory, a server runs on it, rights are missing; nothing was looked at",
        "128+n": "ended by signal n",
    },
)
