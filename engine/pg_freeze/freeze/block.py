"""Freeze for the time of one block, in one process: no task hop, and no connection to open, lies inside the outage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg

from pg_freeze import attest, journal, sizes
from pg_freeze.attestation import Attestation
from pg_freeze.control import Connect, ConnectTo, Control, control, reworded
from pg_freeze.entrance import Entrances
from pg_freeze.errors import ThawFailed
from pg_freeze.freeze.attempt import Attempt
from pg_freeze.freeze.checkpoint import lost
from pg_freeze.freeze.thaw import undo
from pg_freeze.look import look
from pg_freeze.model import Freeze, Progress
from pg_freeze.request import FreezeRequest
from pg_freeze.sequences import look_inside


@dataclass(slots=True)
class Hold:
    """A freeze that lasts as long as its block.

    ``attestation`` is there after the block: what state the databases were in while it ran. ``connect`` opens a
    connection to the database that has the journal.
    """

    freeze: Freeze
    connect: Connect
    _conn: Control
    attestation: Attestation | None = None

    @property
    def journal_database(self) -> str:
        """The database that has the journal."""
        return self._conn.info.dbname

    def left(self) -> float:
        """Return the seconds that are left of the lease; 0 once the freeze does not stand, or cannot be seen any more.

        Inside the block only. A journal that somebody has locked tells nothing: then what is left by our own clock.
        """
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
    attempt = Attempt.of(connect, connect_to, request, progress)
    # Opened before the outage, used in it and at its end.
    with control(attempt.connect, "freeze") as conn:
        entrances = Entrances(conn, connect_to, request.databases)
        try:
            if attempt.strategy.enters:  # else who has connected before is ended
                entrances.open()
            hold = Hold(attempt.freeze(conn), attempt.connect, conn)
            seen = look(conn, hold.freeze.token)
            seen = seen.with_more(inside=look_inside(entrances))
            record = attest.open_record(conn, hold.freeze.token, seen)
            recording = sizes.Recording(entrances)
            yield hold
            recorded = recording.done()
            # Before the look, which tells whether the sessions that can answer this are all there still.
            unlocked = attempt.engaged.unlocked()
            inside = look_inside(entrances)
            seen = look(conn, hold.freeze.token).with_more(unlocked=unlocked, inside=inside)
            stood = journal.still_holds(conn, hold.freeze.ticket)
            entrances.close()
            failed = _end(conn, attempt)
        except BaseException as error:
            # Around the end of the block, too: a signal may come there as well as anywhere.
            attempt.undo(error)
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


def _end(conn: Control, attempt: Attempt) -> ThawFailed | None:
    """Thaw over the connection that is there; over fresh ones, as an undo does, if that fails.

    :returns: why not all is thawed, where trying again is of no use.
    """
    attempt.engaged.release()
    try:
        # Only what is this attempt's: one that stood still for too long has a newer attempt of its holder beside it.
        freeze = journal.void_ticket(conn, attempt.ticket)
        if freeze is not None:
            journal.thaw(conn, freeze, "end of the block")
    except ThawFailed as error:
        return error
    except psycopg.Error as error:
        undo(attempt.connect, attempt.ticket, attempt.request.databases, error)
    return None
