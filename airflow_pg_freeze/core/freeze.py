"""Pause, checkpoint and resume: observe, decide, apply, until done.

Truth lives in the server: an act begins by reading the journal, and is safe to repeat. The invariants:

1. The journal row and every changed setting commit in one transaction. On disk a database is frozen and journalled, or
   neither.
2. A freeze is committed only while a dead-man switch watches its token, and only with a valid ticket. A ticket is void
   once its holder has resumed, or has made a newer attempt; the freezing transaction locks it, so a resume either
   comes first (and nothing freezes) or waits, and thaws what it finds.
3. Between barrier and ``frozen`` each round trip asks whether the freeze is still this ticket's, and stops if not:
   sessions of a database that somebody has thawed meanwhile are left alone.
4. Success is reported only after the journal said, after the last change, that the freeze stands under this ticket.
5. Whatever ends a pause early (an error, a signal, a timeout, the interpreter's end) voids its ticket and thaws its freeze,
   over a fresh connection, before the error goes on. If even that fails, the error is :class:`ThawFailed` and the
   dead-man switch remains. A newer attempt's freeze is never undone by an older one.
6. Only the server's procedure thaws: ``CALL airflow_pg_freeze.thaw(…)``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final, TypeVar
from uuid import UUID, uuid4

import psycopg

from airflow_pg_freeze.core import dead_man as switch
from airflow_pg_freeze.core import journal
from airflow_pg_freeze.core.backends import Drained, drain
from airflow_pg_freeze.core.control import Connect, Control, control, reworded
from airflow_pg_freeze.core.errors import (
    HELD,
    NO_DEAD_MAN,
    NO_SUCH_DATABASE,
    TICKET_VOID,
    DrainTimeout,
    FreezeError,
    FreezeRefused,
    InvalidRequest,
    LeaseLost,
    ServerLost,
    ThawFailed,
    is_server_lost,
)
from airflow_pg_freeze.core.model import DRAIN_TIMEOUT, LEASE, Admit, Freeze, OnDrainTimeout, Progress, Resumed, State
from airflow_pg_freeze.core.preflight import Preflight, adoptable, examine

log = logging.getLogger(__name__)

NO_TIME: Final = timedelta(0)
#: Pauses between attempts to undo or to resume over a fresh connection, in seconds: a server that restarts is back soon.
RETRY_AFTER: Final = (0.1, 0.2, 0.5, 1.0, 2.0)
# Two writers of one pg_database row: "tuple concurrently updated", for which PostgreSQL has no better SQLSTATE.
_COLLISION: Final = "XX000"


_Choice = TypeVar("_Choice", bound=StrEnum)


class Step(StrEnum):
    """What a pause does next."""

    BEGIN = "begin"
    MARK_BARRIER = "mark the barrier"
    DRAIN = "drain"
    ABORT = "abort"
    RECORD = "record"
    CHECKPOINT = "checkpoint"
    DONE = "done"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a pause knows when it decides: the journal's row, and what this attempt has done itself."""

    ticket: int
    freeze: Freeze | None
    drained: Drained | None = None
    wants_checkpoint: bool = False
    checkpointed: bool = False


def next_step(seen: Seen) -> Step:
    """Return the next step of a pause; a pure function of what was seen.

    A row of an older ticket is one to adopt, which `BEGIN` does; a row that no longer holds, or none after we drained, is lost.
    """
    freeze = seen.freeze
    if freeze is None or not freeze.holds or freeze.ticket < seen.ticket:
        begun = seen.drained is not None or (freeze is not None and freeze.ticket == seen.ticket)
        return Step.LOST if begun else Step.BEGIN
    if freeze.ticket > seen.ticket:
        return Step.LOST
    if freeze.barrier_at is None:
        return Step.MARK_BARRIER
    if seen.drained is None:
        return Step.DRAIN
    if seen.drained.timed_out:
        return Step.ABORT
    if freeze.state is State.DRAINING:
        return Step.RECORD
    if seen.wants_checkpoint and not seen.checkpointed:
        return Step.CHECKPOINT
    return Step.DONE


