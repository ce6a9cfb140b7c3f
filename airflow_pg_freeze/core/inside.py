"""Freezes from inside: those by the strategy privileges, whose journal is in the frozen database itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, LiteralString, TypeVar

from airflow_pg_freeze.core.control import Connect, ConnectTo, Control, control
from airflow_pg_freeze.core.errors import FreezeError, FreezeRefused, ServerLost
from airflow_pg_freeze.core.model import Freeze, Strategy
from airflow_pg_freeze.core.request import check_known

log = logging.getLogger(__name__)

# The mark that the freezing transaction leaves, and the thawing one takes away. Any role may have such a setting: it is
# only believed of ours, and of one that may use the journal here.
_MARKED: Final[LiteralString] = """
    SELECT d.datname::text, bool_or(s.setrole = (SELECT oid FROM pg_roles WHERE rolname = current_user) OR COALESCE(
               has_schema_privilege(s.setrole, to_regnamespace('airflow_pg_freeze'), 'USAGE'), false))
      FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase, unnest(s.setconfig) AS c (entry)
     WHERE d.datname <> current_database() AND s.setrole <> 0
       AND starts_with(c.entry, 'application_name=pg-freeze inside ')
       AND (%(names)s::text[] IS NULL OR d.datname::text = ANY (%(names)s))
     GROUP BY d.datname ORDER BY d.datname"""
_ENTERABLE: Final[LiteralString] = """
    SELECT datallowconn, has_database_privilege(oid, 'CONNECT') FROM pg_database WHERE datname = %s"""
_Found = TypeVar("_Found")


def elsewhere(conn: Control, databases: Sequence[str]) -> tuple[str, ...]:
    """Return those of *databases* that are frozen from inside."""
    return tuple(name for name, believed in _marked(conn, databases).items() if believed)


def _marked(conn: Control, databases: Sequence[str] | None) -> dict[str, bool]:
    return dict(conn.execute(_MARKED, {"names": None if databases is None else list(databases)}).fetchall())


def look_inside(
    conn: Control,
    connect_to: ConnectTo,
    databases: Sequence[str] | None,
    act: Callable[[Control, str], _Found],
    *,
    doing: str,
    unmarked: bool = False,
) -> tuple[_Found, ...]:
    """Call *act* in each of *databases*, or of all, that is marked as frozen from inside; return what it returned.

    :param doing: what is being done, for the message of an error.
    :param unmarked: look into each of *databases*: an attempt may be under way there that has frozen nothing yet. Only
        where we may; what cannot be seen there is no error.
    :raises FreezeRefused: if we may not use the journal of one that is frozen, after a look at the others.
    :raises ServerLost: if we cannot connect to one that is frozen, likewise.
    """
    marked = _marked(conn, databases)
    more = [name for name in databases or () if unmarked and name not in marked and _way_in(conn, name) == (True, True)]
    found = []
    failed: FreezeError | None = None
    for name in (*marked, *more):
        try:
            with control(partial(connect_to, name), f"{doing} inside {name!r}") as inside:
                found.append(act(inside, name))
        except (FreezeRefused, ServerLost) as error:
            if marked.get(name):
                failed = failed or error
            else:
                log.info("Could not look inside %r, which may be frozen from there: %s", name, error)
                conn.execute("SELECT")  # unless it is the server that is gone
    if failed is not None:
        raise failed
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
