"""Everything that would make a freeze fail or leak, found at once, each with its remedy. Changes nothing."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pg_freeze import findings, journal, trust, wal
from pg_freeze.attestation import Method
from pg_freeze.control import ConnectTo, Control
from pg_freeze.findings import Around
from pg_freeze.journal import schema
from pg_freeze.model import Finding, Freeze, Severity, iso
from pg_freeze.request import FreezeRequest
from pg_freeze.strategies import named


@dataclass(frozen=True, slots=True)
class Proof:
    """How an attestation can prove that nothing changed, and what would make that better; empty if nothing would."""

    method: Method
    advice: str


@dataclass(frozen=True, slots=True)
class Preflight:
    """What preflight found: refusals keep a pause from beginning, warnings are reported with its result."""

    databases: tuple[str, ...]
    findings: tuple[Finding, ...]
    held: tuple[Freeze, ...] = ()
    proof: Proof | None = None

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """The findings for which a pause would not begin."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.REFUSE)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that the freeze cannot stop."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.WARN)

    def has(self, code: str) -> bool:
        """Whether something with this code was found."""
        return any(finding.code == code for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the findings as JSON-ready values."""
        return {
            "databases": list(self.databases),
            "ok": not self.refusals,
            "proof": None
            if self.proof is None
            else {"method": self.proof.method.value, "advice": self.proof.advice or None},
            "findings": [finding.as_dict() for finding in self.findings],
        }


def held_by_another(freeze: Freeze, request: FreezeRequest, now: datetime) -> Finding:
    """Return the refusal for databases that another holder, or another freeze of this holder, has frozen."""
    name = freeze.databases[0]
    who = (
        f"{freeze.holder!r}"
        if freeze.holder != request.holder
        else f"this holder ({request.holder!r}), with another set of databases, strategy, admit or roles"
    )
    overdue = freeze.lease_until <= now
    wait = "nobody has thawed it: pg-freeze guard does, or" if overdue else "wait for its resume, or end it"
    return Finding(
        Severity.REFUSE,
        "held",
        f"{', '.join(map(repr, freeze.databases))} held by {who} since {iso(freeze.requested_at)}; "
        f"admit={freeze.admit}, lease until {iso(freeze.lease_until)}{', which is OVERDUE' if overdue else ''}",
        f"{wait}: pg-freeze resume --database {shlex.quote(name)} --holder {shlex.quote(freeze.holder)} (or --force)",
    )


def adoptable(freeze: Freeze, request: FreezeRequest) -> bool:
    """Whether a pause goes on with this freeze instead of beginning one."""
    return (
        freeze.strategy == request.strategy
        and named(request.strategy).outlives
        and freeze.admit is request.admit
        and set(freeze.roles) == set(request.roles)
        and freeze.holder == request.holder
        and set(freeze.databases) == set(request.databases)
    )


def examine(conn: Control, connect_to: ConnectTo | None, request: FreezeRequest) -> Preflight:
    """Return all that was found, refusals first. Reads catalogs and statistics only.

    :param conn: a control connection to the database that has the journal; that it is direct, to a primary and recent
        enough was checked as it was opened.
    """
    around = Around(conn, connect_to, request, findings.our_role(conn))
    journalled = schema.installed(conn)
    trusted = trust.has_journal(conn)
    ours = trusted and journalled is not None and journalled.usable and journalled.current
    held = tuple(f for f in journal.active(conn, request.databases) if f.holds) if ours else ()
    found = [
        *findings.databases(around),
        *findings.rights(around),
        *findings.journal(around, journalled),
        *findings.login_triggers(around),
        *named(request.strategy).findings(around),
        *(held_by_another(freeze, request, _now(conn)) for freeze in held if not adoptable(freeze, request)),
        *findings.frozen_inside(around),
    ]
    found.sort(key=lambda finding: finding.severity is not Severity.REFUSE)
    return Preflight(request.databases, tuple(found), held, _proof(conn))


def _now(conn: Control) -> datetime:
    row = conn.execute("SELECT clock_timestamp()").fetchone()
    assert row is not None
    now: datetime = row[0]
    return now


def _proof(conn: Control) -> Proof:
    found = wal.readable(conn)
    if not isinstance(found, wal.Unread):
        return Proof(Method.WAL, "")
    return Proof(
        Method.TRANSACTION_IDS,
        "A snapshot is crash-only if the server gives out a transaction id meanwhile, for any of its databases. "
        f"Better, from the WAL: {found.remedy}",
    )
