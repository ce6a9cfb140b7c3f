"""The only reader and writer of the journal: freezes, tickets, leases and history.

The tables are in ``migrations/``; the routines, that must be atomic or must outlive this process, in ``../sql/``.
``definition.py`` says what a version is, ``schema.py`` asks for it, ``install.py`` creates, upgrades and removes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final, LiteralString, NamedTuple, TypeVar
from uuid import UUID

import psycopg

from pg_freeze import held_up, strategies
from pg_freeze.control import Control, unhurried
from pg_freeze.dead_man import watched
from pg_freeze.errors import NOT_ALL_THAWED
from pg_freeze.model import Admit, Backend, Forgotten, Freeze, State
from pg_freeze.request import FreezeRequest


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


# A freeze comes as one JSON object, which the server's own routine makes: so a journal of another version can be read.
_DESCRIBED: Final[LiteralString] = "SELECT pgfreeze.described(f) FROM "
_TIMES: Final = frozenset(field.name for field in fields(Freeze) if field.name.endswith(("_at", "_until")))
_LISTS: Final = ("databases", "roles", "lingering", "warnings", "left_over", "in_the_way", "dropped")
_Name = TypeVar("_Name", bound=StrEnum)


def _freeze(told: dict[str, Any]) -> Freeze:
    """Return what the server tells of a freeze. A journal that is newer than we are may tell more."""
    known = {field.name: told[field.name] for field in fields(Freeze) if field.name in told}
    for name, value in known.items():
        if name in _TIMES and value is not None:
            known[name] = datetime.fromisoformat(value)
        elif name in _LISTS:
            known[name] = tuple(value)
    known["in_the_way"] = tuple(map(held_up.explained, known["in_the_way"]))
    known |= {"token": UUID(known["token"]), "state": State(known["state"]), "admit": _admit(known["admit"])}
    return Freeze(**known)


def _admit(name: str) -> Admit:
    """Return the member that is called so. A name that only a newer program knows is kept as it is."""
    for member in Admit:
        if member == name:
            return member
    unknown = str.__new__(Admit, name)
    unknown._name_ = unknown._value_ = name
    return unknown


def active(conn: Control, databases: Sequence[str] | None = None, *, former: bool = False) -> tuple[Freeze, ...]:
    """Return the freezes that are not thawed to the end, of any of *databases* or of all, oldest first.

    :param former: also those of a database that was renamed while it was frozen, although there is another one under
        its former name now: unless that is frozen itself.
    :raises psycopg.errors.LockNotAvailable: while somebody has locked the journal, with what to type if that is a
        prepared transaction.
    """
    names = None if databases is None else list(databases)
    try:
        rows = conn.execute("SELECT pgfreeze.open_freezes(%s::text[], %s)", (names, former)).fetchall()
    except psycopg.errors.LockNotAvailable as error:
        raise psycopg.errors.LockNotAvailable(f"{error}{held_up.prepared(conn)}") from error
    return tuple(_freeze(told) for (told,) in rows)


def _one(conn: Control, query: LiteralString, given: Sequence[Any]) -> Freeze | None:
    row = conn.execute(query, given).fetchone()
    return None if row is None or row[0] is None else _freeze(row[0])


def by_token(conn: Control, token: UUID) -> Freeze:
    """Return one freeze. A token that was never journalled is a programming error: KeyError."""
    freeze = _one(conn, "SELECT pgfreeze.freeze_of(%s)", (token,))
    if freeze is None:
        raise KeyError(token)
    return freeze


def newest(conn: Control, limit: int) -> tuple[Freeze, ...]:
    """Return the last *limit* freezes, newest first."""
    found = conn.execute(_DESCRIBED + "pgfreeze.freezes f ORDER BY f.requested_at DESC LIMIT %s", (limit,))
    return tuple(_freeze(told) for (told,) in found)


def forget(conn: Control, age: timedelta) -> Forgotten:
    """Forget the freezes that were thawed longer than *age* ago, with all that belongs to them."""
    row = conn.execute("SELECT forgotten, still_open, leased, attested FROM pgfreeze.forget(%s)", (age,)).fetchone()
    assert row is not None
    return Forgotten(*row)


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


def begin_freeze(conn: Control, ticket: int, token: UUID, request: FreezeRequest) -> Freeze:
    """Commit what stops the writes and the journal row together, or adopt this holder's freeze and extend its lease.

    :raises psycopg.Error: with the SQLSTATEs that ``install.sql`` lists.
    """
    begin = _DESCRIBED + "pgfreeze.begin_freeze(%s, %s, %s, %s, %s, %s, %s) f"
    how = (request.lease, request.admit.value, request.dead_man, request.strategy, list(request.roles))
    freeze = _persistent(lambda: _one(conn, begin, (ticket, token, *how)))
    assert freeze is not None
    return freeze


def record_held(
    conn: Control, ticket: int, token: UUID, request: FreezeRequest, *, pids: Sequence[int], waited: timedelta
) -> Freeze:
    """Record a freeze that the sessions *pids* hold already; they began to wait for that *waited* ago.

    :raises psycopg.Error: with the SQLSTATEs that ``install.sql`` lists.
    """
    record = _DESCRIBED + "pgfreeze.record_held(%s, %s, %s, %s, %s, %s, %s) f"
    how = (request.strategy, request.lease, list(pids), waited, request.dead_man)
    freeze = _one(conn, record, (ticket, token, *how))
    assert freeze is not None
    return freeze


def read_barrier(conn: Control, token: UUID) -> Freeze | None:
    """Record the barrier and who was there, once, just after the freeze was committed; None if the freeze is gone."""
    return _one(conn, _DESCRIBED + "pgfreeze.mark_barrier(%s) f", (token,))


def record_frozen(
    conn: Control,
    ticket: int,
    terminated: dict[str, int],
    lingering: Sequence[Backend],
    warnings: Sequence[dict[str, str]],
) -> Freeze | None:
    """Re-admit readers where asked and record that the freeze stands; None if it is no longer this ticket's."""
    record = _DESCRIBED + "pgfreeze.record_frozen(%s, %s, %s, %s) f"
    left = json.dumps([backend.as_dict() for backend in lingering])
    given = (ticket, json.dumps(terminated), left, json.dumps(list(warnings)))
    return _persistent(lambda: _one(conn, record, given))


