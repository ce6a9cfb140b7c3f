"""The inner structure of tables and B-trees, looked at by amcheck, where it is installed on this machine.

The extension is made for the time of one transaction, which is rolled back. One that the copy has is taken away for
that time: its functions may be others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final, LiteralString

import psycopg
from psycopg import sql

from pg_freeze.control import Control
from pg_freeze.copies.relations import Findings, Index, Table, attempt, indexes, one, said

_INSTALLED: Final[LiteralString] = "SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'amcheck')"
_MAKE: Final[tuple[LiteralString, ...]] = (
    "DROP EXTENSION IF EXISTS amcheck CASCADE",
    "DROP SCHEMA IF EXISTS pgfreeze_amcheck CASCADE",
    "CREATE SCHEMA pgfreeze_amcheck",
    "CREATE EXTENSION amcheck WITH SCHEMA pgfreeze_amcheck",
)
_TABLE: Final = sql.SQL(
    """SELECT blkno, offnum, msg
         FROM pgfreeze_amcheck.verify_heapam({}::bigint::oid::regclass, check_toast => true) LIMIT 3"""
)
# The second argument: each row of the table has its entry.
_TREE: Final = sql.SQL("SELECT pgfreeze_amcheck.bt_index_check({}::bigint::oid::regclass, true)")


def check(conn: Control, database: str, tables: Iterable[Table], without: Collection[int], found: Findings) -> None:
    """Look at each table and each of its B-trees, but for those *without* a look."""
    what = f"the inner structure of tables and indexes of {database!r}"
    if not one(conn, _INSTALLED):
        found.unseen.append(f"{what}: amcheck is not installed here")
        return
    with conn.transaction(force_rollback=True):
        try:
            with conn.transaction():
                for statement in _MAKE:
                    conn.execute(statement)
        except psycopg.Error as error:
            if conn.broken or conn.closed:
                raise
            found.unseen.append(f"{what}: amcheck cannot be made ({said(error)})")
            return
        theirs = indexes(conn, without)
        for table in tables:
            if table.persistence != "u":
                _check(conn, database, table, theirs[table.oid], found)


def _check(conn: Control, database: str, table: Table, its: Iterable[Index], found: Findings) -> None:
    for block, item, what in attempt(conn, found, f"{table} of {database!r}", _TABLE.format(table.oid)) or ():
        found.problems.append(f"{table} of {database!r}: block {block}, item {item}: {what}")
    for index in its:
        if index.valid and index.method == "btree":
            attempt(conn, found, f"index {index.name} of {database!r}", _TREE.format(index.oid))
