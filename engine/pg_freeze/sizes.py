"""How large each relation is while a database is frozen: a copy in which one is smaller has lost something.

A closed database cannot be entered to look at its relations: then it is the size of the whole that is recorded, which
the server tells from outside.

Nobody writes then, so nothing grows; and nothing shrinks, but for what vacuum gives back. It takes no lock that anybody
would wait for, and need not be done at the moment of the snapshot.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Final, LiteralString

import psycopg

from pg_freeze.control import Control
from pg_freeze.entrance import Entrances, in_a_line
from pg_freeze.errors import FreezeError

#: By the OID of a database as text: its name, and either its relations (OID, name, file number, bytes) or why not, and
#: then the bytes of the whole database, if they are known.
Sizes = dict[str, dict[str, Any]]

_PATIENCE: Final = 2.0
# To ask for the size of what a prepared transaction has locked would take until that ends.
# Unlogged relations are emptied when a copy recovers, and temporary ones are nobody's.
_SIZES: Final[LiteralString] = """
    SELECT c.oid::bigint, n.nspname || '.' || c.relname, pg_relation_filenode(c.oid)::bigint, pg_relation_size(c.oid)
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'm', 't', 'i', 'S') AND c.relpersistence = 'p'
       AND c.oid NOT IN (SELECT l.relation FROM pg_locks l JOIN pg_database d ON d.oid = l.database
                          WHERE l.locktype = 'relation' AND l.pid IS NULL AND l.mode = 'AccessExclusiveLock'
                            AND d.datname = current_database())
     ORDER BY c.oid"""
# In this many bytes two equal databases may differ: each has a file that its first session after a start writes anew.
_SLACK: Final = 256 * 1024
_WHOLE: Final[LiteralString] = """
    SELECT oid::bigint, pg_database_size(oid) FROM pg_database WHERE datname = %s"""
# What is unlogged is part of the whole, and empty in a copy.
_WHOLE_IN_COPY: Final[LiteralString] = """
    SELECT pg_database_size(current_database()), EXISTS (SELECT FROM pg_class WHERE relpersistence = 'u')"""
_LOCKED: Final[LiteralString] = """
    SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database
     WHERE l.locktype = 'relation' AND l.pid IS NULL AND d.datname = current_database()
       AND l.relation = %s::bigint::oid"""
_OID: Final[LiteralString] = "SELECT oid::bigint FROM pg_database WHERE datname = current_database()"


def record(entrances: Entrances) -> Sizes:
    """Return the sizes in each of the databases. Never raises: what could not be looked at says why."""
    found: Sizes = {}
    for number, name in enumerate(entrances.names):
        try:
            conn = entrances.session(name)
            conn.execute("SELECT set_config('statement_timeout', '60s', false)")
            row = conn.execute(_OID).fetchone()
            assert row is not None
            found[str(row[0])] = {"name": name, "relations": [list(one) for one in conn.execute(_SIZES)]}
        except (psycopg.Error, FreezeError) as error:
            found |= _whole(entrances, name, number, in_a_line(error))
    return found


def _whole(entrances: Entrances, name: str, number: int, why: str) -> Sizes:
    """Return the size of a database that cannot be entered, or that not even that is known."""
    try:
        row = entrances.beside().execute(_WHOLE, (name,)).fetchone()
    except (psycopg.Error, FreezeError) as error:
        why, row = f"{why}; nor from outside: {in_a_line(error)}", None
    if row is None:
        return {f"unseen {number}": {"name": name, "unseen": why}}
    return {str(row[0]): {"name": name, "unseen": why, "bytes": row[1]}}


class Recording:
    """Sizes that are recorded while something else is done, since thousands of them take the better part of 1 s."""

    def __init__(self, entrances: Entrances) -> None:
        """Begin. Until :meth:`done` the sessions are in use."""
        self._entrances = entrances
        self._found: Sizes | None = None
        self._thread = entrances.busy = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def _record(self) -> None:
        self._found = record(self._entrances)

    def done(self) -> Sizes | None:
        """Return what was recorded, at most 2 s from now; None if it takes longer: it would be of after the thaw."""
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self._entrances.abandon()
            return None
        return self._found


def checked(kept: object) -> Sizes | None:
    """Return sizes that come from somebody else, once their form is known to be ours.

    :raises ValueError: if it is not.
    """
    if kept is None:
        return None
    if not isinstance(kept, dict):
        raise ValueError("the sizes of relations are no object")
    for one in kept.values():
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise ValueError("the sizes of relations have another form")
        if type(one.get("bytes", 0)) is not int:
            raise ValueError("the size of a database is no number")
        for relation in one.get("relations") or ():
            oid, title, file, size = relation
            if not (type(oid) is type(size) is int and isinstance(title, str) and isinstance(file, int | None)):
                raise ValueError("the sizes of relations have another form")
    return kept


def compare(conn: Control, kept: Sizes | None, oid: int, name: str) -> Iterator[tuple[bool, str]]:
    """Yield what is smaller in a copy than it was while frozen, and what could not be compared.

    :param conn: to the database in the copy.
    :param kept: what :func:`record` has returned; None if it is not known.
    :returns: whether it is a problem, and what it is.
    """
    recorded = (kept or {}).get(str(oid), {})
    if not recorded.get("relations") and recorded.get("bytes"):
        yield from _compare_whole(conn, recorded, name)
        return
    if not recorded.get("relations"):
        why = next((one.get("unseen") for one in (kept or {}).values() if one["name"] == name), None)
        yield (
            False,
            f"the sizes of the relations of {name!r}: none were recorded while it was frozen"
            + (f" ({why})" if why else ""),
        )
        return
    now = {row[0]: row for row in conn.execute(_SIZES)}
    for relation, title, file, size in recorded["relations"]:
        found = now.get(relation)
        if found is None and conn.execute(_LOCKED, (relation,)).fetchone() is not None:
            yield False, f"the size of {title} of {name!r}: a prepared transaction has it locked"
        elif found is None:
            yield True, f"{title} of {name!r} was there while it was frozen, and is not in the copy"
        elif found[2] == file and found[3] < size:
            yield True, f"{title} of {name!r} has {found[3]} bytes, and had {size} while it was frozen"
        elif found[2] != file:
            yield False, f"the size of {title} of {name!r}: it was rewritten meanwhile"


def recorded(kept: Sizes | None, oid: int) -> frozenset[int]:
    """Return the relations of a database whose sizes are known from while it was frozen, by their OIDs."""
    return frozenset(one[0] for one in (kept or {}).get(str(oid), {}).get("relations") or ())


def _compare_whole(conn: Control, recorded: dict[str, Any], name: str) -> Iterator[tuple[bool, str]]:
    row = conn.execute(_WHOLE_IN_COPY).fetchone()
    assert row is not None
    now, unlogged = row
    why = f"only that of the whole was recorded while it was frozen ({recorded.get('unseen')})"
    if unlogged:
        yield False, f"the sizes of the relations of {name!r}: {why}, and part of it is unlogged, so empty in a copy"
        return
    yield False, f"the sizes of the single relations of {name!r}: {why}"
    if now + _SLACK < recorded["bytes"]:
        yield True, f"{name!r} has {now} bytes, and had {recorded['bytes']} while it was frozen"
