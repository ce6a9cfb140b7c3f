"""Freezes from inside: those by the strategy privileges, whose journal is in the frozen database itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, LiteralString, TypeVar

from psycopg import sql

from airflow_pg_freeze.core.control import Connect, ConnectTo, Control, control
from airflow_pg_freeze.core.errors import FreezeError, FreezeRefused, ServerLost, translated
from airflow_pg_freeze.core.model import Freeze, Strategy
from airflow_pg_freeze.core.request import check_known

log = logging.getLogger(__name__)

# The mark that the freezing transaction leaves, and the thawing one takes away. Any role may have such a setting: that
# of a role that could not have put a journal there keeps nobody from freezing.
_MARKED: Final[LiteralString] = """
    SELECT d.datname::text, bool_or(has_database_privilege(s.setrole, d.oid, 'CREATE')), array_agg(s.setrole)
      FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase, unnest(s.setconfig) AS c (entry)
     WHERE d.datname <> current_database() AND s.setrole <> 0
       AND starts_with(c.entry, 'application_name=pg-freeze inside ')
       AND (%(names)s::text[] IS NULL OR d.datname::text = ANY (%(names)s))
     GROUP BY d.datname ORDER BY d.datname"""
# Whose code we run: our own, superusers', and that of roles that somebody has let use the journal here.
_TRUSTED: Final[LiteralString] = """
    SELECT oid FROM pg_roles
     WHERE rolsuper OR rolname = current_user
        OR COALESCE(has_schema_privilege(oid, to_regnamespace('airflow_pg_freeze'), 'USAGE'), false)"""
_OWNERS: Final[LiteralString] = """
    SELECT DISTINCT r.oid, r.rolname::text
      FROM pg_namespace n
     CROSS JOIN LATERAL (SELECT n.nspowner UNION SELECT relowner FROM pg_class WHERE relnamespace = n.oid
                          UNION SELECT proowner FROM pg_proc WHERE pronamespace = n.oid) AS o (oid)
      JOIN pg_roles r ON r.oid = o.oid
     WHERE n.nspname = 'airflow_pg_freeze'"""
_ENTERABLE: Final[LiteralString] = """
    SELECT datallowconn, has_database_privilege(oid, 'CONNECT') FROM pg_database WHERE datname = %s"""
_Found = TypeVar("_Found")


def elsewhere(conn: Control, databases: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return those of *databases*, or of all, that are frozen from inside."""
    return tuple(name for name, believed, _ in _marked(conn, databases) if believed)


def _marked(conn: Control, databases: Sequence[str] | None) -> list[tuple[str, bool, list[int]]]:
    """Return each marked database, whether the mark keeps others from freezing it, and whose it is."""
    return conn.execute(_MARKED, {"names": None if databases is None else list(databases)}).fetchall()


def trusted_by(conn: Control) -> list[int]:
    """Return the roles whose journals we use: ourselves, superusers, and whoever may use that of this database."""
    return [oid for (oid,) in conn.execute(_TRUSTED)]


def everywhere(
    conn: Control,
    connect_to: ConnectTo | None,
    databases: Sequence[str] | None,
    act: Callable[[Control, Sequence[str] | None], _Found],
    *,
    doing: str,
    unmarked: Callable[[_Found], bool] = lambda _: False,
) -> tuple[_Found, ...]:
    """Call *act* here, and in each of *databases*, or of all, that is marked as frozen from inside.

    What fails in one place keeps it from no other, and is raised at the end. A database is no failure that we may not
    enter, or whose journal is not ours to use, and that nobody has marked whom we trust.

    :param conn: a control connection to the maintenance database.
    :param connect_to: returns a new connection to the named database; None: only here.
    :param act: is given a connection, and the databases to look at there.
    :param doing: what is being done, for the message of an error.
    :param unmarked: whether, after what was found here, to look into all of *databases*: an attempt may be under way
        there that has frozen nothing yet.
    :returns: what *act* returned in each place.
    """
    found: list[_Found] = []
    failed: FreezeError | None = None
    everybody = False
    try:
        with translated(doing):
            found.append(act(conn, databases))
            everybody = unmarked(found[0])
    except ServerLost:
        raise
    except FreezeError as error:
        failed = error
    if connect_to is not None:
        trusted = trusted_by(conn)
        marked = {name: bool(set(whose) & set(trusted)) for name, _, whose in _marked(conn, databases)}
        more = [name for name in databases or () if everybody and name not in marked]
        for name in (*marked, *more):
            if name in more and _way_in(conn, name) != (True, True):
                continue
            try:
                with control(partial(connect_to, name), f"{doing} inside {name!r}") as inside:
                    # Where there is none now, one that is there a moment later may be anybody's.
                    if has_trusted_journal(inside, trusted):
                        found.append(act(inside, [name]))
            except FreezeError as error:
                if marked.get(name):
                    failed = failed or error
                else:
                    log.log(
                        logging.WARNING if name in marked else logging.DEBUG,
                        "%r may be frozen from inside, and could not be looked into: %s",
                        name,
                        error,
                    )
                    conn.execute("SELECT")  # unless it is the server that is gone
    if failed is not None:
        raise failed
    return tuple(found)


def has_trusted_journal(conn: Control, trusted: Sequence[int]) -> bool:
    """Return whether there is a journal here, all of which belongs to these roles: nobody else can replace it then.

    :raises FreezeRefused: if some of it belongs to somebody else: its code would run with our rights.
    """
    owners = conn.execute(_OWNERS).fetchall()
    for oid, name in owners:
        if oid not in trusted:
            raise FreezeRefused(
                f"the schema airflow_pg_freeze in {conn.info.dbname!r} belongs to role {name!r}, whose code would run "
                f"with the rights of {conn.info.user!r}: go on as that role; or let it use the journal of the "
                "maintenance database (pg-freeze install --grant ROLE); or drop the schema, which is not ours then"
            )
    return bool(owners)


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
        grant = sql.SQL("GRANT CONNECT ON DATABASE {} TO {};").format(sql.Identifier(name), sql.Identifier(role))
        raise FreezeRefused(f"role {role!r} may not connect to {name!r}: {grant.as_string()}")


def _way_in(conn: Control, name: str) -> tuple[bool, bool] | None:
    """Return whether a database is open, and open to us; None if it is not there."""
    row = conn.execute(_ENTERABLE, (name,)).fetchone()
    return None if row is None else (row[0], row[1])
