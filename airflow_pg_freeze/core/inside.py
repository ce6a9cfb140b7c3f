"""Freezes from inside: those by the strategy privileges, whose journal is in the frozen database itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, LiteralString, TypeVar

from airflow_pg_freeze.core.control import Connect, ConnectTo, Control, control
from airflow_pg_freeze.core.errors import FreezeRefused
from airflow_pg_freeze.core.model import Freeze, Strategy
from airflow_pg_freeze.core.request import check_known

# Its dead-man switch is seen from everywhere, but only believed of a role that may use the journal here, or of ours: a
# name is anybody's choice.
_ELSEWHERE: Final[LiteralString] = """
    SELECT DISTINCT a.datname::text FROM pg_stat_activity a
     WHERE a.datname <> current_database() AND (%(names)s::text[] IS NULL OR a.datname::text = ANY (%(names)s))
       AND a.application_name LIKE 'pg-freeze dead-man %%' AND a.query LIKE 'CALL airflow_pg_freeze.dead_man(%%'
       AND a.state = 'active'
       AND (a.usename = current_user
            OR COALESCE(has_schema_privilege(a.usesysid, to_regnamespace('airflow_pg_freeze'), 'USAGE'), false))
     ORDER BY 1"""
_ENTERABLE: Final[LiteralString] = """
    SELECT datallowconn, has_database_privilege(oid, 'CONNECT') FROM pg_database WHERE datname = %s"""
_Found = TypeVar("_Found")


def elsewhere(conn: Control, databases: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return those of *databases*, or of all, that are frozen from inside."""
    names = None if databases is None else list(databases)
    return tuple(name for (name,) in conn.execute(_ELSEWHERE, {"names": names}))


def look_inside(
    conn: Control,
    connect_to: ConnectTo,
    databases: Sequence[str] | None,
    act: Callable[[Control, str], _Found],
    *,
    doing: str,
    unseen: bool,
) -> tuple[_Found, ...]:
    """Call *act* in each of *databases*, or of all, that is frozen from inside, and return what it returned.

    :param doing: what is being done, for the message of an error.
    :param unseen: look into each of *databases*: after a restart of the server no dead-man switch tells of a freeze.
    :raises FreezeRefused: if we may not use the journal of one that is known to be frozen.
    """
    seen = elsewhere(conn, databases)
    found = []
    for name in [one for one in databases or () if _way_in(conn, one) == (True, True)] if unseen else seen:
        try:
            with control(partial(connect_to, name), f"{doing} inside {name!r}") as inside:
                found.append(act(inside, name))
        except FreezeRefused:  # somebody else's journal
            if name in seen:
                raise
    return tuple(found)


def journal_of(freeze: Freeze, connect: Connect, connect_to: ConnectTo) -> Connect:
    """Return what connects to the journal of a freeze."""
    return partial(connect_to, freeze.databases[0]) if freeze.strategy is Strategy.PRIVILEGES else connect


def check_enterable(conn: Control, name: str) -> None:
    """Raise FreezeRefused for a database that is not there, closed, or closed to us."""
    check_known(conn, [name])
    opened, admitted = _way_in(conn, name) or (True, True)
    if not opened:
        raise FreezeRefused(f"database {name!r} is closed, perhaps by a freeze: see pg-freeze status")
    if not admitted:
        role = conn.info.user
        raise FreezeRefused(f"role {role!r} may not connect to {name!r}: GRANT CONNECT ON DATABASE {name} TO {role};")


def _way_in(conn: Control, name: str) -> tuple[bool, bool] | None:
    """Return whether a database is open, and open to us; None if it is not there."""
    row = conn.execute(_ENTERABLE, (name,)).fetchone()
    return None if row is None else (row[0], row[1])
