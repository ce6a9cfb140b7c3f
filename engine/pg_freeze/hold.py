"""Freeze for the time of one block, in one process: no task hop, and no connection to open, lies inside the outage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import uuid4

import psycopg

from pg_freeze import attest, journal, lock, schema, sizes, trust
from pg_freeze import dead_man as switch
from pg_freeze.attestation import Attestation
from pg_freeze.control import Connect, ConnectTo, Control, control, reworded, unhurried
from pg_freeze.entrance import Entrances
from pg_freeze.errors import LeaseLost, ThawFailed
from pg_freeze.freeze.checkpoint import lost, write_out
from pg_freeze.freeze.pause import pause, preflighted, raise_begun
from pg_freeze.freeze.thaw import resume, undo
from pg_freeze.inside import check_enterable
from pg_freeze.look import look, rehearse
from pg_freeze.model import Freeze, OnDrainTimeout, Progress, Strategy
from pg_freeze.request import FreezeRequest
from pg_freeze.sequences import look_inside


@dataclass(slots=True)
class Hold:
    """A freeze that lasts as long as its block.

    ``attestation`` is there after the block: what state the databases were in while it ran.
    """

    freeze: Freeze
    attestation: Attestation | None = None
    _locks: lock.Locks = field(default_factory=lock.Locks)
    _conn: Control | None = None

    def left(self) -> float:
        """Return the seconds that are left of the lease; 0 once the freeze does not stand, or cannot be seen any more.

        Inside the block only. A journal that somebody has locked tells nothing: then what is left by our own clock.
        """
        assert self._conn is not None
        try:
            return journal.seconds_left(self._conn, self.freeze.ticket)
        except psycopg.errors.LockNotAvailable:
            return max(0.0, (self.freeze.lease_until - datetime.now(UTC)).total_seconds())
        except psycopg.Error:
            return 0.0


@contextmanager
def frozen(
    connect: Connect,
    connect_to: ConnectTo,
    request: FreezeRequest,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[Hold]:
    """Freeze databases for the time of a ``with`` block, and attest it.

    :param connect: returns a new connection to the maintenance database.
    :param connect_to: returns a new connection to the named database.
    :param request: what to freeze, and how: see :meth:`FreezeRequest.for_block`.
    :param progress: called after each look at those who are waited for.
    :returns: the hold; after the block it has the attestation.
    :raises LeaseLost: at the end of the block, if the freeze did not last as long: a snapshot taken in it is not to be
        trusted. Otherwise, as :func:`pause`. An error of the block itself goes on after the thaw.
    """
    if request.strategy is Strategy.PRIVILEGES:
        # From outside first: what is wrong is said more clearly there than by a connection that fails.
        with control(connect, "freeze") as outside:
            check_enterable(outside, request.databases[0])
        connect = partial(connect_to, request.databases[0])
    # Opened before the outage, used in it and at its end.
    with control(connect, "freeze") as conn:
        if request.strategy is Strategy.PRIVILEGES:
            _own_journal(conn)
        entrances = Entrances(conn, connect_to, request.databases)
        hold = None
        try:
            if request.strategy is not Strategy.READ_ONLY:  # who has connected before that one is ended
                entrances.open()
            if request.strategy is Strategy.LOCK:
                hold = _lock(connect, connect_to, conn, request, progress)
            else:
                hold = Hold(pause(connect, request, progress=progress))
            seen = look(conn, hold.freeze.token)
            seen = seen.with_more(inside=look_inside(entrances))
            record = attest.open_record(conn, hold.freeze.token, seen)
            recording = sizes.Recording(entrances)
            hold._conn = conn  # noqa: SLF001
            yield hold
            recorded = recording.done()
            # Before the look, which tells whether the sessions that can answer this are all there still.
            unlocked = hold._locks.unlocked()  # noqa: SLF001
            inside = look_inside(entrances)
            seen = look(conn, hold.freeze.token).with_more(unlocked=unlocked, inside=inside)
            stood = journal.still_holds(conn, hold.freeze.ticket)
            entrances.close()
            failed = _end(connect, conn, hold, request)
        except BaseException as error:
            # Around the end of the block, too: a signal may come there as well as anywhere.
            if hold is not None:
                hold._locks.release()  # noqa: SLF001
                undo(connect, hold.freeze.ticket, request.databases, error)
            elif not isinstance(error, Exception):
                # A signal, perhaps between the end of the pause and the next line here. An Exception was undone.
                resume(connect, databases=request.databases, holder=request.holder)
            if isinstance(error, psycopg.Error):
                raise reworded(error, "freeze, undone") from error
            raise
        finally:
            entrances.close()
        if failed is not None:
            raise failed
        hold.freeze = journal.by_token(conn, hold.freeze.token)
        hold.attestation = attest.close_record(conn, record, seen, recorded)
        if not stood:
            raise lost(request.holder)


def _own_journal(conn: Control) -> None:
    """Make sure that the journal inside is one to trust before anything of it is used."""
    if not trust.has_journal(conn):
        with suppress(psycopg.errors.InsufficientPrivilege):  # preflight says what to grant
            schema.install(conn)
        trust.has_journal(conn)


def _lock(
    connect: Connect,
    connect_to: ConnectTo,
    conn: Control,
    request: FreezeRequest,
    progress: Callable[[Progress], None] | None,
) -> Hold:
    began_at = journal.server_time(conn, request.began)
    # Nobody is ended, unless at the drain timeout.
    no_signal = {"no-signal"} if request.on_drain_timeout is OnDrainTimeout.ABORT else set()
    preflighted(conn, request, ignored=no_signal)
    schema.install(conn)
    journal.close_orphans(conn, request.databases)
    ticket = journal.draw_ticket(conn, "pause", request.holder, request.databases, began_at)
    if not ticket.valid:
        raise LeaseLost(
            f"{request.holder!r} was resumed, or made a newer attempt, after this one began: nothing was frozen. "
            "Start a new attempt"
        )
    locks = lock.Locks()
    try:
        if request.checkpoint:
            with unhurried(conn):
                conn.execute("CHECKPOINT")
        token = uuid4()
        if request.dead_man:
            patience = request.drain_timeout + timedelta(minutes=1)
            switch.start(connect, conn, token, ticket.number, lease=request.lease, patience=patience)
        rehearse(conn)
        locks = lock.acquire(
            conn,
            connect_to,
            token,
            request.databases,
            timeout=request.drain_timeout,
            on_timeout=request.on_drain_timeout,
            progress=progress,
        )
        try:
            freeze = journal.record_locked(
                conn,
                ticket.number,
                token,
                request.lease,
                pids=locks.pids(),
                waited=timedelta(seconds=time.monotonic() - locks.waited_from),
                dead_man=request.dead_man,
            )
        except psycopg.Error as error:
            raise_begun(error)
        locks.keep(request.lease)
        if request.checkpoint:
            freeze = write_out(conn, token, request.holder, switch_wal=request.switch_wal, required=True)
        return Hold(freeze, _locks=locks)
    except BaseException as error:
        locks.release()
        undo(connect, ticket.number, request.databases, error)
        raise


def _end(connect: Connect, conn: Control, hold: Hold, request: FreezeRequest) -> ThawFailed | None:
    """Thaw over the connection that is there; over fresh ones, as an undo does, if that fails.

    :returns: why not all is thawed, where trying again is of no use.
    """
    hold._locks.release()  # noqa: SLF001
    try:
        # Only what is this attempt's: one that stood still for too long has a newer attempt of its holder beside it.
        freeze = journal.void_ticket(conn, hold.freeze.ticket)
        if freeze is not None:
            journal.thaw(conn, freeze, "end of the block")
    except ThawFailed as error:
        return error
    except psycopg.Error as error:
        undo(connect, hold.freeze.ticket, request.databases, error)
    return None
