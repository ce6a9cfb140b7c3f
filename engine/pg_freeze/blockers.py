"""Who holds what keeps us from locking every table, and what can be done about it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from pg_freeze.control import Control
from pg_freeze.errors import DrainTimeout
from pg_freeze.model import Backend, Fate

log = logging.getLogger(__name__)

#: The modes of which our EXCLUSIVE locks have to wait.
CONFLICTING: Final = (
    "RowShareLock",
    "RowExclusiveLock",
    "ShareUpdateExclusiveLock",
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
)

# Who is in the way: holds a lock that conflicts with ours, on a table that we want.
_BLOCKERS: Final[LiteralString] = """
    SELECT a.pid, a.datname AS database, a.usename AS role, a.application_name AS application, a.state, a.backend_type,
           a.backend_start, clock_timestamp() - a.xact_start AS transaction_age,
           COALESCE(s.signalable, false) AS signalable
      FROM pg_stat_activity a LEFT JOIN pgfreeze.sessions s ON s.pid = a.pid
     WHERE a.pid IN (SELECT l.pid FROM pg_locks l JOIN pg_database d ON d.oid = l.database
                      WHERE l.locktype = 'relation' AND l.granted AND l.mode = ANY (%(modes)s) AND l.relation >= 16384
                        AND d.datname::text = ANY (%(names)s))
       AND a.pid <> ALL (%(ours)s) AND a.backend_type IS DISTINCT FROM 'autovacuum worker'
     ORDER BY a.xact_start NULLS LAST"""
_PREPARED: Final[LiteralString] = """
    SELECT gid FROM pg_prepared_xacts WHERE database::text = ANY (%s) ORDER BY 1"""


def blockers_of(conn: Control, databases: Sequence[str], ours: Sequence[int]) -> list[tuple[Backend, bool]]:
    """Return the sessions that hold what we want to lock, oldest transaction first, and whether we may end each."""
    wanted: dict[str, Any] = {"modes": list(CONFLICTING), "names": list(databases), "ours": list(ours)}
    found: list[tuple[Backend, bool]] = []
    with conn.cursor(row_factory=dict_row) as cur:
        for row in cur.execute(_BLOCKERS, wanted):
            signalable = row.pop("signalable")
            found.append((Backend(**row, fate=Fate.WAITS if signalable else Fate.CANNOT_END), signalable))
    return found


def terminate(conn: Control, blockers: Sequence[tuple[Backend, bool]]) -> int:
    """End those that we may end; return how many."""
    pids = [backend.pid for backend, signalable in blockers if signalable]
    rows = conn.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::integer[]) pid", (pids,)).fetchall()
    return sum(bool(row[0]) for row in rows)


def not_locked(conn: Control, databases: Sequence[str], left: Sequence[Backend], timeout: timedelta) -> DrainTimeout:
    """Return the error that names whoever was in the way to the last."""
    prepared = [row[0] for row in conn.execute(_PREPARED, (list(databases),))]
    who = "; ".join(map(str, left[:10])) or "nobody is seen"
    also = f". Prepared transactions hold locks, too: {', '.join(map(repr, prepared))}" if prepared else ""
    return DrainTimeout(
        f"the tables could not be locked within {timeout.total_seconds():g} s; in the way: {who}{also}. Everything was "
        "released. Give a longer drain timeout, or on_drain_timeout=terminate",
        tuple(left),
    )


# Autovacuum gives way to whoever has waited for deadlock_timeout, which our attempts never do.
_AUTOVACUUMED: Final[LiteralString] = """
    SELECT n.nspname, c.relname
      FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid JOIN pg_class c ON c.oid = l.relation
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE a.backend_type = 'autovacuum worker' AND a.datname = current_database() AND l.locktype = 'relation'
       AND l.granted AND l.mode = ANY (%s) AND c.relkind = 'r' AND l.relation >= 16384"""


def make_autovacuum_yield(sessions: Sequence[Control], deadlock_timeout: float) -> None:
    """Wait for what autovacuum works on, one table at a time and holding nothing else, until it gives way."""
    for session in sessions:
        for schema, table in session.execute(_AUTOVACUUMED, (list(CONFLICTING),)).fetchall():
            try:
                session.execute(
                    sql.SQL(
                        "BEGIN; SET LOCAL lock_timeout = {}; LOCK TABLE ONLY {} IN SHARE UPDATE EXCLUSIVE MODE"
                    ).format(sql.Literal(int(deadlock_timeout * 1500)), sql.Identifier(schema, table))
                )
            except psycopg.Error as error:
                log.info("Autovacuum of %r.%r does not give way: %r", schema, table, str(error))
            finally:
                session.execute("ROLLBACK")
