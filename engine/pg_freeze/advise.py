"""Which strategy, and why: a pure function of what is seen, and the look at the server that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, LiteralString

from pg_freeze.control import Connect, ConnectTo, control
from pg_freeze.entrance import entered
from pg_freeze.errors import FreezeError
from pg_freeze.model import DRAIN_TIMEOUT, LOCK, READ_ONLY
from pg_freeze.names import quoted
from pg_freeze.request import names_of
from pg_freeze.room import Room, room
from pg_freeze.table_locks import not_lockable, tables_of

# Application names under which poolers themselves connect, to look after their servers.
_POOLERS: Final = ("pgbouncer", "pgcat", "odyssey", "pgpool")

_SESSIONS: Final[LiteralString] = """
    SELECT count(*) FILTER (WHERE backend_type = 'client backend' OR backend_type IS NULL),
           max(clock_timestamp() - xact_start) FILTER (WHERE backend_type = 'client backend' OR backend_type IS NULL),
           array_agg(DISTINCT application_name)
      FROM pg_stat_activity WHERE datname::text = ANY (%s)"""
_CLOSED: Final[LiteralString] = """
    SELECT datname::text FROM pg_database
     WHERE datname::text = ANY (%s) AND NOT has_database_privilege(oid, 'CONNECT')"""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the choice depends on."""

    role: str
    closed_to_us: tuple[str, ...] = ()
    unreachable: tuple[str, ...] = ()
    not_lockable: tuple[str, ...] = ()
    tables: int = 0
    locks_left: int = 0
    locks_setting: int = 0
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
    against = tuple(_against_locks(seen))
    strategy = READ_ONLY if against else LOCK
    notes = []
    if seen.longest_transaction is not None and seen.longest_transaction > drain_timeout:
        notes.append(
            f"a transaction is open for {seen.longest_transaction.total_seconds():.0f} s already: a freeze waits for "
            f"one that has written for {drain_timeout.total_seconds():g} s, then ends it. Give a longer drain timeout, "
            "or freeze at another time"
        )
    if against:
        notes.append(f"{seen.sessions} session(s) would be ended; their clients must connect again")
        return Advice(strategy, against, tuple(notes))
    if seen.pooler is not None:
        notes.append(
            f"{seen.pooler} is in front: a client that waits for a lock keeps its server connection, so that with all "
            "of them waiting readers queue, too. Keep the freeze short"
        )
    if not seen.superuser:
        notes.append("only a superuser's locks stop new tables and large objects, too; the attestation tells of any")
    reasons = (
        f"writers only wait, and none of {seen.sessions} session(s) is ended",
        f"{seen.tables} table(s) can be locked: role {quoted(seen.role)} may, and the server has room",
    )
    return Advice(strategy, reasons, tuple(notes))


def _against_locks(seen: Seen) -> list[str]:
    role = quoted(seen.role)
    found = [
        f"role {role} may not connect to {name!r}: GRANT CONNECT ON DATABASE {quoted(name)} TO {role};"
        for name in seen.closed_to_us
    ]
    found += [f"no connection could be had: {said}" for said in seen.unreachable]
    if seen.not_lockable:
        found.append(
            f"role {role} may not lock {len(seen.not_lockable)} table(s), such as {seen.not_lockable[0]}: "
            f"GRANT pg_maintain, pg_read_all_data TO {role}; (17 and newer) or GRANT pg_write_all_data TO {role};"
        )
    if seen.tables > seen.locks_left:
        found.append(
            f"{seen.tables} tables, and the server has room for about {seen.locks_left} more locks: ALTER SYSTEM SET "
            f"max_locks_per_transaction = {seen.locks_setting}; and restart"
        )
    return found


def advise(
    connect: Connect, connect_to: ConnectTo, *, databases: Sequence[str], drain_timeout: timedelta = DRAIN_TIMEOUT
) -> Advice:
    """Look at the databases, and return which strategy to use for them, and why. Changes nothing."""
    names = names_of(databases, "anybody")
    unreachable: list[str] = []
    refused: list[str] = []
    rooms: list[Room] = []
    with control(connect, "look around") as conn:
        row = conn.execute(_SESSIONS, (list(names),)).fetchone()
        closed = [name for (name,) in conn.execute(_CLOSED, (list(names),))]
        role = conn.info.user
        for name in names:
            if name in closed:
                continue
            try:
                with entered(conn, connect_to, name, f"look into {name!r}") as inside:
                    rooms.append(room(inside))
                    refused += not_lockable(tables_of(inside))
            except FreezeError as error:
                unreachable.append(str(error))
    assert row is not None
    sessions, longest, applications = row
    tables = sum(one.tables for one in rooms)
    return choose(
        Seen(
            role=role,
            closed_to_us=tuple(closed),
            unreachable=tuple(unreachable),
            not_lockable=tuple(refused),
            tables=tables,
            locks_left=rooms[0].left if rooms else 0,
            locks_setting=rooms[0].setting_for(tables) if rooms else 0,
            superuser=bool(rooms) and rooms[0].superuser,
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
