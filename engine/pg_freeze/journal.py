"""The only reader and writer of the journal: freezes, tickets, leases and history.

The tables and the routines that must be atomic, or must outlive this process, are in ``sql/``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, LiteralString, NamedTuple, TypeVar
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from pg_freeze import blockers
from pg_freeze.control import Control, unhurried
from pg_freeze.dead_man import watched
from pg_freeze.errors import NOT_ALL_THAWED, ThawFailed
from pg_freeze.model import Admit, Backend, Freeze, State, Strategy
from pg_freeze.request import PauseRequest


class Ticket(NamedTuple):
    """The number drawn by one attempt, and whether it may still act."""

    number: int
    valid: bool


#: An answer of the server's clock that took longer than this may be as old as it took.
_PROMPT: Final = timedelta(milliseconds=250)


def server_time(conn: Control, moment: float) -> datetime:
    """Return a past *moment* of ``time.monotonic()`` by the server's clock: never later than it was, but for 0.25 s.

    Asked early, it is not falsified by what holds up this process, or its statements, from then on.
    """
    asked = time.monotonic()
    row = conn.execute("SELECT clock_timestamp()").fetchone()
    answered = time.monotonic()
    assert row is not None
    now: datetime = row[0]
    return now - timedelta(seconds=(asked if answered - asked < _PROMPT.total_seconds() else answered) - moment)


def draw_ticket(
    conn: Control, act: str, holder: str, databases: Sequence[str], began: datetime | None = None
) -> Ticket:
    """Draw a ticket, and void all earlier ones of this holder for any of these databases.

    :param act: ``pause`` or ``resume``; the ticket of a resume is void from birth.
    :param began: when this attempt began, by the server's clock; now by default. One that began before its
        holder resumed, or before a newer attempt that has drawn its ticket, gets a void one.
    """
    row = conn.execute(
        "SELECT ticket, voided_at IS NULL FROM pgfreeze.draw_ticket(%s, %s, %s, %s)",
        (act, holder, list(databases), began),
    ).fetchone()
    assert row is not None
    return Ticket(*row)


_COLUMNS: Final[LiteralString] = """
    SELECT f.token, f.ticket, f.holder, f.databases, f.strategy, f.roles, f.admit, f.state, f.requested_at,
           pgfreeze.locked(f.sessions) OR f.state NOT IN ('draining', 'frozen') AS locked,
           f.lease_until, f.barrier_at, f.drained_at, f.frozen_at, f.checkpoint_at, f.checkpoint_lsn::text,
           f.restored_at, f.thawed_at, f.thawed_by, f.terminated, f.lingering, f.warnings, f.readers_ended,
           CASE f.state WHEN 'thawing' THEN f.left_over ELSE '[]' END AS left_over,
           (SELECT COALESCE(jsonb_agg(to_jsonb(k) - 'token' || jsonb_build_object('there', CASE k.pid
                        WHEN 0 THEN EXISTS (SELECT FROM pg_prepared_xacts p
                                             WHERE p.gid = k.application AND p.database = k.database)
                        ELSE EXISTS (SELECT FROM pg_stat_get_activity(k.pid) a WHERE a.backend_start = k.backend_start)
                        END) ORDER BY k.seen_at), '[]')
              FROM pgfreeze.blockers k WHERE k.token = f.token) AS in_the_way,
           ARRAY(SELECT b.name FROM pgfreeze.frozen_databases b
                  WHERE b.token = f.token
                    AND b.database NOT IN (SELECT oid FROM pg_database WHERE datconnlimit <> -2)) AS dropped,
           m.pid AS dead_man_pid
      FROM """
_DEAD_MAN: Final[LiteralString] = """ f
      LEFT JOIN LATERAL (SELECT pid FROM pgfreeze.dead_men() d
                          WHERE d.token = f.token AND f.state <> 'thawed' LIMIT 1) m ON true"""
_FREEZES: Final[LiteralString] = _COLUMNS + "pgfreeze.freezes" + _DEAD_MAN


def _freeze(row: dict[str, Any]) -> Freeze:
    return Freeze(
        **{
            **row,
            "databases": tuple(row["databases"]),
            "roles": tuple(row["roles"]),
            "strategy": Strategy(row["strategy"]),
            "admit": Admit(row["admit"]),
            "state": State(row["state"]),
            "lingering": tuple(row["lingering"]),
            "warnings": tuple(row["warnings"]),
            "left_over": tuple(row["left_over"]),
            "in_the_way": tuple(map(blockers.explained, row["in_the_way"])),
            "dropped": tuple(row["dropped"]),
        }
    )


def active(conn: Control, databases: Sequence[str] | None = None, *, former: bool = False) -> tuple[Freeze, ...]:
    """Return the freezes that are not thawed to the end, of any of *databases* or of all, oldest first.

    :param former: also those of a database that was renamed while it was frozen, although there is another one under
        its former name now: unless that is frozen itself.
    :raises psycopg.errors.LockNotAvailable: while somebody has locked the journal, with what to type if that is a
        prepared transaction.
    """
    wanted: LiteralString = """
     WHERE f.state <> 'thawed' AND (%(names)s::text[] IS NULL OR EXISTS (
           SELECT FROM pgfreeze.frozen_databases b LEFT JOIN pg_database d ON d.oid = b.database
            WHERE b.token = f.token AND (d.datname::text = ANY (%(names)s)
               -- By its former name only if that is no other database's now.
               OR b.name = ANY (%(names)s)
                  AND NOT EXISTS (SELECT FROM pg_database o
                                   WHERE o.datname::text = b.name AND o.oid <> b.database
                                     AND NOT (%(former)s AND d.oid IS NOT NULL
                                              AND NOT EXISTS (SELECT FROM pgfreeze.frozen_databases n
                                                               WHERE n.database = o.oid AND n.active))))))
     ORDER BY f.requested_at"""
    with conn.cursor(row_factory=dict_row) as cur:
        try:
            cur.execute(_FREEZES + wanted, {"names": None if databases is None else list(databases), "former": former})
        except psycopg.errors.LockNotAvailable as error:
            raise psycopg.errors.LockNotAvailable(f"{error}{blockers.prepared(conn)}") from error
        return tuple(_freeze(row) for row in cur)


def _one(conn: Control, query: LiteralString, given: Sequence[Any]) -> Freeze | None:
    with conn.cursor(row_factory=dict_row) as cur:
        row = cur.execute(query, given).fetchone()
    return None if row is None else _freeze(row)


def by_token(conn: Control, token: UUID) -> Freeze:
    """Return one freeze. A token that was never journalled is a programming error: KeyError."""
    freeze = _one(conn, _FREEZES + " WHERE f.token = %s", (token,))
    if freeze is None:
        raise KeyError(token)
    return freeze


def newest(conn: Control, limit: int) -> tuple[Freeze, ...]:
    """Return the last *limit* freezes, newest first."""
    with conn.cursor(row_factory=dict_row) as cur:
        cur.execute(_FREEZES + " ORDER BY f.requested_at DESC LIMIT %s", (limit,))
        return tuple(_freeze(row) for row in cur)


# Two writers of one pg_database row ("tuple concurrently updated", which has no better SQLSTATE), and a deadlock with
# one: somebody else's GRANT or ALTER DATABASE came in between, and is over by the next try.
_COLLISIONS: Final = ("XX000", "40P01")
_IN_THE_WAY: Final = (*_COLLISIONS, "55P03")
_Result = TypeVar("_Result")


def _persistent(change: Callable[[], _Result]) -> _Result:
    for _ in range(4):
        try:
            return change()
        except psycopg.Error as error:
            if error.sqlstate not in _COLLISIONS:
                raise
            time.sleep(0.05)
    return change()


# What changes a freeze returns it as well: a round trip less while nobody can write.


def begin_freeze(conn: Control, ticket: int, token: UUID, request: PauseRequest) -> Freeze:
    """Commit what stops the writes and the journal row together, or adopt this holder's freeze and extend its lease.

    :raises psycopg.Error: with the SQLSTATEs that ``install.sql`` lists.
    """
    begin = _COLUMNS + "pgfreeze.begin_freeze(%s, %s, %s, %s, %s, %s, %s)" + _DEAD_MAN
    how = (request.lease, request.admit.value, request.dead_man, request.strategy.value, list(request.roles))
    freeze = _persistent(lambda: _one(conn, begin, (ticket, token, *how)))
    assert freeze is not None
    return freeze


def record_locked(
    conn: Control, ticket: int, token: UUID, lease: timedelta, *, pids: Sequence[int], waited: timedelta, dead_man: bool
) -> Freeze:
    """Record a freeze by the strategy lock, whose locks are held by *pids* and were first waited for *waited* ago.

    :raises psycopg.Error: with the SQLSTATEs that ``install.sql`` lists.
    """
    record = _COLUMNS + "pgfreeze.record_locked(%s, %s, %s, %s, %s, %s)" + _DEAD_MAN
    freeze = _one(conn, record, (ticket, token, lease, list(pids), waited, dead_man))
    assert freeze is not None
    return freeze


def read_barrier(conn: Control, token: UUID) -> Freeze | None:
    """Record the barrier and who was there, once, just after the freeze was committed; None if the freeze is gone."""
    return _one(conn, _COLUMNS + "pgfreeze.mark_barrier(%s)" + _DEAD_MAN, (token,))


def record_frozen(
    conn: Control,
    ticket: int,
    terminated: dict[str, int],
    lingering: Sequence[Backend],
    warnings: Sequence[dict[str, str]],
) -> Freeze | None:
    """Re-admit readers where asked and record that the freeze stands; None if it is no longer this ticket's."""
    record = _COLUMNS + "pgfreeze.record_frozen(%s, %s, %s, %s)" + _DEAD_MAN
    left = json.dumps([backend.as_dict() for backend in lingering])
    given = (ticket, json.dumps(terminated), left, json.dumps(list(warnings)))
    return _persistent(lambda: _one(conn, record, given))


