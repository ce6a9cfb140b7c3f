"""Starts the dead-man switch: a server session that thaws when the lease ends, whatever becomes of us.

It is started *before* the freeze is committed, and the freezing transaction checks that it is there: no death of this
process, at any statement, leaves a freeze that nothing in the server watches.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Final
from uuid import UUID

import psycopg
from psycopg.pq import ExecStatus

from airflow_pg_freeze.core.control import Connect, Control, open_control
from airflow_pg_freeze.core.errors import FreezeError, Overtaken

_START_WITHIN: Final = timedelta(seconds=10)
_FREEZES_WITHIN: Final = timedelta(minutes=1)


def start(connect: Connect, conn: Control, token: UUID, ticket: int, patience: timedelta = _FREEZES_WITHIN) -> None:
    """Start a dead-man switch for this freeze in a session of its own, and leave that session behind.

    :param conn: a control connection, to see it start.
    :param patience: how long it waits for the freeze to begin; then it voids the ticket and ends.

    The client's side is closed at once. The server's goes on: while it runs a statement it does not look at its socket
    (``client_connection_check_interval = 0``), and it ends by itself when the freeze is over.

    :raises Overtaken: if there is nothing to watch any more: the ticket is void, or the freeze to adopt thawed.
    :raises FreezeError: if the session cannot be opened, or ends at once.
    """
    try:
        session = open_control(connect, f"pg-freeze dead-man {token}", lock_timeout="0")
    except psycopg.Error as error:
        said = " ".join(str(error).split())
        raise FreezeError(
            f"the dead-man switch could not be started: {said}. It needs a session of its own: allow role "
            f"{conn.info.user!r}, and the server, one more connection"
        ) from error
    try:
        seconds = patience.total_seconds()
        session.pgconn.send_query(f"CALL airflow_pg_freeze.dead_man('{token}', {int(ticket)}, '{seconds} s')".encode())
        while session.pgconn.flush():
            time.sleep(0.001)
        # Sent is not started. The server shows the statement as running once it has begun it; until then
        # begin_freeze would refuse. An error of the CALL would arrive here.
        give_up = time.monotonic() + _START_WITHIN.total_seconds()
        while not watches(conn, token):
            session.pgconn.consume_input()
            if not session.pgconn.is_busy():
                result = session.pgconn.get_result()
                if result is not None and result.status == ExecStatus.COMMAND_OK:
                    raise Overtaken("resumed or thawed by somebody, in the moment before this attempt could freeze")
                said = result.error_message.decode(errors="replace").strip() if result else "it ended at once"
                raise FreezeError(f"the dead-man switch did not start: {said}")
            if time.monotonic() > give_up:
                raise FreezeError(f"the dead-man switch did not start within {_START_WITHIN.seconds} s")
            time.sleep(0.002)
    finally:
        session.close()


def watches(conn: Control, token: UUID) -> bool:
    """Whether a dead-man switch watches this freeze, or waits for it to begin."""
    return (
        conn.execute("SELECT true FROM airflow_pg_freeze.dead_men() WHERE token = %s", (token,)).fetchone() is not None
    )
