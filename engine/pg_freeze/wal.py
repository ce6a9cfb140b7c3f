"""Reads the WAL between two looks with pg_walinspect, and says what of it concerns the frozen databases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from pg_freeze.control import Control, unhurried
from pg_freeze.names import quoted
from pg_freeze.wal_records import Means, databases_in, meaning

#: PostgreSQL 15 brought it.
OLDEST_WALINSPECT: Final = 150000
FUNCTION: Final = "pg_get_wal_records_info"

# Found as a member of the extension, in its own library: anybody can make a function of this name. It is called by name
# later. The owner of a schema can rename it meanwhile, and put another one there: so that owner has to be a superuser.
# For the schema public that is the owner of the database, by the name of pg_database_owner. The arguments are cast: a
# function that takes text would match better otherwise.
_WALINSPECT: Final[LiteralString] = """
    SELECT n.nspname, has_function_privilege(p.oid, 'EXECUTE') AND has_schema_privilege(n.oid, 'USAGE') AS usable,
           (SELECT rolsuper FROM pg_roles WHERE oid = CASE pg_get_userbyid(n.nspowner) WHEN 'pg_database_owner'
                                                           THEN b.datdba ELSE n.nspowner END) AS safe
      FROM pg_extension e
      JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid
                      AND d.classid = 'pg_proc'::regclass AND d.deptype = 'e'
      JOIN pg_proc p ON p.oid = d.objid JOIN pg_namespace n ON n.oid = p.pronamespace
      JOIN pg_database b ON b.datname = current_database()
      JOIN pg_language l ON l.oid = p.prolang AND l.lanname = 'c'
     WHERE e.extname = 'pg_walinspect' AND p.probin = '$libdir/pg_walinspect'
       AND p.proname = 'pg_get_wal_records_info' AND oidvectortypes(p.proargtypes) = 'pg_lsn, pg_lsn'
       AND (SELECT bool_and(r.rolsuper) FROM pg_roles r WHERE r.oid IN (e.extowner, p.proowner))"""

# pg_statistic, pg_statistic_ext_data, their tables for long values and the indexes of those: ANALYZE rewrites them.
# Their file numbers are their OIDs until somebody rewrites them; a freeze is then called worse than it was.
_STATISTICS: Final = (2619, 2840, 2841, 3429, 3430, 3431)
_OURS: Final[LiteralString] = """
    SELECT pg_relation_filenode(r.oid)::bigint
      FROM pg_class c CROSS JOIN LATERAL (VALUES (c.oid), (c.reltoastrelid)) AS r (oid)
     WHERE c.relnamespace = to_regnamespace('pgfreeze') AND c.relkind IN ('r', 'S') AND r.oid <> 0
       AND (SELECT oid::bigint FROM pg_database WHERE datname = current_database()) = ANY (%s)"""

# `ends` are the ends of transactions. COMMIT PREPARED and ROLLBACK PREPARED are logged under no id: it is in the text.
# `silent` are committed transactions that wrote to no other database, by themselves or in a subtransaction: what they
# wrote may be unlogged. A subtransaction writes under an id of its own.
_READ: Final[LiteralString] = """
    WITH r AS MATERIALIZED (
             SELECT start_lsn, xid::text::bigint AS xid, resource_manager AS manager, record_type AS kind, description,
                    block_ref
               FROM {schema}.pg_get_wal_records_info(%(wal_from)s::pg_lsn, %(wal_to)s::pg_lsn)),
         refs AS MATERIALIZED (
             SELECT r.start_lsn, r.xid, r.manager, r.kind, (m.ref)[1]::bigint AS database, (m.ref)[2]::bigint AS file,
                    (m.ref)[3] AS fork
               FROM r, regexp_matches(r.block_ref, 'rel [0-9]+/([0-9]+)/([0-9]+) fork ([a-z]+)', 'g') AS m (ref)),
         elsewhere AS MATERIALIZED (
             SELECT DISTINCT xid FROM refs WHERE database <> 0 AND database <> ALL (%(oids)s::bigint[])),
         ends AS MATERIALIZED (
             SELECT start_lsn, kind, description,
                    CASE WHEN kind IN ('COMMIT', 'PREPARE') THEN xid
                         ELSE substring(description, '^([0-9]+):')::bigint END AS xid
               FROM r WHERE manager = 'Transaction'
                        AND kind IN ('COMMIT', 'COMMIT_PREPARED', 'ABORT_PREPARED', 'PREPARE'))
    SELECT manager, kind, database, file, fork, NULL AS description, count(DISTINCT start_lsn) AS n,
           min(start_lsn)::text AS first, array_agg(DISTINCT xid) AS xids
      FROM refs WHERE database = ANY (%(oids)s::bigint[]) GROUP BY 1, 2, 3, 4, 5
     UNION ALL
    SELECT manager, kind, NULL, NULL, NULL,
           CASE WHEN manager IN ('Storage', 'Database', 'RelMap') THEN description END, count(*),
           min(start_lsn)::text, array_agg(DISTINCT xid)
      FROM r WHERE COALESCE(block_ref, '') !~ 'rel [0-9]+/' GROUP BY 1, 2, 6
     UNION ALL
    SELECT 'ended', kind, NULL, NULL, NULL, NULL, 1, start_lsn::text, ARRAY[xid]
      FROM ends WHERE xid = ANY (%(open)s::bigint[])
     UNION ALL
    SELECT 'silent', '', NULL, NULL, NULL, NULL, count(*), min(start_lsn)::text, array_agg(c.xid)
      FROM ends c
     WHERE c.kind IN ('COMMIT', 'COMMIT_PREPARED') AND c.xid <> ALL (%(ours)s::bigint[])
       AND NOT EXISTS (SELECT FROM elsewhere e WHERE e.xid = c.xid)
       AND NOT EXISTS (SELECT FROM elsewhere e WHERE e.xid::text = ANY (
               string_to_array(substring(c.description, 'subxacts: ([0-9 ]+)'), ' ')))
    HAVING count(*) > 0"""


@dataclass(frozen=True, slots=True)
class Change:
    """Records of one kind that changed one file of a frozen database, or may have."""

    what: str
    first: str
    xids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class End:
    """A record that ends a transaction, or makes it a prepared one.

    :ivar xid: its 32-bit transaction id.
    :ivar kind: ``COMMIT``, ``COMMIT_PREPARED``, ``ABORT_PREPARED`` or ``PREPARE``.
    :ivar lsn: where the record begins.
    """

    xid: int
    kind: str
    lsn: str


@dataclass(slots=True)
class Wal:
    """What the WAL says of the time between two looks.

    :ivar ends: how those transactions went on that were asked for.
    :ivar sequences: how many records each sequence's file has, by database and file.
    :ivar silent: transactions that were committed, and of which it is not known where they wrote, if anywhere.
    """

    changes: list[Change] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    sequences: Counter[tuple[int, int]] = field(default_factory=Counter)
    checkpoints: int = 0
    restarted: bool = False
    silent: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Unread:
    """Why the WAL is not read, and what to do about it: one line, to type where it is SQL."""

    why: str
    remedy: str


def readable(conn: Control) -> str | Unread:
    """Return the schema of pg_walinspect in this database, or why we cannot read the WAL with it."""
    if conn.info.server_version < OLDEST_WALINSPECT:
        return Unread("PostgreSQL 14 has no pg_walinspect", "PostgreSQL 15 or newer, with pg_walinspect")
    database, role = conn.info.dbname, quoted(conn.info.user)
    grant = f"GRANT EXECUTE ON FUNCTION {FUNCTION} TO {role};"
    row = conn.execute(_WALINSPECT).fetchone()
    if row is None:
        return Unread(
            f"the extension pg_walinspect is not installed in {database!r}",
            f"as a superuser in database {database!r}: CREATE EXTENSION pg_walinspect SCHEMA pg_catalog; {grant}",
        )
    schema, usable, safe = row
    if not safe:
        return Unread(
            f"pg_walinspect is in schema {schema!r} of {database!r}, whose owner is no superuser and could put "
            "something else in its place",
            f"as a superuser in database {database!r}: ALTER EXTENSION pg_walinspect SET SCHEMA pg_catalog; {grant}",
        )
    if not usable:
        return Unread(
            f"role {conn.info.user!r} may not execute {FUNCTION}", f"as a superuser in database {database!r}: {grant}"
        )
    return str(schema)


def read(
    conn: Control,
    wal_from: str,
    wal_to: str,
    oids: Collection[int],
    *,
    ours: Sequence[int],
    opened: Sequence[int],
) -> Wal | Unread:
    """Read the WAL between two looks; or return why it cannot be read.

    It can be read as far as it is flushed: so a transaction of ours must have been committed since the second look.

    :param ours: the ids of our own transactions in between.
    :param opened: the ids of the transactions whose ends are asked for.
    """
    schema = readable(conn)
    if isinstance(schema, Unread):
        return schema
    given = {
        "wal_from": wal_from,
        "wal_to": wal_to,
        "oids": list(oids),
        "ours": [xid % 2**32 for xid in ours],
        "open": [xid % 2**32 for xid in opened],
    }
    try:
        with unhurried(conn), conn.cursor(row_factory=dict_row) as cur:
            rows = cur.execute(sql.SQL(_READ).format(schema=sql.Identifier(schema)), given).fetchall()
        left_out = {*_STATISTICS, *(file for (file,) in conn.execute(_OURS, (list(oids),)))}
    except psycopg.Error as error:
        if conn.closed or conn.broken:
            raise
        # Most likely: the server has recycled it.
        return Unread(
            f"the WAL from {wal_from} on cannot be read: {error.diag.message_primary or error}",
            "ALTER SYSTEM SET wal_keep_size to more than is written in the time of a snapshot",
        )
    return _sorted(rows, oids, left_out)


def _sorted(rows: Sequence[dict[str, Any]], oids: Collection[int], left_out: Collection[int]) -> Wal:
    wal = Wal()
    for row in rows:
        manager, kind, file = row["manager"], row["kind"], row["file"]
        if manager == "silent":
            wal.silent = tuple(row["xids"])
            continue
        if manager == "ended":
            wal.ends.append(End(row["xids"][0], kind, row["first"]))
            continue
        if kind in ("CHECKPOINT_ONLINE", "CHECKPOINT_REDO"):  # from 17 on a checkpoint writes both
            wal.checkpoints = max(wal.checkpoints, row["n"])
        match meaning(manager, kind, row["fork"]):
            case Means.RESTART:
                wal.restarted = True
            case Means.SEQUENCE if file not in left_out:
                wal.sequences[row["database"], file] += row["n"]
            case Means.CHANGE if file not in left_out:
                where = "" if file is None else f" on file {file}"
                wal.changes.append(_change(row, where))
            case Means.FILES:
                named = databases_in(manager, row["description"] or "")
                if named is None or not set(oids).isdisjoint(named):
                    wal.changes.append(_change(row, f" ({row['description']})"))
    return wal


def _change(row: dict[str, Any], where: str) -> Change:
    what = f"{row['n']} of {row['manager']}/{row['kind']}{where}, from WAL {row['first']} on"
    return Change(what, row["first"], tuple(row["xids"]))