def pause(
    connect: Connect,
    *,
    databases: Sequence[str],
    holder: str,
    lease: timedelta = LEASE,
    drain_timeout: timedelta = DRAIN_TIMEOUT,
    on_drain_timeout: OnDrainTimeout | str = OnDrainTimeout.TERMINATE,
    admit: Admit | str = Admit.READERS_ONCE_DRAINED,
    checkpoint: bool = False,
    switch_wal: bool = False,
    strict: bool = False,
    dead_man: bool = True,
    age: timedelta = NO_TIME,
    progress: Callable[[Progress], None] | None = None,
) -> Freeze:
    """Freeze databases: refuse writes, make the sessions that may still write go, and report the freeze.

    Called again by the same holder it adopts the freeze that stands, extends its lease and drains on.

    :param connect: returns a new connection to the maintenance database.
    :param databases: the databases to freeze, in one transaction.
    :param holder: who owns the freeze.
    :param lease: after this time the server thaws by itself; counted from the freeze, or its adoption.
    :param drain_timeout: how long a transaction that was open at the barrier may go on.
    :param on_drain_timeout: what to do then: ``terminate`` what is left, or ``abort``: undo everything and fail.
    :param admit: who may connect meanwhile: ``readers-once-drained``, ``readers`` or ``nobody``.
    :param checkpoint: make the final checkpoint as well.
    :param switch_wal: switch to a new WAL file after the final checkpoint; implies *checkpoint*.
    :param strict: refuse what preflight only warns of.
    :param dead_man: whether a dead-man switch must watch; without one only ``thaw_expired()`` enforces the lease.
    :param age: how long ago this attempt began, where that was before this call: a resume of the same holder since then
        voids it.
    :param progress: called after each poll of the drain.
    :returns: the freeze, in state ``frozen``.
    :raises InvalidRequest: for a request that makes no sense.
    :raises FreezeRefused: if preflight refuses, or another holder has a database; nothing was changed.
    :raises DrainTimeout: if sessions were left; everything was undone.
    :raises LeaseLost: if somebody resumed, a newer attempt took over, or the lease ended meanwhile.
    :raises ServerLost: if the server went away.
    :raises ThawFailed: if something failed and could not be undone: still frozen until the lease ends.
    """
    began = time.monotonic() - age.total_seconds()
    names, admitted = check_names(databases, holder), _member(Admit, admit, "admit")
    at_timeout = _member(OnDrainTimeout, on_drain_timeout, "on_drain_timeout")
    check_positive(lease=lease, drain_timeout=drain_timeout)
    if lease <= drain_timeout:
        raise InvalidRequest(
            f"the lease ({lease.total_seconds():g} s) must be longer than the drain timeout "
            f"({drain_timeout.total_seconds():g} s), or it would end while the database drains"
        )
    wants_checkpoint = checkpoint or switch_wal
    with control(connect, "pause") as conn:
        found = examine(conn, names, holder, admitted, checkpoint=wants_checkpoint, switch_wal=switch_wal)
        refuse(found, strict)
        journal.install(conn)
        ticket = journal.draw_ticket(conn, "pause", holder, names, timedelta(seconds=time.monotonic() - began))
        if not ticket.valid:
            raise LeaseLost(f"{holder!r} was resumed after this attempt began: nothing was frozen. Start a new attempt")
        mine = next((f for f in journal.active(conn, names) if f.holds and adoptable(f, holder, names, admitted)), None)
        token = uuid4() if mine is None else mine.token
        may_checkpoint = not any(finding.code == "no-checkpoint" for finding in found.findings)
        if mine is None and may_checkpoint:
            log.info("First checkpoint, outside the outage")
            conn.execute("CHECKPOINT")
        if dead_man and not switch.watches(conn, token):
            switch.start(connect, conn, token, ticket.number)

        drained: Drained | None = None
        checkpointed = False
        try:
            freeze = mine
            while True:
                step = next_step(Seen(ticket.number, freeze, drained, wants_checkpoint, checkpointed))
                log.debug("%s: %s", holder, step)
                match step:
                    case Step.BEGIN:
                        _begin(conn, ticket.number, token, lease, admitted, dead_man)
                    case Step.MARK_BARRIER:
                        journal.read_barrier(conn, token)
                    case Step.DRAIN:
                        drained = drain(
                            conn,
                            token,
                            ticket.number,
                            drain_timeout,
                            terminate_at_timeout=at_timeout is OnDrainTimeout.TERMINATE,
                            progress=progress,
                        )
                        log.info("Drained: ended %s, %d left", dict(drained.terminated), len(drained.left))
                    case Step.ABORT:
                        raise _not_drained(drained, drain_timeout)
                    case Step.RECORD:
                        assert drained is not None
                        if not journal.record_frozen(
                            conn,
                            ticket.number,
                            dict(drained.terminated),
                            drained.left,
                            [w.as_dict() for w in found.warnings],
                        ):
                            raise _lost(holder)
                    case Step.CHECKPOINT:
                        _checkpoint(conn, token, holder, switch_wal=switch_wal, required=True)
                        checkpointed = True
                    case Step.LOST:
                        raise _lost(holder)
                    case Step.DONE if freeze is not None and journal.still_holds(conn, ticket.number):
                        return freeze
                    case _:
                        raise _lost(holder)
                freeze = journal.by_token(conn, token)
        except BaseException as error:
            # BaseException: Airflow's task timeout is one, and so are KeyboardInterrupt and SystemExit.
            conn.close()
            undo(connect, ticket.number, names, error)
            if isinstance(error, psycopg.Error):
                raise reworded(error, "pause, undone") from error
            raise


