"""Which strategy, and why: a pure function of what is seen, and the look at the server that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, LiteralString

from pg_freeze.control import Connect, ConnectTo, control
from pg_freeze.findings import Around, our_role
from pg_freeze.model import DRAIN_TIMEOUT, LOCK, READ_ONLY
from pg_freeze.names import quoted
from pg_freeze.request import FreezeRequest
from pg_freeze.strategies.lock import lockable

# Application names under which poolers themselves connect, to look after their servers.
_POOLERS: Final = ("pgbouncer", "pgcat", "odyssey", "pgpool")

_SESSIONS: Final[LiteralString] = """
    SELECT count(*) FILTER (WHERE backend_type = 'client backend' OR backend_type IS NULL),
           max(clock_timestamp() - xact_start) FILTER (WHERE backend_type = 'client backend' OR backend_type IS NULL),
           array_agg(DISTINCT application_name)
      FROM pg_stat_activity WHERE datname::text = ANY (%s)"""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the choice depends on."""

    role: str
    against: tuple[str, ...] = ()
    superuser: bool = False
    sessions: int = 0
    longest_transaction: timedelta | None = None
    pooler: str | None = None


@dataclass(frozen=True, slots=True)
class Advice:
    """A strategy with the reasons for it, and what to know before."""

    strategy: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the advice as JSON-ready values."""
        return {"strategy": self.strategy, "reasons": list(self.reasons), "notes": list(self.notes)}


def choose(seen: Seen, drain_timeout: timedelta = DRAIN_TIMEOUT) -> Advice:
    """Return the strategy to use: ``lock``, which ends nobody, unless something keeps it from working."""
    strategy = READ_ONLY if seen.against else LOCK
    notes = []
    if seen.longest_transaction is not None and seen.longest_transaction > drain_timeout:
        notes.append(
            f"a transaction is open for {seen.longest_transaction.total_seconds():.0f} s already: a freeze waits for "
            f"one that has written for {drain_timeout.total_seconds():g} s, then ends it. Give a longer drain timeout, "
            "or freeze at another time"
        )
    if seen.against:
        notes.append(f"{seen.sessions} session(s) would be ended; their clients must connect again")
        return Advice(strategy, seen.against, tuple(notes))
    if seen.pooler is not None:
        notes.append(
            f"{seen.pooler} is in front: a client that waits for a lock keeps its server connection, so that with all "
            "of them waiting readers queue, too. Keep the freeze short"
        )
    if not seen.superuser:
        notes.append("only a superuser's locks stop new tables and large objects, too; the attestation tells of any")
    reasons = (
        f"writers only wait, and none of {seen.sessions} session(s) is ended",
        f"all tables can be locked: role {quoted(seen.role)} may, and the server has room",
    )
    return Advice(strategy, reasons, tuple(notes))


def advise(
    connect: Connect, connect_to: ConnectTo, *, databases: Sequence[str], drain_timeout: timedelta = DRAIN_TIMEOUT
) -> Advice:
    """Look at the databases, and return which strategy to use for them, and why. Changes nothing."""
    wanted = FreezeRequest.of(databases, "anybody", strategy=LOCK)
    with control(connect, "look around") as conn:
        row = conn.execute(_SESSIONS, (list(wanted.databases),)).fetchone()
        around = Around(conn, connect_to, wanted, our_role(conn))
        against = tuple(f"{one.message}: {one.remedy}" for one in lockable(around))
    assert row is not None
    sessions, longest, applications = row
    return choose(
        Seen(
            role=around.role["name"],
            against=against,
            superuser=around.role["rolsuper"],
            sessions=sessions,
            longest_transaction=longest,
            pooler=_pooler(applications or ()),
        ),
        drain_timeout,
    )


def _pooler(applications: Sequence[str | None]) -> str | None:
    """Return the pooler that the application names tell of. Most do not tell: they pass on their clients' names."""
    for name in applications:
        for pooler in _POOLERS:
            if name and pooler in name.lower():
                return pooler
    return None