def record_checkpoint(conn: Control, token: UUID) -> Freeze | None:
    """Record where the last checkpoint stands; None if the freeze is gone."""
    record: LiteralString = """
        UPDATE pgfreeze.freezes f
           SET checkpoint_lsn = c.checkpoint_lsn, checkpoint_at = clock_timestamp()
          FROM pg_control_checkpoint() c
         WHERE f.token = %s AND f.state = 'frozen' AND f.lease_until > clock_timestamp()
           AND pgfreeze.locked(f.sessions)
        RETURNING pgfreeze.described(f)"""
    return _one(conn, record, (token,))


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
    return _one(conn, _DESCRIBED + "pgfreeze.freezes f WHERE f.ticket = %s AND f.state <> 'thawed'", (ticket,))


def thaw(conn: Control, freeze: Freeze, reason: str, reader_grace: timedelta = timedelta(0)) -> None:
    """Thaw one freeze through the server's procedure.

    :raises ThawFailed: if not all of it could be given back: see :meth:`Strategy.check_thawed`.
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
            strategies.of(freeze.strategy).check_thawed(conn, freeze)
        raise
    strategies.of(freeze.strategy).check_thawed(conn, freeze)


def named(conn: Control, freezes: Sequence[Freeze]) -> str:
    """Return who was in the way of a thaw and could not be ended, as the end of a sentence; empty if nobody."""
    try:
        found = [one for freeze in freezes for one in by_token(conn, freeze.token).in_the_way if not one["ended"]]
    except psycopg.Error:  # what is still frozen is more urgent
        found = []
    # Perhaps nobody could write into the journal who it was.
    return f"; in the way was {'; '.join(map(held_up.sentence, found))}" if found else held_up.prepared(conn)


def is_kept_waiting(error: psycopg.Error) -> bool:
    """Whether a thaw could not restore something only because somebody else had locked or changed it."""
    if error.sqlstate != NOT_ALL_THAWED:
        return error.sqlstate in _IN_THE_WAY
    return any(one["sqlstate"] in _IN_THE_WAY for one in json.loads(error.diag.message_detail or "[]"))


def close_orphans(conn: Control, databases: Sequence[str]) -> None:
    """Close the freezes whose sessions, and so whose locks, are gone."""
    for freeze in active(conn, databases):
        if freeze.state is not State.THAWING and not freeze.locked:
            thaw(conn, freeze, "lock session ended")
