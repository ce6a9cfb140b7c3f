"""Everything that would make a freeze fail or leak, found at once, each with its remedy. Changes nothing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pg_freeze import findings, journal, schema, trust, wal
from pg_freeze.attestation import Method
from pg_freeze.control import Control
from pg_freeze.model import Admit, Finding, Freeze, Kind, Severity, Strategy, iso
from pg_freeze.names import quoted


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


def held_by_another(freeze: Freeze, holder: str) -> Finding:
    """Return the refusal for databases that another holder, or another set of databases of this holder, has frozen."""
    name = freeze.databases[0]
    who = (
        f"{freeze.holder!r}"
        if freeze.holder != holder
        else f"this holder ({holder!r}), with another set of databases or another admit"
    )
    return Finding(
        Severity.REFUSE,
        "held",
        f"{', '.join(map(repr, freeze.databases))} held by {who} since {iso(freeze.requested_at)}; "
        f"admit={freeze.admit}, lease until {iso(freeze.lease_until)}",
        f"wait for its resume, or end it: pg-freeze resume --database {shlex.quote(name)} "
        f"--holder {shlex.quote(freeze.holder)} (or --force)",
    )


def adoptable(freeze: Freeze, holder: str, databases: Sequence[str], kind: Kind) -> bool:
    """Whether a pause of *holder* for these databases goes on with this freeze instead of beginning one."""
    return (
        freeze.kind == kind
        and freeze.strategy is not Strategy.LOCK
        and freeze.holder == holder
        and set(freeze.databases) == set(databases)
    )


def examine(
    conn: Control, databases: Sequence[str], holder: str, kind: Kind, *, checkpoint: bool, switch_wal: bool
) -> Preflight:
    """Return all that was found, refusals first. Reads catalogs and statistics only.

    :param conn: a control connection; that it is direct, to a primary and recent enough was checked as it was opened.
    """
    names = list(databases)
    role = findings.our_role(conn)
    me = quoted(role["name"])
    journalled = schema.installed(conn)
    ours = journalled.usable and journalled.current and trust.has_journal(conn)
    held = tuple(f for f in journal.active(conn, names) if f.holds) if ours else ()
    found = [
        *findings.databases(conn, role, me, names),
        *findings.rights(role, me, checkpoint=checkpoint, switch_wal=switch_wal),
        *findings.journal(journalled, role, me),
        *findings.login_triggers(conn, me, names, enters=kind.strategy is not Strategy.READ_ONLY),
        *(findings.overrides(conn, role, me, names) if kind.admit is not Admit.NOBODY else ()),
        *findings.writers(conn, role, me, names),
        *(held_by_another(freeze, holder) for freeze in held if not adoptable(freeze, holder, databases, kind)),
        *findings.frozen_inside(conn, names),
        *(findings.clients() if kind.admit is not Admit.NOBODY else ()),
    ]
    found.sort(key=lambda finding: finding.severity is not Severity.REFUSE)
    return Preflight(tuple(databases), tuple(found), held, _proof(conn))


def _proof(conn: Control) -> Proof:
    found = wal.readable(conn)
    if not isinstance(found, wal.Unread):
        return Proof(Method.WAL, "")
    return Proof(
        Method.TRANSACTION_IDS,
        "A snapshot is crash-only if the server gives out a transaction id meanwhile, for any of its databases. "
        f"Better, from the WAL: {found.remedy}",
    )