def _begin(conn: Control, ticket: int, token: UUID, lease: timedelta, admit: Admit, dead_man: bool) -> None:
    for attempt in range(5):
        try:
            journal.begin_freeze(conn, ticket, token, lease, admit, dead_man)
            return
        except psycopg.Error as error:
            match error.sqlstate:
                case s if s == _COLLISION and attempt < 4:
                    time.sleep(0.05)
                case s if s == TICKET_VOID:
                    raise LeaseLost(
                        "this attempt was resumed, or a newer one began, before it froze anything"
                    ) from error
                case s if s == HELD:
                    raise FreezeRefused(
                        f"somebody else was faster: {error.diag.message_primary}. See `pg-freeze status`"
                    ) from error
                case s if s == NO_DEAD_MAN:
                    raise FreezeError(
                        "the dead-man switch ended before the freeze began; nothing was frozen. Try again"
                    ) from error
                case s if s == NO_SUCH_DATABASE:
                    raise FreezeRefused("a database was dropped or renamed meanwhile; nothing was frozen") from error
                case _:
                    raise


def _lost(holder: str) -> LeaseLost:
    return LeaseLost(
        f"the freeze of {holder!r} is gone: it was resumed, its lease ended, or a newer attempt took it over. "
        "See `pg-freeze history`. Whatever was snapshotted since is not to be trusted"
    )


def _not_drained(drained: Drained | None, timeout: timedelta) -> DrainTimeout:
    left = drained.left if drained is not None else ()
    sessions = "; ".join(map(str, left[:10])) + ("; …" if len(left) > 10 else "")
    return DrainTimeout(
        f"{len(left)} session(s) did not go within {timeout.total_seconds():g} s: {sessions}. Everything was undone. End them, "
        "give a longer drain timeout, or on_drain_timeout=terminate",
        left,
    )


def undo(connect: Connect, ticket: int, databases: Sequence[str], why: BaseException) -> None:
    """Void a ticket and thaw its freeze if it has one, over a fresh connection; tried again for a few seconds.

    The ticket comes first: a freezing statement that is still under way in the server either finds it void, or is waited for.

    :raises ThawFailed: from *why*, if it could not be done.
    """
    failed: BaseException | None = None
    for delay in (0.0, *RETRY_AFTER):
        time.sleep(delay)
        try:
            with control(connect, "undo") as conn:
                freeze = journal.void_ticket(conn, ticket)
                if freeze is not None:
                    journal.thaw(conn, freeze, f"undone: {type(why).__name__}")
            return
        except FreezeError as error:
            failed = error
    raise ThawFailed(
        f"pause failed ({why}) and could not be undone ({failed}): {', '.join(map(repr, databases))} may still be frozen. The "
        f"dead-man switch thaws when the lease ends; sooner: pg-freeze resume --database {databases[0]!r} --force, or in psql: "
        f"CALL airflow_pg_freeze.thaw('{databases[0]}')"
    ) from why


