"""Tables and indexes of a copy against each other, and whatever else of a database can be read to its end.

A lost page of a table is empty, and an empty page is no error: neither to a checksum, nor to amcheck, which looks from
the table to its indexes only. So each B-tree is read from one end to the other, each of its entries is looked up in the
table, and that is counted by the server's own statistics. After a vacuum there is a row for each entry, and an entry
for each row. It must be vacuumed first: a scan marks entries that lead to nothing, and no later scan returns them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Final, LiteralString, NamedTuple

import psycopg
from psycopg import sql

from pg_freeze.control import Control
from pg_freeze.copies import pages, structure
from pg_freeze.copies.relations import (
    Findings,
    Index,
    Table,
    attempt,
    in_one_trip,
    indexes,
    locked,
    one,
    said,
    tables_of,
)
from pg_freeze.sequences import LOGGED_AHEAD, Inside, State

_SEQUENCES: Final[LiteralString] = """
    SELECT c.oid::bigint, n.nspname || '.' || c.relname, pg_relation_filenode(c.oid)::bigint, s.seqincrement, s.seqcycle
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_sequence s ON s.seqrelid = c.oid
     WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND c.oid <> ALL (%s::bigint[]::oid[]) ORDER BY c.oid"""
# How to ask for the order that an index has: each key, its collation and its operator.
_KEYS: Final[LiteralString] = """
    SELECT i.indexrelid::bigint, pg_get_indexdef(i.indexrelid, k.n::integer, true), cn.nspname::text, co.collname::text,
           opn.nspname::text, op.oprname::text, (i.indoption[k.n - 1] & 2) <> 0
      FROM pg_index i CROSS JOIN LATERAL generate_series(1, i.indnkeyatts) AS k (n)
      JOIN pg_opclass oc ON oc.oid = i.indclass[k.n - 1]
      JOIN pg_amop ao ON ao.amopfamily = oc.opcfamily AND ao.amoplefttype = oc.opcintype
                     AND ao.amoprighttype = oc.opcintype
                     AND ao.amopstrategy = CASE WHEN (i.indoption[k.n - 1] & 1) <> 0 THEN 5 ELSE 1 END
      JOIN pg_operator op ON op.oid = ao.amopopr JOIN pg_namespace opn ON opn.oid = op.oprnamespace
      LEFT JOIN pg_collation co ON co.oid = i.indcollation[k.n - 1]
      LEFT JOIN pg_namespace cn ON cn.oid = co.collnamespace
     WHERE i.indrelid <> ALL (%s::bigint[]::oid[]) ORDER BY i.indexrelid, k.n"""
_COUNTED: Final = sql.SQL(
    """SELECT pg_stat_get_xact_numscans({0}::bigint::oid), pg_stat_get_xact_tuples_returned({0}::bigint::oid),
              pg_stat_get_xact_tuples_fetched({0}::bigint::oid)"""
)
_BEGIN: Final = sql.SQL("BEGIN ISOLATION LEVEL REPEATABLE READ")
_ROLLBACK: Final = sql.SQL("ROLLBACK")
# Where two indexes have the same order, the other one is hidden from the planner, for this transaction.
_HIDE: Final = sql.SQL("UPDATE pg_index SET indisvalid = false WHERE indrelid = {} AND indexrelid <> {}")
_BY_INDEX: Final = sql.SQL(
    """SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_indexonlyscan = off;
       SET LOCAL enable_sort = off; SET LOCAL enable_tidscan = off; SET LOCAL enable_indexscan = on"""
)
_BY_TABLE: Final = sql.SQL(
    """SET LOCAL enable_seqscan = on; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_indexonlyscan = off;
       SET LOCAL enable_indexscan = off"""
)
# What keeps rows that are dead: vacuum leaves them, with their entries.
_KEPT: Final[LiteralString] = """
    SELECT CASE WHEN EXISTS (SELECT FROM pg_prepared_xacts)
                THEN 'a transaction is prepared, whose rows are not seen yet'
                WHEN EXISTS (SELECT FROM pg_replication_slots WHERE xmin IS NOT NULL OR catalog_xmin IS NOT NULL)
                THEN 'a replication slot keeps rows that are dead' END"""


class Then(NamedTuple):
    """What is known of a database from while it was frozen.

    :ivar inside: what the first look has seen in it; None if nothing.
    :ivar sized: the relations whose sizes were recorded, and so compared already.
    :ivar logged: the files of sequences that have a record in the copy's own WAL; None if that was not read.
    """

    inside: Inside | None
    sized: Collection[int]
    logged: Collection[int] | None


class Key(NamedTuple):
    """What an index is ordered by."""

    what: str
    collation_schema: str | None
    collation: str | None
    schema: str
    operator: str
    nulls_first: bool


def _keys(conn: Control, without: Collection[int]) -> dict[int, list[Key]]:
    """Return what each index is ordered by, by its OID, but for those of the tables *without* a look."""
    found: dict[int, list[Key]] = defaultdict(list)
    for index, *key in conn.execute(_KEYS, (list(without),)):
        found[index].append(Key(*key))
    return found


def check(conn: Control, name: str, then: Then) -> Findings:
    """Check one database.

    :param conn: a superuser's, to that database.
    :raises psycopg.OperationalError: if the server goes away.
    """
    found = Findings()
    without = locked(conn)
    found.unseen += [f"{one} of {name!r}: a prepared transaction has it locked" for one in without.values()]
    tables = tables_of(conn, without)
    theirs = indexes(conn, without)
    keys = _keys(conn, without)
    _check_sequences(conn, name, then, without, found)
    for table in tables:
        if table.persistence == "u":
            found.unseen.append(f"{table} of {name!r}: it is unlogged, and empty in every copy of a running server")
        elif table.method != "heap":
            found.unseen.append(f"{table} of {name!r}: its access method is {table.method}")
        else:
            walks = [(index, keys[index.oid]) for index in theirs[table.oid]]
            if table.oid not in then.sized:
                _compare_pages(conn, name, table, found)
            _check_table(conn, name, table, walks, found)
    structure.check(conn, name, [table for table in tables if table.method == "heap"], without, found)
    return found


def _check_sequences(conn: Control, name: str, known: Then, without: Collection[int], found: Findings) -> None:
    """Read each sequence. It may run ahead by what is logged ahead, as after any crash, but never back."""
    then = known.inside
    earlier = {} if then is None else {(one.oid, one.file): one for one in then.sequences if not one.unlogged}
    # To SELECT from a sequence that was lost is no error: it has no row.
    read = sql.SQL("SELECT pg_sequence_last_value({}::bigint::oid::regclass)")
    for oid, sequence, file, increment, cycle in conn.execute(_SEQUENCES, (list(without),)).fetchall():
        title = f"sequence {sequence} of {name!r}"
        rows = attempt(conn, found, title, read.format(oid))
        state = earlier.get((oid, file))
        if not rows or state is None or not state.readable or cycle:
            continue
        now = rows[0][0]
        what = f"{title} says {_value(now)}, and said {_value(state.last)} while it was frozen"
        if isinstance(state.last, int) and (now is None or (now - state.last) * increment < 0):
            found.problems.append(what)
        elif now is not None and _too_far(state, now) and file not in (known.logged or ()):
            (found.unseen if known.logged is None else found.problems).append(
                f"{what}: further ahead than nextval logs, "
                + (
                    "and whether the WAL has a record of it was not read"
                    if known.logged is None
                    else "without a record"
                )
            )
    hidden = [] if then is None else [one.name for one in then.sequences if not one.readable]
    if hidden:
        what = f"{', '.join(hidden[:10])}{' …' if len(hidden) > 10 else ''} of {name!r}"
        found.unseen.append(
            f"the values of {len(hidden)} sequence(s) while it was frozen, which could not be read: {what}"
        )
    if then is None or then.unseen is not None:
        why = f" ({then.unseen})" if then is not None else ""
        found.unseen.append(f"the values of the sequences of {name!r} while it was frozen: they were not recorded{why}")


def _value(said: int | None) -> str:
    return "unused" if said is None else str(said)


def _too_far(then: State, now: int) -> bool:
    """Whether recovery alone cannot have brought a sequence there: it takes what was logged ahead, once."""
    if then.last is None:
        return True  # nothing was logged of it but that it is unused
    return (now - then.last) // then.increment > then.cache + LOGGED_AHEAD


def _compare_pages(conn: Control, database: str, table: Table, found: Findings) -> None:
    """Compare the size of a table, which nobody recorded while it was frozen, with what its statistics say."""
    if table.pages >= table.pages_then:
        return
    what = (
        f"{table} of {database!r} has {table.pages} pages, and had {table.pages_then} when it was vacuumed or analyzed"
    )
    # From PostgreSQL 18 on an import of statistics may write any number there.
    if conn.info.server_version >= 180000:
        found.unseen.append(f"{what}, or as its statistics were imported, and no size was recorded")
    else:
        found.problems.append(what)


def _check_table(
    conn: Control, database: str, table: Table, walks: Sequence[tuple[Index, list[Key]]], found: Findings
) -> None:
    title = f"{table} of {database!r}"
    # Without the rows that nobody sees, entries and rows can be counted against each other.
    once = ", SKIP_DATABASE_STATS ON" if conn.info.server_version >= 160000 else ""
    vacuum = sql.SQL("VACUUM (INDEX_CLEANUP ON, TRUNCATE OFF, PROCESS_TOAST OFF" + once + ") {}")
    if not attempt(conn, found, title, vacuum.format(table.quoted)):
        return
    counted = False
    for index, keys in walks:
        if not index.valid:
            found.unseen.append(f"index {index.name} of {database!r}: it is invalid")
        elif index.method != "btree":
            found.unseen.append(f"index {index.name} of {database!r}: its access method is {index.method}, no B-tree")
        else:
            walked = _walk(conn, table, index, keys)
            counted |= walked is not None and index.predicate is None
            _tell(conn, found, f"index {index.name} of {database!r}", walked)
    if not counted:
        _read_through(conn, table, found, title)


def _tell(conn: Control, found: Findings, title: str, walked: tuple[int, int, int] | str | None) -> None:
    if walked is None:
        found.unseen.append(f"{title} against its table: it could not be read in its own order")
    elif isinstance(walked, str):
        found.problems.append(f"{title}: {walked}")
    else:
        entries, fetched, rows = walked
        kept: str | None = one(conn, _KEPT) if entries > fetched else None
        if kept is not None:
            found.unseen.append(f"{title} against its table: {kept}")
        elif entries > fetched:
            found.problems.append(f"{title}: {entries - fetched} of {entries} entries have no row in the table")
        if fetched != rows:
            found.problems.append(f"{title}: finds {fetched} rows, and the table has {rows}")


def _walk(conn: Control, table: Table, index: Index, keys: Sequence[Key]) -> tuple[int, int, int] | str | None:
    """Read an index from one end to the other, and look up each entry.

    :returns: the entries, those with a row, and the rows of the table; an error; None if the planner takes another way.
    """
    if len(keys) != index.keys:
        return None
    order = sql.SQL(", ").join(map(_key, keys))
    where = sql.SQL("") if index.predicate is None else sql.SQL("WHERE " + index.predicate)
    count = sql.SQL("SELECT count(*) FROM ONLY {} {}").format(table.quoted, where)
    walk = sql.SQL("SELECT count(*) FROM (SELECT 1 FROM ONLY {} {} ORDER BY {}) AS walked").format(
        table.quoted, where, order
    )
    counted = _COUNTED.format(index.oid)
    for hidden in ((), (_HIDE.format(table.oid, index.oid),)) if table.oid >= 16384 else ((),):
        try:
            [(rows,)], [before], _, [after] = in_one_trip(
                conn, _BEGIN, *hidden, _BY_TABLE, count, _BY_INDEX, counted, walk, counted, _ROLLBACK
            )
        except psycopg.Error as error:
            if conn.broken or conn.closed:
                raise
            conn.execute(_ROLLBACK)
            return said(error)
        scans, entries, fetched = (now - then for now, then in zip(after, before, strict=True))
        if scans:
            return entries, fetched, rows
    return None


def _key(key: Key) -> sql.Composed:
    collate = sql.Composed([])
    if key.collation is not None and key.collation_schema is not None:
        collate = sql.SQL(" COLLATE {}").format(sql.Identifier(key.collation_schema, key.collation))
    return sql.SQL("({}){} USING OPERATOR({}.{}) NULLS {}").format(
        sql.SQL(key.what),  # as PostgreSQL itself writes the expression
        collate,
        sql.Identifier(key.schema),
        sql.SQL(key.operator),
        sql.SQL("FIRST" if key.nulls_first else "LAST"),
    )


def _read_through(conn: Control, table: Table, found: Findings, title: str) -> None:
    """Read a table whose rows no index can count, and look for empty pages."""
    if not attempt(conn, found, title, sql.SQL("SELECT count(*) FROM ONLY {}").format(table.quoted)):
        return
    lost, empty = pages.empty(conn, table.oid, table.pages)
    if lost:
        found.problems.append(f"{title}: {lost} pages are empty, which had rows, as its visibility map says")
    if lost + empty == table.pages and table.rows_then > 0:
        found.problems.append(f"{title}: all pages are empty, and it had rows when it was vacuumed or analyzed")
    elif empty:
        found.unseen.append(
            f"{empty} of {table.pages} pages of {title}: they are empty, as a crash or room made in advance may leave "
            "them and a lost write as well, and it has no index to count its rows by"
        )
