"""Thaws what has outlived its lease: for freezes whose dead-man switch is gone, as after a restart of the server."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final, LiteralString

import psycopg

from pg_freeze import journal, strategies
from pg_freeze.control import Connect, ConnectTo, Control, control, unhurried
from pg_freeze.dead_man import unhindered, watched
from pg_freeze.errors import NOT_ALL_THAWED, ThawFailed
from pg_freeze.journal import schema
from pg_freeze.journals import in_each_journal
from pg_freeze.model import Freeze

_THAW: Final[LiteralString] = "CALL pgfreeze.thaw_expired()"
_THAW_ONE: Final[LiteralString] = "CALL pgfreeze.thaw_each(%s::uuid[], 'lease ended', true)"


def thaw_expired(connect: Connect, connect_to: ConnectTo) -> tuple[Freeze, ...]:
    """Thaw every freeze of the server whose lease has ended, and return them; none where there is no journal.

    :param connect_to: returns a new connection to the named database, to thaw what is frozen from inside.
    :raises ThawFailed: if one of them could not be thawed. It does not keep back the others.
    :raises ServerLost: if the server, or a database that is frozen from inside, cannot be reached.
    :raises FreezeRefused: without the right to use a journal.
    """
    with control(connect, "guard") as conn:
        places = in_each_journal(conn, connect_to, None, lambda place, _: _thaw_expired(place), doing="guard")
    return tuple(freeze for thawed in places for freeze in thawed)


def _thaw_expired(conn: Control) -> tuple[Freeze, ...]:
    if not schema.require(conn):
        return ()
    row = conn.execute("SELECT clock_timestamp()").fetchone()
    assert row is not None
    expired = [freeze for freeze in unhindered(conn, partial(journal.active, conn)) if freeze.lease_until <= row[0]]
    if not expired:
        return ()
    try:
        try:
            with unhurried(conn):
                conn.execute(_THAW)
        except psycopg.Error as error:
            if not journal.is_kept_waiting(error):
                raise
            # Its dead-man switch, and what keeps the way of that clear, may be gone.
            _thaw_patiently(conn, expired)
    except psycopg.Error as error:
        if error.sqlstate != NOT_ALL_THAWED:
            raise
        for freeze in expired:
            strategies.of(freeze.strategy).check_thawed(conn, freeze)
        raise ThawFailed(
            f"{error.diag.message_primary}{journal.named(conn, expired)}. As the role that froze it, or a superuser "
            f"who has looked whose code it is (docs/stuck.md), in psql in {conn.info.dbname}: CALL pgfreeze.thaw_all()"
        ) from error
    # One whose lease was extended in between is left as it is.
    thawed = tuple(after for after in (journal.by_token(conn, one.token) for one in expired) if not after.holds)
    for freeze in thawed:
        strategies.of(freeze.strategy).check_thawed(conn, freeze)
    return thawed


def _thaw_patiently(conn: Control, expired: Sequence[Freeze]) -> None:
    """Thaw each for itself, and have whoever is in its way ended; the first error is raised when all were tried."""
    failed: psycopg.Error | None = None
    for freeze in expired:
        try:
            with watched(conn, freeze.token), unhurried(conn):
                conn.execute(_THAW_ONE, ([freeze.token],))
        except psycopg.Error as error:
            if error.sqlstate != NOT_ALL_THAWED:
                raise
            failed = failed or error
    if failed is not None:
        raise failed
