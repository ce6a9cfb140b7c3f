"""The strategy ``lock``: writers wait, readers go on, nobody is ended.

One session per database holds an EXCLUSIVE lock on every table, which conflicts with all that writes rows (and with
SELECT … FOR UPDATE), and with no plain read. The server releases it when the session ends, so nothing can stay frozen:
the holder's death closes its socket, and the lease is the session's own ``idle_in_transaction_session_timeout``. How
the locks are taken is in ``table_locks.py``.

What is not covered, since PostgreSQL has no lock for it: ``nextval`` called by itself (an INSERT takes its table's lock
first), refreshing a materialized view, foreign tables (their rows are elsewhere); and, unless we are a superuser, new
tables and large objects, whose catalogs only a superuser may lock. The attestation reads all of these from the WAL.
Temporary tables are left alone. A prepared transaction holds its locks: it keeps the attempt from succeeding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from pg_freeze import findings, journal, table_locks
from pg_freeze.backends import Drained
from pg_freeze.entrance import entered
from pg_freeze.errors import FreezeError
from pg_freeze.findings import Around
from pg_freeze.look import rehearse
from pg_freeze.model import LOCK, Finding, Freeze, OnDrainTimeout, State
from pg_freeze.request import FreezeRequest
from pg_freeze.room import Room, room
from pg_freeze.strategies.base import Strategy

if TYPE_CHECKING:
    from pg_freeze.freeze.attempt import Attempt


class Lock(Strategy):
    """Makes writers wait, and ends nobody."""

    name = LOCK
    outlives = False

    def findings(self, around: Around) -> Iterator[Finding]:
        """Yield what keeps us from locking."""
        if around.request.on_drain_timeout is not OnDrainTimeout.ABORT:  # else nobody is ended at all
            yield from findings.signal(around)
        yield from findings.prepared(around)
        # The others are found for every strategy.
        yield from (one for one in lockable(around) if one.code not in {"unknown-database", "login-trigger"})

    def engages_within(self, request: FreezeRequest) -> timedelta:
        """Return how long: here the waiting comes first."""
        return request.drain_timeout + super().engages_within(request)

    def engage(self, attempt: Attempt) -> Freeze:
        """Lock every table, then write the row: in between nothing is left to undo but to let the locks go."""
        conn, request = attempt.conn, attempt.request
        assert attempt.connect_to is not None
        rehearse(conn)
        attempt.engaged = locks = table_locks.acquire(
            conn,
            attempt.connect_to,
            attempt.token,
            request.databases,
            timeout=request.drain_timeout,
            on_timeout=request.on_drain_timeout,
            progress=attempt.progress,
        )
        freeze = journal.record_held(
            conn,
            attempt.ticket,
            attempt.token,
            request,
            pids=locks.pids(),
            waited=timedelta(seconds=time.monotonic() - locks.waited_from),
        )
        locks.keep(request.lease)
        return freeze

    def drain(self, attempt: Attempt) -> Drained:  # noqa: ARG002  nobody is left to wait for
        """Return that nobody has to go."""
        return Drained()

    def headline(self, freeze: Freeze) -> str:
        """Return that writers wait, or do not any more."""
        if freeze.state is State.THAWED:
            return super().headline(freeze)
        if freeze.holds:
            return "is LOCKED: writers wait, readers go on"
        return "is not frozen any more: the sessions that held its locks are gone"

    def facts(self, freeze: Freeze) -> dict[str, str]:
        """Return how long the locks are kept."""
        kept = "the server ends the session that holds them when its client dies, or the lease ends"
        return {"locks": kept} if freeze.holds else {}


def lockable(around: Around) -> Iterator[Finding]:
    """Yield what keeps us from locking all tables; nothing where no way into the databases was given."""
    rooms: list[Room] = []
    for name in around.names if around.connect_to is not None else ():
        closed = list(findings.not_enterable(around.conn, [name]))
        yield from closed
        if closed or around.connect_to is None:
            continue
        try:
            with entered(around.conn, around.connect_to, name, f"look into {name!r}") as inside:
                rooms.append(room(inside))
                yield from table_locks.refused(inside, table_locks.tables_of(inside))
        except FreezeError as error:
            yield findings.refuse("not-entered", str(error), "see to it that this role can connect")
    yield from table_locks.too_few(around.names, rooms)


STRATEGY: Final = Lock()