def checkpoint(
    connect: Connect, *, databases: Sequence[str], holder: str, switch_wal: bool = False, required: bool = True
) -> Freeze:
    """Write all that is in memory to the volume, and record in the journal where the checkpoint stands.

    :param databases: the frozen databases; CHECKPOINT itself is for the whole server.
    :param switch_wal: switch to a new WAL file as well, as is good for very busy servers.
    :param required: without it a missing right to CHECKPOINT is no error: a copy is consistent all the same and only takes
        longer to recover; ``checkpoint_lsn`` is then that of the server's last checkpoint.
    :returns: the freeze, with ``checkpoint_lsn``.
    :raises LeaseLost: if this holder has no freeze of these databases that stands, before or after.
    :raises FreezeRefused: without the right to CHECKPOINT or to switch WAL files.
    """
    names = check_names(databases, holder)
    with control(connect, "checkpoint") as conn:
        token = held(conn, names, holder).token
        _checkpoint(conn, token, holder, switch_wal=switch_wal, required=required)
        return journal.by_token(conn, token)


def held(conn: Control, names: Sequence[str], holder: str) -> Freeze:
    """Return the freeze that *holder* has of all these databases, drained.

    :raises LeaseLost: if there is none: what follows would touch a database that is not frozen.
    """
    freezes = journal.active(conn, names) if journal.require(conn) else ()
    for freeze in freezes:
        if freeze.holder == holder and freeze.state is State.FROZEN and set(names) <= set(freeze.databases):
            return freeze
    known = ", ".join(f"{f.holder!r} ({f.state})" for f in freezes) or "nobody"
    raise LeaseLost(
        f"{', '.join(map(repr, names))} not frozen by {holder!r}; frozen by: {known}. In Airflow clear the pause task, "
        "with everything downstream; on the command line run pg-freeze pause first"
    )


def _checkpoint(conn: Control, token: UUID, holder: str, *, switch_wal: bool, required: bool) -> None:
    user = conn.info.user
    try:
        conn.execute("CHECKPOINT")
    except psycopg.errors.InsufficientPrivilege as error:
        if required:
            raise FreezeRefused(
                f"role {user!r} may not CHECKPOINT: GRANT pg_checkpoint TO it (PostgreSQL 15 and newer; before only superusers may)"
            ) from error
        log.warning("Role %r may not CHECKPOINT; the copy will take longer to recover", user)
    if switch_wal:
        try:
            conn.execute("SELECT pg_switch_wal()")
        except psycopg.errors.InsufficientPrivilege as error:
            raise FreezeRefused(
                f"role {user!r} may not switch WAL: GRANT EXECUTE ON FUNCTION pg_switch_wal() TO it"
            ) from error
    if not journal.record_checkpoint(conn, token):
        raise _lost(holder)


def resume(
    connect: Connect, *, databases: Sequence[str], holder: str, reader_grace: timedelta = NO_TIME, force: bool = False
) -> Resumed:
    """Thaw: every write is possible again, with exactly the prior settings. Voids all earlier attempts of the holder.

    Safe to repeat, and no error when nothing is frozen, or only by others: those are left alone and returned. A server that
    is away is tried again for a few seconds.

    :param databases: the databases; a freeze of several is thawed as a whole.
    :param reader_grace: how long read-only sessions that run a query may go on before they are ended; idle ones end at
        once. Writes are possible from the start.
    :param force: thaw whoever's freeze it is.
    :raises ThawFailed: if it could not be done: still frozen.
    :raises ServerLost: if the server could not even be reached.
    """
    names = check_names(databases, holder)
    check_not_negative(reader_grace=reader_grace)
    reached = False
    for delay in (*RETRY_AFTER, 0.0):
        try:
            with control(connect, "resume") as conn:
                reached = True
                return _resume(conn, names, holder, reader_grace, force)
        except ServerLost as error:
            if delay == 0.0:
                if reached:
                    raise _still_frozen(names, error) from error
                raise
            log.warning("Resume: %s; trying again", error)
            time.sleep(delay)
    raise AssertionError("unreachable")


