"""Who is connected, who lingers, and the drain that makes them go.

A lingering backend is a session of a frozen database that was there at the barrier, or was starting then: it may still
write. Nothing else is one. The journal lists them: the server's clock may have been set back since one of them began.

Ending only idle ones starves, since a busy client's next transaction begins at once and it is never seen idle; so a
session whose transaction began after the barrier is ended as well: it has no business writing. One that was in a
transaction at the barrier is left to finish it, until the drain timeout.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, LiteralString
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from pg_freeze import strategies
from pg_freeze.control import Control
from pg_freeze.errors import LeaseLost
from pg_freeze.model import Backend, Fate, Freeze, Progress

if TYPE_CHECKING:
    from pg_freeze.strategies.base import Strategy

POLL_AT_FIRST: Final = timedelta(milliseconds=2)
POLL_AT_MOST: Final = timedelta(milliseconds=100)
#: How long a terminated backend may take to be gone: it first rolls back and closes its files.
GOODBYE: Final = timedelta(seconds=10)

# One round trip a poll. The first CTE asks whether the freeze is still ours: sessions of a database that somebody has
# thawed meanwhile are not to be ended. Each poll is a transaction of its own, so that pg_stat_activity is read afresh
# (inside one it would stand still, hence the seed's pg_stat_clear_snapshot). What is terminated was seen to be idle
# by the same statement, moments before.
_LINGERING: Final[tuple[LiteralString, LiteralString]] = (
    """
    WITH held AS MATERIALIZED (
        SELECT f.token, f.barrier_at, f.roles
          FROM pgfreeze.freezes f JOIN pgfreeze.tickets t USING (ticket)
         WHERE f.token = %(token)s AND (%(ticket)s::bigint IS NULL OR (f.ticket = %(ticket)s AND t.voided_at IS NULL))
           AND f.state IN ('draining', 'frozen') AND f.lease_until > clock_timestamp()
    ), older AS MATERIALIZED (
        SELECT * FROM pgfreeze.older(%(token)s)
    ), visible AS MATERIALIZED (
        SELECT s.pid, s.datname, s.usename, s.application_name, s.state, s.backend_type, s.backend_start, s.xact_start,
               CASE WHEN NOT COALESCE(s.signalable, false) THEN 'superuser'
                    WHEN NOT %(ends_idle)s THEN 'in-transaction'
                    WHEN s.expendable THEN 'idle'
                    WHEN NOT was.in_it THEN 'began-after-barrier'
                    ELSE 'in-transaction' END AS fate,
               NOT COALESCE(s.expendable, false) AND was.in_it AS busy,
               false AS starting
          FROM held
          JOIN pgfreeze.frozen_databases d ON d.token = held.token AND d.active
          JOIN pgfreeze.sessions s ON s.datid = d.database
          LEFT JOIN older o ON o.pid = s.pid AND COALESCE(o.backend_start = s.backend_start, true)
         -- Whether the session was there at the barrier, and in the same transaction as now. Unknown counts as yes.
         CROSS JOIN LATERAL (
               SELECT held.barrier_at IS NULL OR o.pid IS NOT NULL OR s.backend_start IS NULL AS there,
                      held.barrier_at IS NULL OR s.xact_start IS NULL
                      OR COALESCE(o.xact_start = s.xact_start, false) AS in_it) AS was
         WHERE (""",
    """)
    ), lingering AS MATERIALIZED (
        SELECT * FROM visible
         UNION ALL
        SELECT s.pid, s.datname, NULL, NULL, 'starting', NULL, NULL, NULL, 'in-transaction', true, true
          FROM held JOIN pgfreeze.frozen_databases d ON d.token = held.token AND d.active
          JOIN pgfreeze.starting s ON s.datid = d.database
          JOIN older o ON o.pid = s.pid AND o.backend_start IS NULL
         WHERE %(starting)s AND s.pid NOT IN (SELECT v.pid FROM visible v)
    )
    SELECT l.pid, l.datname AS database, l.usename AS role, l.application_name AS application, l.state, l.backend_type,
           l.backend_start, clock_timestamp() - l.xact_start AS transaction_age, l.fate, l.busy,
           CASE WHEN l.fate = ANY (%(terminate)s) AND NOT l.starting THEN pg_terminate_backend(l.pid) END AS signalled
      FROM held LEFT JOIN lingering l ON true
     ORDER BY l.xact_start NULLS LAST, l.pid""",
)


@dataclass(frozen=True, slots=True)
class _Seen:
    backend: Backend
    busy: bool
    signalled: bool


# A session that was starting at the barrier may have read the settings just before, and not be in pg_stat_activity yet.
# Who begins to start later cannot: so a stream of new ones keeps nobody waiting.
_STARTING: Final[LiteralString] = "SELECT EXISTS (SELECT FROM pgfreeze.older(%s) o WHERE o.backend_start IS NULL)"
#: The state of a session that has not finished starting: its role is not known yet, and whether we may end it neither.
STARTING: Final = "starting"


def _look(
    conn: Control, token: UUID, ticket: int | None, strategy: Strategy, terminate: tuple[Fate, ...] = ()
) -> tuple[_Seen, ...]:
    before, after = _LINGERING
    with conn.cursor(row_factory=dict_row) as cur:
        # prepare=True: the same statement for every poll, planned once.
        cur.execute(
            before + strategy.lingers + after,
            {
                "token": token,
                "ticket": ticket,
                "terminate": [fate.value for fate in terminate],
                "starting": strategy.ends_starting,
                "ends_idle": strategy.ends_idle,
            },
            prepare=True,
        )
        rows = cur.fetchall()
    if not rows:
        raise LeaseLost(
            "the freeze is no longer ours: it was resumed, its lease ended, or a newer attempt took it over. "
            "See `pg-freeze history`; nothing was left frozen by this attempt"
        )
    return tuple(_seen(row) for row in rows if row["pid"] is not None)


def _seen(row: dict[str, Any]) -> _Seen:
    busy, signalled = row.pop("busy"), row.pop("signalled")
    return _Seen(Backend(**{**row, "fate": Fate(row["fate"])}), busy, bool(signalled))


# Any client may take its time to start (post_auth_delay), or be kept by a lock on a catalog. It has done nothing yet,
# and would be ended as idle. A statement of its own for each: whose it is shows only in whether we may.
_END_STARTING: Final[LiteralString] = """
    SELECT pg_terminate_backend(s.pid) FROM pgfreeze.starting s
      JOIN pgfreeze.frozen_databases d ON d.database = s.datid AND d.token = %s WHERE s.pid = %s"""


def _end_starting(conn: Control, token: UUID, seen: Sequence[_Seen], told: set[int]) -> int:
    """End who has not finished starting, each once, and return how many that were."""
    ended = 0
    for one in seen:
        if one.backend.state == STARTING and one.backend.backend_start is None and one.backend.pid not in told:
            told.add(one.backend.pid)
            with suppress(psycopg.errors.InsufficientPrivilege):  # a superuser's: named when the time is up
                ended += conn.execute(_END_STARTING, (token, one.backend.pid)).fetchone() == (True,)
    return ended


def lingering(conn: Control, freeze: Freeze) -> tuple[Backend, ...]:
    """Return the sessions that were there at the barrier of this freeze, oldest transaction first. Ends nobody.

    :raises LeaseLost: if the freeze does not hold any more: then the answer would mean nothing.
    """
    return tuple(seen.backend for seen in _look(conn, freeze.token, None, strategies.of(freeze.strategy)))


@dataclass(slots=True)
class Drained:
    """How a drain ended: sessions terminated by reason, and those left."""

    terminated: Counter[str] = field(default_factory=Counter)
    left: tuple[Backend, ...] = ()
    timed_out: bool = False


def drain(
    conn: Control,
    token: UUID,
    ticket: int,
    strategy: Strategy,
    timeout: timedelta,
    *,
    terminate_at_timeout: bool,
    progress: Callable[[Progress], None] | None = None,
) -> Drained:
    """Make lingering backends go, and return when none is left but those that we may not end.

    Idle sessions, aborted transactions and whatever began after the barrier end at once; a transaction that was open
    at the barrier may go on until *timeout*. Then it is terminated too, or left, as asked.

    :raises LeaseLost: if the freeze is thawed or taken over meanwhile.
    """
    done = Drained()
    counted: set[tuple[int, datetime | None]] = set()
    at_once = (Fate.IDLE, Fate.AFTER_BARRIER)
    start, poll = time.monotonic(), POLL_AT_FIRST.total_seconds()
    limit = timeout.total_seconds()
    told: set[int] = set()
    starting = conn.execute(_STARTING, (token,)).fetchone() == (True,)
    while True:
        elapsed = time.monotonic() - start
        late = elapsed >= limit
        everyone = late and terminate_at_timeout
        seen = _look(conn, token, ticket, strategy, (*at_once, Fate.WAITS) if everyone else at_once)
        if ended := _end_starting(conn, token, seen, told):
            done.terminated[Fate.IDLE.value] += ended
        for one in seen:
            key = (one.backend.pid, one.backend.backend_start)
            if one.signalled and key not in counted:
                counted.add(key)
                done.terminated["drain-timeout" if one.backend.fate is Fate.WAITS else one.backend.fate.value] += 1
        done.left = tuple(one.backend for one in seen)
        # A superuser's idle session will never go, so nobody waits for it; his open transaction may end.
        waiting = [one for one in seen if one.backend.fate is not Fate.CANNOT_END or (one.busy and not everyone)]
        if progress is not None:
            progress(Progress(timedelta(seconds=elapsed), timedelta(seconds=max(0.0, limit - elapsed)), done.left))
        if not waiting and starting:
            # All have started, perhaps after pg_stat_activity was read and before the locks were: look again.
            starting = False
            continue
        if not waiting:
            return done
        if late and (not terminate_at_timeout or elapsed >= limit + GOODBYE.total_seconds()):
            done.timed_out = True
            return done
        time.sleep(poll if late else min(poll, max(0.0, limit - elapsed)))
        poll = min(poll * 1.5, POLL_AT_MOST.total_seconds())