def record_checkpoint(conn: Control, token: UUID) -> Freeze | None:
    """Record where the last checkpoint stands; None if the freeze is gone."""
    record: LiteralString = """
      WITH f AS (UPDATE pgfreeze.freezes f
                    SET checkpoint_lsn = c.checkpoint_lsn, checkpoint_at = clock_timestamp()
                   FROM pg_control_checkpoint() c
                  WHERE f.token = %s AND f.state = 'frozen' AND f.lease_until > clock_timestamp()
                    AND pgfreeze.locked(f.sessions)
                 RETURNING f.*)"""
    return _one(conn, record + _COLUMNS + "f AS" + _DEAD_MAN, (token,))


def still_holds(conn: Control, ticket: int) -> bool:
    """Whether the freeze stands, and is still this ticket's."""
    row = conn.execute(
        """SELECT true FROM pgfreeze.freezes f JOIN pgfreeze.tickets t USING (ticket)
            WHERE f.ticket = %s AND t.voided_at IS NULL AND f.state = 'frozen' AND f.lease_until > clock_timestamp()
              AND pgfreeze.locked(f.sessions)""",
        (ticket,),
    ).fetchone()
    return row is not None


def seconds_left(conn: Control, ticket: int) -> float:
    """Return how many seconds the freeze of this ticket has still to stand; 0 if it does not."""
    row = conn.execute(
        """SELECT EXTRACT(epoch FROM f.lease_until - clock_timestamp())::float8
             FROM pgfreeze.freezes f JOIN pgfreeze.tickets t USING (ticket)
            WHERE f.ticket = %s AND t.voided_at IS NULL AND f.state = 'frozen' AND f.lease_until > clock_timestamp()
              AND pgfreeze.locked(f.sessions)""",
        (ticket,),
    ).fetchone()
    return 0.0 if row is None else float(row[0])