def _resume(conn: Control, names: tuple[str, ...], holder: str, grace: timedelta, force: bool) -> Resumed:
    if not journal.require(conn):
        check_known(conn, names)
        return Resumed(holder, names, (), ())
    # The ticket first: whoever of ours is about to freeze either finds his own void, or is waited for and found below.
    journal.draw_ticket(conn, "resume", holder, names)
    found = journal.active(conn, names)
    if not found:
        check_known(conn, names)
    thawed: list[Freeze] = []
    others: list[Freeze] = []
    for freeze in found:
        if freeze.holder != holder and not force:
            others.append(freeze)
            continue
        if freeze.holder != holder:
            journal.draw_ticket(conn, "resume", freeze.holder, freeze.databases)
        try:
            journal.thaw(conn, freeze, f"resume by {holder}", grace)
            after = journal.by_token(conn, freeze.token)
        except psycopg.Error as error:
            if is_server_lost(error):
                raise
            raise _still_frozen(freeze.databases, error) from error
        if after.holds:
            raise _still_frozen(freeze.databases, None)
        thawed.append(after)
    return Resumed(holder, names, tuple(thawed), tuple(others))


def _still_frozen(databases: Sequence[str], error: BaseException | None) -> ThawFailed:
    said = "" if error is None else f": {' '.join(str(error).split())}"
    return ThawFailed(
        f"STILL FROZEN: {', '.join(map(repr, databases))} could not be thawed{said}. The dead-man switch thaws when the lease "
        f"ends; sooner, as the database's owner or a superuser, in psql: CALL airflow_pg_freeze.thaw('{databases[0]}')"
    )


def refuse(found: Preflight, strict: bool) -> None:
    """Raise what preflight refuses; with *strict* also what it warns of.

    :raises FreezeRefused: with each finding and its remedy.
    """
    reasons = found.findings if strict else found.refusals
    if reasons:
        listed = "; ".join(f"{finding.message} → {finding.remedy}" for finding in reasons)
        raise FreezeRefused(f"refused, nothing was changed: {listed}", reasons)


def check_names(databases: Sequence[str], holder: str) -> tuple[str, ...]:
    """Return the databases without repetitions.

    :raises InvalidRequest: for no database, an empty name, a NUL character, or no holder.
    """
    if isinstance(databases, str):
        databases = [databases]
    names = tuple(dict.fromkeys(databases))
    if not names:
        raise InvalidRequest("no database was named: give at least one")
    for name in (*names, holder):
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise InvalidRequest(f"{name!r} is not a name: databases and holder must be non-empty text")
    return names


def check_known(conn: Control, names: Sequence[str]) -> None:
    """Raise FreezeRefused for a database that the server does not have."""
    rows = conn.execute(
        "SELECT datname::text FROM pg_database WHERE datname::text = ANY (%s)", (list(names),)
    ).fetchall()
    missing = sorted(set(names) - {row[0] for row in rows})
    if missing:
        raise FreezeRefused(f"there is no database {', '.join(map(repr, missing))} on this server; psql -l lists them")


def check_positive(**durations: timedelta) -> None:
    """Raise InvalidRequest for a zero or negative time."""
    for name, value in durations.items():
        if value <= NO_TIME:
            raise InvalidRequest(f"{name} is {value.total_seconds():g} s: it must be more than zero")


def check_not_negative(**durations: timedelta) -> None:
    """Raise InvalidRequest for a negative time."""
    for name, value in durations.items():
        if value < NO_TIME:
            raise InvalidRequest(f"{name} is {value.total_seconds():g} s: it must not be negative")


def _member(kind: type[_Choice], value: str, name: str) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        raise InvalidRequest(f"{name} is {value!r}: it must be one of {', '.join(kind)}") from None
