"""Tells a server that refuses a connection from one that cannot be reached.

libpq keeps the server's words of a connection that failed, in the server's language, and not the SQLSTATE. In a trace
of the protocol the SQLSTATE is there. So the server is asked once more.
"""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import psycopg
from psycopg import pq
from psycopg.conninfo import make_conninfo

#: Seconds that the server may take to refuse once more.
_PATIENCE: Final = 2.0
# The C comes before every text of the server.
_ANSWERED: Final = re.compile(rb'ErrorResponse.*? C "([0-9A-Z]{5})"')
# No right to log in, a wrong password, no such database.
_FOR_GOOD: Final = ("28000", "28P01", "3D000")


def refusal(parameters: Mapping[str, Any], error: psycopg.OperationalError) -> psycopg.Error:
    """Return what a connection failed with: *error*, or the same with a SQLSTATE, if no retry can cure it.

    That is a wrong user, password or database, and what pg_hba.conf does not let in.

    :param parameters: libpq's.
    """
    state = _asked(parameters)
    return psycopg.errors.lookup(state)(str(error)) if state is not None and state in _FOR_GOOD else error


def _asked(parameters: Mapping[str, Any]) -> str | None:
    """Connect, and return the SQLSTATE with which the server refuses; None if it does not, or cannot be reached."""
    state = None
    # Of Linux alone. The trace holds what is sent, so it goes to memory, and nowhere else.
    with suppress(psycopg.Error, AttributeError, OSError, ValueError):
        trace = os.memfd_create("pg-freeze")
        try:
            conn = pq.PGconn.connect_start(make_conninfo("", **parameters).encode())
            try:
                conn.trace(trace)
                _wait(conn)
                conn.untrace()  # which writes out what is buffered
            finally:
                conn.finish()
            answers = _ANSWERED.findall(os.pread(trace, os.fstat(trace).st_size, 0))
            # Refused with encryption, libpq may try without.
            state = answers[-1].decode() if answers else None
        finally:
            os.close(trace)
    return state


def _wait(conn: pq.abc.PGconn) -> None:
    """Wait until a connection is there, or failed, or has taken too long."""
    end = time.monotonic() + _PATIENCE
    read: list[int] = []
    write = [conn.socket]
    while (left := end - time.monotonic()) > 0:
        select.select(read, write, [], left)
        match conn.connect_poll():
            case pq.PollingStatus.READING:
                read, write = [conn.socket], []
            case pq.PollingStatus.WRITING:
                read, write = [], [conn.socket]
            case _:
                return
