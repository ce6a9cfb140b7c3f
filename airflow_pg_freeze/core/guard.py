"""Thaws what has outlived its lease: for freezes whose dead-man switch is gone, as after a restart of the server."""

from __future__ import annotations

import psycopg

from airflow_pg_freeze.core import journal
from airflow_pg_freeze.core.control import Connect, control
from airflow_pg_freeze.core.errors import NOT_ALL_THAWED, ThawFailed
from airflow_pg_freeze.core.model import Freeze


def thaw_expired(connect: Connect) -> tuple[Freeze, ...]:
    """Thaw every freeze of the server whose lease has ended, and return them; none where there is no journal.

    :raises ThawFailed: if one of them could not be thawed. It does not keep back the others.
    :raises ServerLost: if the server cannot be reached.
    :raises FreezeRefused: without the right to use the journal.
    """
    with control(connect, "guard") as conn:
        if not journal.require(conn):
            return ()
        row = conn.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        expired = [freeze for freeze in journal.active(conn) if freeze.lease_until <= row[0]]
        if not expired:
            return ()
        try:
            conn.execute("CALL airflow_pg_freeze.thaw_expired()")
        except psycopg.Error as error:
            if error.sqlstate != NOT_ALL_THAWED:
                raise
            raise ThawFailed(
                f"{error.diag.message_primary} As the role that froze it or a superuser, in psql: "
                "CALL airflow_pg_freeze.thaw_all()"
            ) from error
        # One whose lease was extended in between is left as it is.
        return tuple(after for after in (journal.by_token(conn, one.token) for one in expired) if not after.holds)
