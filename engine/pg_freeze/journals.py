"""Where the journals of a server are: in the maintenance database, and in each database that is frozen from inside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, LiteralString, TypeVar

from pg_freeze import trust
from pg_freeze.control import Connect, ConnectTo, Control, control
from pg_freeze.entrance import entered
from pg_freeze.errors import FreezeError, ServerLost, translated

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
_ENTERABLE: Final[LiteralString] = """
    SELECT datallowconn, has_database_privilege(oid, 'CONNECT') FROM pg_database WHERE datname = %s"""
_Found = TypeVar("_Found")


def frozen_inside(conn: Control, databases: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return those of *databases*, or of all, that are frozen from inside."""
    return tuple(name for name, believed, _ in _marked(conn, databases) if believed)


@contextmanager
def journal_of(
    connect: Connect, connect_to: ConnectTo | None, databases: Sequence[str], doing: str
) -> Iterator[Control]:
    """Open a control connection to the database that has the journal of a freeze of *databases*.

    :param connect_to: returns a new connection to the named database; None: only in the maintenance database.
    :param doing: what is being done, for the message of an error.
    """
    with control(connect, doing) as conn:
        if connect_to is not None:
            for name in _trusted(conn, databases):
                with entered(conn, connect_to, name, doing) as inside:
                    if trust.has_journal(inside):
                        yield inside
                        return
        yield conn


def _trusted(conn: Control, databases: Sequence[str] | None) -> list[str]:
    """Return those of *databases*, or of all, that a role whose code we run has marked as frozen from inside."""
    trusted = set(trust.trusted_roles(conn))
    return [name for name, _, whose in _marked(conn, databases) if trusted.intersection(whose)]


def _marked(conn: Control, databases: Sequence[str] | None) -> list[tuple[str, bool, list[int]]]:
    """Return each marked database, whether the mark keeps others from freezing it, and whose it is."""
    return conn.execute(_MARKED, {"names": None if databases is None else list(databases)}).fetchall()


def in_each_journal(
    conn: Control,
    connect_to: ConnectTo | None,
    databases: Sequence[str] | None,
    act: Callable[[Control, Sequence[str] | None], _Found],
    *,
    doing: str,
    unmarked: Callable[[_Found], bool] = lambda _: False,
) -> tuple[_Found, ...]:
    """Call *act* here, and in each of *databases*, or of all, that a role we trust has marked as frozen from inside.

    What fails in one place keeps it from no other, and is raised at the end. A mark of another role is only logged.

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
        marked = _trusted(conn, databases)
        more = [name for name in databases or () if everybody and name not in marked]
        for name, _, _ in _marked(conn, databases):
            if name not in (*marked, *more):
                # Its journal we could not use. And it could have us wait at one locked door after another.
                log.warning("%r may be frozen from inside, but by no role whose code we run: look as that one", name)
        for name in (*marked, *more):
            if name in more and way_in(conn, name) != (True, True):
                continue
            try:
                with entered(conn, connect_to, name, f"{doing} inside {name!r}") as inside:
                    # Where there is none now, one that is there a moment later may be anybody's.
                    if trust.has_journal(inside):
                        found.append(act(inside, [name]))
            except FreezeError as error:
                if name in marked:
                    failed = failed or error
                else:
                    log.debug("could not look into %r: %s", name, error)
                    conn.execute("SELECT")  # unless it is the server that is gone
    if failed is not None:
        raise failed
    return tuple(found)


def way_in(conn: Control, name: str) -> tuple[bool, bool] | None:
    """Return whether a database is open, and open to us; None if it is not there."""
    row = conn.execute(_ENTERABLE, (name,)).fetchone()
    return None if row is None else (row[0], row[1])
