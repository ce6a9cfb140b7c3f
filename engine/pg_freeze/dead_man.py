"""Starts the dead-man switch: a server session that thaws when the lease ends, whatever becomes of us.

It is started *before* the freeze is committed, and the freezing transaction checks that it is there: no death of this
process, at any statement, leaves a freeze that nothing in the server watches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Final, LiteralString, TypeVar
from uuid import UUID

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.pq import ExecStatus

from pg_freeze.control import Connect, Control, open_control
from pg_freeze.errors import FreezeError, Overtaken

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
#: Stands for every freeze.
_ANY: Final = UUID(int=0)
_START_WITHIN: Final = timedelta(seconds=10)
_FREEZES_WITHIN: Final = timedelta(minutes=1)
_OVER: Final[LiteralString] = """
    SELECT EXISTS (SELECT FROM pgfreeze.tickets WHERE ticket = %s AND voided_at IS NOT NULL)
        OR EXISTS (SELECT FROM pgfreeze.freezes WHERE token = %s AND state IN ('thawing', 'thawed'))"""
_OVERTAKEN: Final = "resumed or thawed by somebody, in the moment before this attempt could freeze"
# Not cancelled: a procedure that catches the end of its lock_timeout, and is cancelled in that moment, goes on.
_END_WATCH: Final[LiteralString] = """
    SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
     WHERE pid = %s AND application_name = %s AND usename = SESSION_USER"""


def start(
    connect: Connect,
    conn: Control,
    token: UUID,
    ticket: int,
    *,
    lease: timedelta,
    patience: timedelta = _FREEZES_WITHIN,
) -> None:
    """Start a dead-man switch for this freeze in a session of its own, with one that keeps its way clear.

    :param conn: a control connection, to see it start.
    :param lease: of the freeze that is to begin; once it is in the journal, what that says counts.
    :param patience: how long it waits for the freeze to begin; then it voids the ticket and ends.

    Both are left behind. The clients' side is closed at once. The server's goes on: while it runs a statement it does
    not look at its socket (``client_connection_check_interval = 0``), and it ends by itself when the freeze is over.

    :raises Overtaken: if there is nothing to watch any more: the ticket is void, or the freeze to adopt thawed.
    :raises FreezeError: if the session cannot be opened, or ends at once.
    """
    call = f"CALL pgfreeze.dead_man('{token}', {int(ticket)}, '{patience.total_seconds()} s')"
    pid = _leave_behind(connect, conn, f"pg-freeze dead-man {token}", call)
    # A session cannot ask who is in its way while it waits: so a second one does, for as long as the first one lives.
    try:
        _leave_behind(connect, conn, f"pg-freeze watch {token}", _watch(token, pid, f"'{lease.total_seconds()} s'"))
    except (FreezeError, psycopg.Error) as error:
        # The switch of an attempt that is void, or of a freeze that is thawed, ends this session too, wherever it is.
        if conn.execute(_OVER, (ticket, token)).fetchone() == (False,):
            raise
        raise Overtaken(_OVERTAKEN) from error


@contextmanager
def watched(conn: Control, token: UUID) -> Iterator[None]:
    """Have a second session end whoever keeps the thaw that *conn* makes in this block waiting, and nobody else.

    Where that session cannot be opened, the thaw has to do without: the way may become clear by itself.
    """

    def connect() -> Control:
        given = make_conninfo(**conn.info.get_parameters(), password=conn.info.password or None)
        return psycopg.connect(given, autocommit=True)

    name = f"pg-freeze watch {token}"
    watch: int | None = None
    try:
        watch = _leave_behind(connect, conn, name, _watch(token, conn.info.backend_pid, "NULL"))
    except FreezeError as error:
        log.warning("Nobody can be ended who is in the way of the thaw: %s", error)
    try:
        yield
    finally:
        # Else it goes on for as long as this connection lasts. Another session may have its process id by now.
        with suppress(psycopg.Error):
            conn.execute(_END_WATCH, (watch, name))


def unhindered(conn: Control, act: Callable[[], _Result]) -> _Result:
    """Return what *act* returns, which reads the journal, or writes into it, with *conn* for the sake of a thaw.

    A session that keeps that waiting, with a lock on the journal, is ended as by :func:`watched`.

    :raises psycopg.errors.LockNotAvailable: if that session could not be ended.
    """
    try:
        return act()
    except psycopg.errors.LockNotAvailable:
        with watched(conn, _ANY):
            return act()


def _watch(token: UUID, pid: int, lease: str) -> str:
    return f"CALL pgfreeze.watch('{token}', {pid}, {lease})"


def _leave_behind(connect: Connect, conn: Control, name: str, call: str) -> int:
    """Begin a CALL in a session of its own, leave that behind, and return its process id."""
    try:
        session = open_control(connect, name, lock_timeout="0", statement_timeout="0")
    except psycopg.Error as error:
        said = " ".join(str(error).split())
        raise FreezeError(
            f"the dead-man switch could not be started: {said}. It needs two sessions of its own: allow role "
            f"{conn.info.user!r}, and the server, two more connections"
        ) from error
    try:
        session.pgconn.send_query(call.encode())
        while session.pgconn.flush():
            time.sleep(0.001)
        # Sent is not started. The server shows the statement as running once it has begun it; until then
        # begin_freeze would refuse. An error of the CALL would arrive here.
        give_up = time.monotonic() + _START_WITHIN.total_seconds()
        while not _runs(conn, session.info.backend_pid, call):
            session.pgconn.consume_input()
            if not session.pgconn.is_busy():
                result = session.pgconn.get_result()
                if result is not None and result.status == ExecStatus.COMMAND_OK:
                    raise Overtaken(_OVERTAKEN)
                said = result.error_message.decode(errors="replace").strip() if result else "it ended at once"
                raise FreezeError(f"the dead-man switch did not start: {said}")
            if time.monotonic() > give_up:
                raise FreezeError(f"the dead-man switch did not start within {_START_WITHIN.seconds} s")
            time.sleep(0.002)
        return session.info.backend_pid
    finally:
        session.close()


def _runs(conn: Control, pid: int, call: str) -> bool:
    query = "SELECT true FROM pg_catalog.pg_stat_activity WHERE pid = %s AND state = 'active' AND query = %s"
    return conn.execute(query, (pid, call)).fetchone() is not None


def watches(conn: Control, token: UUID) -> bool:
    """Whether a dead-man switch watches this freeze, or waits for it to begin."""
    return conn.execute("SELECT true FROM pgfreeze.dead_men() WHERE token = %s", (token,)).fetchone() is not None
