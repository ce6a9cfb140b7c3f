"""Locks on every table of several databases: all of them, or none.

The application is never the victim of a deadlock with us. A session of its that waits looks for a deadlock once, when
it has waited for ``deadlock_timeout``, and is the victim if it finds one. It can only be part of one if it waits for a
lock that we hold or queue for, so not since before we began to; therefore an attempt on all tables of all databases,
from the first queued lock to the last, is over in less than ``deadlock_timeout``, or gives everything back. What was in
its way comes first in the next attempt, when nothing is held yet. Between attempts everybody works.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, LiteralString
from uuid import UUID

import psycopg
from psycopg import sql

from pg_freeze import findings
from pg_freeze.backends import GOODBYE
from pg_freeze.blockers import CONFLICTING, blockers_of, make_autovacuum_yield, not_locked, terminate
from pg_freeze.control import ConnectTo, Control
from pg_freeze.entrance import enter
from pg_freeze.errors import FreezeRefused
from pg_freeze.model import Finding, OnDrainTimeout, Progress
from pg_freeze.room import Room, room
from pg_freeze.strategies.base import Engaged

#: The share of deadlock_timeout that an attempt may take, over all its databases.
SHARE: Final = 0.7
#: Seconds to wait for old transactions between two attempts, and what is old.
_LULL: Final = 3.0
_OLD: Final = timedelta(seconds=0.3)
_RECORDED_WITHIN: Final = timedelta(seconds=15)

# Partition roots stand for their leaves, since LOCK TABLE goes down to them. What others hold now in a mode that is in
# our way comes first: whoever has to be waited for is waited for while we hold nothing.
_TABLES: Final[LiteralString] = """
    WITH held AS (
        SELECT COALESCE(pg_partition_root(l.relation), l.relation) AS relation, count(*) AS n
          FROM pg_locks l
         WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid() AND l.mode = ANY (%s)
           AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
         GROUP BY 1
    )
    SELECT n.nspname, c.relname,
           -- LOCK TABLE looks the name up, for which pg_maintain alone gives no right.
           has_schema_privilege(n.oid, 'USAGE') AND (
               has_table_privilege(c.oid, 'UPDATE') OR has_table_privilege(c.oid, 'DELETE')
               OR has_table_privilege(c.oid, 'TRUNCATE')
               OR current_setting('server_version_num')::integer >= 170000
                  AND has_table_privilege(c.oid, CASE WHEN current_setting('server_version_num')::integer >= 170000
                                                      THEN 'MAINTAIN' ELSE 'UPDATE' END)) AS lockable
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN held ON held.relation = c.oid
     WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND NOT c.relispartition
       AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pgfreeze')
       AND n.nspname NOT LIKE 'pg\\_toast%%'
     ORDER BY held.n DESC NULLS LAST, c.oid"""
_UNLOCKED: Final[LiteralString] = """
    SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
       AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pgfreeze')
       AND n.nspname NOT LIKE 'pg\\_toast%'
       AND NOT EXISTS (SELECT FROM pg_locks l
                        WHERE l.locktype = 'relation' AND l.pid = pg_backend_pid() AND l.relation = c.oid
                          AND l.mode = 'ExclusiveLock'
                          AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))
     ORDER BY 1"""
# LOCK TABLE takes a name, which may be a view's by then, and locks all that the view reads: with pg_maintain also what
# the whole server works with.
_OTHERS: Final[LiteralString] = """
    SELECT l.relation::regclass::text FROM pg_locks l
     WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND l.mode = 'ExclusiveLock'
       AND NOT EXISTS (SELECT FROM pg_class c
                        WHERE c.oid = l.relation AND c.relkind IN ('r', 'p', 'f') AND NOT c.relisshared)
     ORDER BY 1"""
# For what is asked under the locks: nobody can write meanwhile.
_UNDER_LOCKS: Final[LiteralString] = "SET LOCAL statement_timeout = '5s'; SET LOCAL lock_timeout = '1s'"


@dataclass(slots=True)
class Locks(Engaged):
    """The sessions that hold the locks, one per database. Closing them releases everything at once."""

    sessions: list[Control] = field(default_factory=list)
    terminated: int = 0
    waited_from: float = 0.0

    def pids(self) -> list[int]:
        """Return the server processes that hold the locks."""
        return [session.info.backend_pid for session in self.sessions]

    def keep(self, lease: timedelta) -> None:
        """Let the server end the sessions, and so release the locks, after *lease* without a statement."""
        for session in self.sessions:
            session.execute(
                "SELECT set_config('idle_in_transaction_session_timeout', %s, false)", (str(_milliseconds(lease)),)
            )

    def unlocked(self) -> tuple[str, ...] | None:
        """Return the tables that were made under the locks, and so could be written.

        :returns: None if a session is gone, or could not answer: an error in its transaction releases its locks.
        """
        found: list[str] = []
        for session in self.sessions:
            try:
                found += [name for (name,) in session.execute(_UNLOCKED)]
            except psycopg.Error:
                return None
        return tuple(found)

    def release(self) -> None:
        """Give back all locks: everybody who waited goes on in the same moment."""
        for session in self.sessions:
            session.close()
        self.sessions.clear()


def acquire(
    conn: Control,
    connect_to: ConnectTo,
    token: UUID,
    databases: Sequence[str],
    *,
    timeout: timedelta,
    on_timeout: OnDrainTimeout,
    progress: Callable[[Progress], None] | None = None,
) -> Locks:
    """Lock every table of the databases, all or none; try again until *timeout*.

    :param conn: a control connection, to see who is in the way.
    :param on_timeout: at *timeout* ``terminate`` whoever is in the way, or ``abort``.
    :raises FreezeRefused: if a right is missing, or the server has too few locks.
    :raises DrainTimeout: with the sessions that were in the way; everything was released.
    """
    locks = Locks()
    start = time.monotonic()
    limit = timeout.total_seconds()
    try:
        for name in databases:
            locks.sessions.append(_session(conn, connect_to, name, token))
        deadlock_timeout = _deadlock_timeout(locks.sessions)
        while True:
            locks.waited_from = time.monotonic()
            if _attempt(locks.sessions, deadlock_timeout * SHARE):
                return locks
            elapsed = time.monotonic() - start
            blockers = blockers_of(conn, databases, locks.pids())
            if progress is not None:
                left = timedelta(seconds=max(0.0, limit - elapsed))
                progress(Progress(timedelta(seconds=elapsed), left, tuple(backend for backend, _ in blockers)))
            if elapsed >= limit:
                if on_timeout is OnDrainTimeout.ABORT or elapsed >= limit + GOODBYE.total_seconds():
                    raise not_locked(conn, databases, [backend for backend, _ in blockers], timeout)
                locks.terminated += terminate(conn, blockers)
            make_autovacuum_yield(locks.sessions, deadlock_timeout)
            # Everybody works meanwhile. At random, or a client of the same rhythm would always be in the way.
            time.sleep(random.uniform(0.02, 0.15))  # noqa: S311 - no secret
            _await_long_ones(conn, databases, locks.pids(), min(time.monotonic() + _LULL, start + limit))
    except BaseException:
        locks.release()
        raise


def _await_long_ones(conn: Control, databases: Sequence[str], ours: Sequence[int], deadline: float) -> None:
    """Wait until nobody whose transaction is an old one holds a lock, or until *deadline*.

    While an attempt waits for him, others queue behind it with locks of their own, so that it could not get the rest
    once he is gone.
    """
    while time.monotonic() < deadline:
        blockers = [backend for backend, _ in blockers_of(conn, databases, ours)]
        if not any(one.transaction_age is not None and one.transaction_age > _OLD for one in blockers):
            return
        time.sleep(0.005)


def _milliseconds(time: timedelta) -> int:
    # The setting is a 32-bit integer. A longer lease is the dead-man switch's.
    return min(max(1, int(time.total_seconds() * 1000)), 2**31 - 1)


def _session(conn: Control, connect_to: ConnectTo, name: str, token: UUID) -> Control:
    session = enter(conn, connect_to, name, f"pg-freeze lock {token}")
    try:
        for setting, value in (
            # Until the freeze is in the journal nobody would know whose locks these are.
            ("idle_in_transaction_session_timeout", str(_milliseconds(_RECORDED_WITHIN))),
            ("tcp_keepalives_idle", "10"),
            ("tcp_keepalives_interval", "5"),
            ("tcp_keepalives_count", "3"),
        ):
            session.execute("SELECT set_config(%s, %s, false)", (setting, value))
    except BaseException:
        session.close()
        raise
    return session


def tables_of(session: Control) -> list[tuple[str, str, bool]]:
    """Return schema and name of each table to lock, in that order, and whether our role may."""
    return session.execute(_TABLES, (list(CONFLICTING),)).fetchall()


def not_lockable(tables: Sequence[tuple[str, str, bool]]) -> tuple[str, ...]:
    """Return those of the tables that our role may not lock."""
    return tuple(f"{schema}.{table}" for schema, table, may in tables if not may)


def refused(session: Control, found: Sequence[tuple[str, str, bool]]) -> Iterator[Finding]:
    """Yield that our role may not lock some of the tables that were found in the database of *session*."""
    tables, role = not_lockable(found), session.info.user
    if tables:
        yield findings.refuse(
            "not-lockable",
            f"role {role!r} may not lock {len(tables)} table(s) of {session.info.dbname!r}, such as {tables[0]}",
            f"GRANT pg_maintain, pg_read_all_data TO {role}; (17 and newer) or GRANT pg_write_all_data TO {role};",
        )


def too_few(databases: Sequence[str], rooms: Sequence[Room]) -> Iterator[Finding]:
    """Yield that the server has fewer locks than these databases have tables."""
    tables = sum(one.tables for one in rooms)
    if rooms and tables > rooms[0].left:
        yield findings.refuse(
            "too-few-locks",
            f"{', '.join(map(repr, databases))}: {tables} tables, and the server has room for about {rooms[0].left} "
            "more locks",
            f"ALTER SYSTEM SET max_locks_per_transaction = {rooms[0].setting_for(tables)}; and restart, or use the "
            "strategy read-only",
        )


def _deadlock_timeout(sessions: Sequence[Control]) -> float:
    """Return deadlock_timeout in seconds, after a check that the server has enough locks.

    :raises FreezeRefused: saying what to set.
    """
    rooms = [room(session) for session in sessions]
    findings.check(tuple(too_few([session.info.dbname for session in sessions], rooms)))
    return min(one.deadlock_timeout for one in rooms)


def _attempt(sessions: Sequence[Control], budget: float) -> bool:
    """Try once to lock all tables of all databases within *budget* seconds; give back everything if that fails."""
    wanted = [tuple(_statements(session)) for session in sessions]
    deadline = time.monotonic() + budget
    patience = budget
    try:
        for session, statements in zip(sessions, wanted, strict=True):
            session.execute("BEGIN")
            for statement in statements:
                left = max(1, int((deadline - time.monotonic()) * 1000))
                # One round trip. Both timeouts: many short waits in a row count, too.
                session.execute(
                    sql.SQL("SET LOCAL statement_timeout = {}; SET LOCAL lock_timeout = {}; {}").format(
                        sql.Literal(left), sql.Literal(max(1, int(patience * 1000))), statement
                    )
                )
                patience = min(patience, budget / 7)
            session.execute(_UNDER_LOCKS)
            _check_tables_only(session)
            if time.monotonic() > deadline:
                raise psycopg.errors.QueryCanceled("the attempt took too long")
    except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled, psycopg.errors.DeadlockDetected):
        for session in sessions:
            session.execute("ROLLBACK")
        return False
    return True


def _check_tables_only(session: Control) -> None:
    """Raise FreezeRefused if something other than tables was locked."""
    others = [name for (name,) in session.execute(_OTHERS)]
    if others:
        raise FreezeRefused(
            f"a table of {session.info.dbname!r} was replaced by a view while the tables were being locked, and all "
            f"that it reads was locked, too: {', '.join(map(repr, others[:5]))}. Everything was released: try again"
        )


def _statements(session: Control) -> Iterator[sql.Composed | sql.SQL]:
    """Yield what locks the tables of a database: first the one that others hold most, on which we may wait for long.

    Once we hold that one, whoever is in the way of the rest may himself wait for it: to wait longer would not help.
    """
    rows = tables_of(session)
    findings.check(tuple(refused(session, rows)))
    names = [sql.Identifier(schema, table) for schema, table, _ in rows]
    for some in (names[:1], names[1:]):
        if some:
            yield sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(sql.SQL(", ").join(some))
    if room(session).superuser:
        # With these two, new tables and large objects wait as well.
        yield sql.SQL("LOCK TABLE pg_catalog.pg_class, pg_catalog.pg_largeobject IN SHARE MODE")
