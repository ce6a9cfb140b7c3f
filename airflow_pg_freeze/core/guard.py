"""Thaws what has outlived its lease: for freezes whose dead-man switch is gone, as after a restart of the server."""

from __future__ import annotations

import psycopg

from airflow_pg_freeze.core import journal, schema
from airflow_pg_freeze.core.control import Connect, ConnectTo, Control, control
from airflow_pg_freeze.core.errors import NOT_ALL_THAWED, ThawFailed
from airflow_pg_freeze.core.inside import everywhere
from airflow_pg_freeze.core.model import Freeze


def thaw_expired(connect: Connect, connect_to: ConnectTo) -> tuple[Freeze, ...]:
    """Thaw every freeze of the server whose lease has ended, and return them; none where there is no journal.

    :param connect_to: returns a new connection to the named database, to thaw what is frozen from inside.
    :raises ThawFailed: if one of them could not be thawed. It does not keep back the others.
    :raises ServerLost: if the server, or a database that is frozen from inside, cannot be reached.
    :raises FreezeRefused: without the right to use a journal.
    """
    with control(connect, "guard") as conn:
        places = everywhere(conn, connect_to, None, lambda place, _: _thaw_expired(place), doing="guard")
    return tuple(freeze for thawed in places for freeze in thawed)


def _thaw_expired(conn: Control) -> tuple[Freeze, ...]:
    if not schema.require(conn):
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
            f"{error.diag.message_primary} As the role that froze it or a superuser, in psql, in {conn.info.dbname}: "
            "CALL airflow_pg_freeze.thaw_all()"
        ) from error
    # One whose lease was extended in between is left as it is.
    thawed = tuple(after for after in (journal.by_token(conn, one.token) for one in expired) if not after.holds)
    for freeze in thawed:
        journal.check_given_back(conn, freeze)
    return thawed
