"""Tables and indexes of a database of a copy, and what was found about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final, LiteralString, NamedTuple

import psycopg
from psycopg import sql

from pg_freeze.control import Control

_TABLES: Final[LiteralString] = """
    SELECT c.oid::bigint, n.nspname::text, c.relname::text, c.relkind::text, c.relpersistence::text, a.amname::text,
           c.relpages, c.reltuples::bigint, pg_relation_size(c.oid) / current_setting('block_size')::bigint
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_am a ON a.oid = c.relam
     WHERE c.relkind IN ('r', 'm', 't') AND c.relpersistence <> 't' AND c.oid <> ALL (%s::bigint[]::oid[])
     ORDER BY c.oid"""
# What a prepared transaction has locked stays so: VACUUM, or to read a sequence, would wait for ever. With a table its
# indexes and its out-of-line values are left alone, and a table for one of those.
_LOCKED: Final[LiteralString] = """
    WITH locked AS (
         SELECT l.relation FROM pg_locks l JOIN pg_database d ON d.oid = l.database
          WHERE l.locktype = 'relation' AND l.pid IS NULL AND d.datname = current_database()
            AND l.mode IN ('ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock',
                           'AccessExclusiveLock')),
         tables AS (
         SELECT c.oid, c.reltoastrelid FROM pg_class c
          WHERE c.oid IN (SELECT relation FROM locked)
             OR c.reltoastrelid <> 0 AND c.reltoastrelid IN (SELECT relation FROM locked)
             OR c.oid IN (SELECT i.indrelid FROM pg_index i WHERE i.indexrelid IN (SELECT relation FROM locked)))
    SELECT DISTINCT c.oid::bigint, n.nspname || '.' || c.relname
      FROM tables t JOIN pg_class c ON c.oid IN (t.oid, t.reltoastrelid) JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'm', 't', 'S') ORDER BY 1"""
_INDEXES: Final[LiteralString] = """
    SELECT i.indrelid::bigint, i.indexrelid::bigint, i.indexrelid::regclass::text, a.amname::text,
           i.indisvalid AND i.indisready, pg_get_expr(i.indpred, i.indrelid), i.indnkeyatts::integer
      FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam
     WHERE i.indrelid <> ALL (%s::bigint[]::oid[]) ORDER BY i.indexrelid"""


class Table(NamedTuple):
    """A relation that has rows."""

    oid: int
    schema: str
    name: str
    kind: str
    persistence: str
    method: str | None
    pages_then: int
    rows_then: int
    pages: int

    def __str__(self) -> str:
        """Return its name for people."""
        return f"{self.schema}.{self.name}"

    @property
    def quoted(self) -> sql.Identifier:
        """Its name in a statement."""
        return sql.Identifier(self.schema, self.name)


class Index(NamedTuple):
    """An index of a table."""

    oid: int
    name: str
    method: str
    valid: bool
    predicate: str | None
    keys: int


@dataclass(slots=True)
class Findings:
    """What is wrong, and what was not looked at."""

    problems: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)


def locked(conn: Control) -> dict[int, str]:
    """Return the tables and sequences that a prepared transaction has locked, by their OIDs, with their names."""
    return dict(conn.execute(_LOCKED).fetchall())


def tables_of(conn: Control, without: Collection[int]) -> list[Table]:
    """Return all relations that have rows, and whose files are in the copy, but for those *without* a look."""
    return [Table(*row) for row in conn.execute(_TABLES, (list(without),))]


def indexes(conn: Control, without: Collection[int]) -> dict[int, list[Index]]:
    """Return the indexes of each table, by its OID, but for those *without* a look."""
    found: dict[int, list[Index]] = defaultdict(list)
    for table, *index in conn.execute(_INDEXES, (list(without),)):
        found[table].append(Index(*index))
    return found


def in_one_trip(conn: Control, *statements: sql.Composed | sql.SQL) -> list[list[Any]]:
    """Run statements one after the other in one round trip, since there may be thousands of tables.

    :returns: the rows of each of them that has rows.
    :raises psycopg.Error: of the first that fails; those after it are not run.
    """
    cursor = conn.execute(sql.SQL("; ").join(statements))
    rows: list[list[Any]] = []
    while True:
        if cursor.description:
            rows.append(cursor.fetchall())
        if not cursor.nextset():
            return rows


_BEGUN: Final = sql.SQL("SAVEPOINT attempt")
_UNDONE: Final = sql.SQL("ROLLBACK TO SAVEPOINT attempt")


def attempt(conn: Control, found: Findings, title: str, statement: sql.Composed | sql.SQL) -> list[Any] | None:
    """Run a statement; an error of it is a problem of *title*. Return its rows, or None."""
    # In a transaction it is undone, with its locks: there may be more tables than locks.
    inside = conn.info.transaction_status is psycopg.pq.TransactionStatus.INTRANS
    try:
        rows = in_one_trip(conn, _BEGUN, statement, _UNDONE) if inside else in_one_trip(conn, statement)
        return rows[0] if rows else [True]
    except psycopg.Error as error:
        if conn.broken or conn.closed:
            raise
        if inside:
            conn.execute(_UNDONE)
        found.problems.append(f"{title}: {said(error)}")
        return None


def said(error: psycopg.Error) -> str:
    """Return what the server said, in one line."""
    return " ".join((error.diag.message_primary or str(error)).split())


def one(conn: Control, query: LiteralString | sql.Composed) -> Any:
    """Return the one value that a query has."""
    row = conn.execute(query).fetchone()
    assert row is not None
    return row[0]