def void_ticket(conn: Control, ticket: int) -> Freeze | None:
    """Void a ticket, waiting for its freezing transaction if one is under way; return its freeze if not yet thawed."""
    conn.execute(
        "UPDATE pgfreeze.tickets SET voided_at = COALESCE(voided_at, clock_timestamp()) WHERE ticket = %s",
        (ticket,),
    )
    return _one(conn, _FREEZES + " WHERE f.ticket = %s AND f.state <> 'thawed'", (ticket,))


def thaw(conn: Control, freeze: Freeze, reason: str, reader_grace: timedelta = timedelta(0)) -> None:
    """Thaw one freeze through the server's procedure.

    :raises ThawFailed: if this role may not give back all the privileges that were revoked.
    """
    call: LiteralString = "CALL pgfreeze.thaw(%s, %s, %s, %s, %s)"
    given = (freeze.databases[0], reader_grace, reason, freeze.token)
    try:
        try:
            with unhurried(conn):
                conn.execute(call, (*given, False))
        except psycopg.Error as error:
            if not is_kept_waiting(error):
                raise
            # By somebody who could go on for the rest of the lease: so whoever is in the way has to go.
            with watched(conn, freeze.token), unhurried(conn):
                conn.execute(call, (*given, True))
    except psycopg.Error as error:
        if error.sqlstate == NOT_ALL_THAWED:
            check_given_back(conn, freeze)
        raise
    check_given_back(conn, freeze)


def named(conn: Control, freezes: Sequence[Freeze]) -> str:
    """Return who was in the way of a thaw and could not be ended, as the end of a sentence; empty if nobody."""
    try:
        found = [one for freeze in freezes for one in by_token(conn, freeze.token).in_the_way if not one["ended"]]
    except psycopg.Error:  # what is still frozen is more urgent
        found = []
    # Perhaps nobody could write into the journal who it was.
    return f"; in the way was {'; '.join(map(blockers.sentence, found))}" if found else blockers.prepared(conn)


def is_kept_waiting(error: psycopg.Error) -> bool:
    """Whether a thaw could not restore something only because somebody else had locked or changed it."""
    if error.sqlstate != NOT_ALL_THAWED:
        return error.sqlstate in _IN_THE_WAY
    return any(one["sqlstate"] in _IN_THE_WAY for one in json.loads(error.diag.message_detail or "[]"))


def check_given_back(conn: Control, freeze: Freeze) -> None:
    """Raise ThawFailed if a thaw could not give back some privileges, since the role that thawed may not grant them."""
    if freeze.strategy is not Strategy.PRIVILEGES:
        return
    left: LiteralString = """
        SELECT what || ' ' || name || ' to ' || who FROM pgfreeze.revoked_entries(%(token)s)
         WHERE NOT present
           AND EXISTS (SELECT FROM pgfreeze.freezes WHERE token = %(token)s AND state = 'thawing')
         ORDER BY level, name"""
    missing = [one for (one,) in conn.execute(left, {"token": freeze.token})]
    if missing:
        (name,) = freeze.databases
        literal = name.replace("'", "''")
        raise ThawFailed(
            f"STILL FROZEN: {name!r}, in part. Role {conn.info.user!r} may not give back "
            f"{'; '.join(missing[:10])}{'; …' if len(missing) > 10 else ''}. Give it the right "
            "back, and it is thawed by itself; or resume as a role that may; or, as a superuser who has looked whose "
            f"code it is (docs/stuck.md), in psql, connected to {name!r}: CALL pgfreeze.thaw('{literal}')"
        )


def close_orphans(conn: Control, databases: Sequence[str]) -> None:
    """Close the freezes by the strategy lock whose sessions, and so whose locks, are gone."""
    for freeze in active(conn, databases):
        if freeze.state is not State.THAWING and not freeze.locked:
            thaw(conn, freeze, "lock session ended")
