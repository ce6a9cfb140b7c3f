"""Judges: what was changed between two looks at a freeze, and the level that follows.

That the LSN moved proves nothing: a server writes WAL of its own (vacuum, hint bits, heartbeats, other databases). So
the records themselves are read, with pg_walinspect, for row changes of the frozen databases. Where that cannot be used
(PostgreSQL 14 and 15 have no block info; the extension or the right may be missing), the locks of the strategy lock
are proof enough: no row of a locked table changes, and tables that were not locked are listed. Under the strategy
privileges it is that they are revoked, before and after, and that no transaction of the server was given an id in
between but ours, without which nothing is written. Under the strategy
database the statistics counters have to do: a session may report ten seconds late, and autovacuum's ANALYZE moves them
too. The record says which it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Final, LiteralString

from psycopg import sql
from psycopg.rows import dict_row

from airflow_pg_freeze.core.attestation import Level, Method, Violation
from airflow_pg_freeze.core.control import Control
from airflow_pg_freeze.core.model import Admit, Strategy, iso

# Row changes: what Heap, Heap2 and Sequence write for INSERT, UPDATE, DELETE, COPY, TRUNCATE and nextval. Not vacuum
# and hint bits (PRUNE…, VACUUM, VISIBLE, FREEZE_PAGE, INPLACE), nor row locks. ANALYZE rewrites pg_statistic and its
# kin, whose file numbers are their OIDs until somebody rewrites them; then a freeze is called worse than it was, never
# better.
_ROW_CHANGES: Final[LiteralString] = """
    SELECT COALESCE(p.datname::text, 'OID ' || b.reldatabase) AS database, b.relfilenode::bigint AS file,
           b.resource_manager || '/' || b.record_type AS kind,
           array_agg(DISTINCT b.xid::text) AS xids, count(DISTINCT b.start_lsn) AS n, min(b.start_lsn)::text AS first,
           (SELECT min(substring(c.description FROM '[0-9]{{4}}-[0-9-]+ [0-9:.+ A-Z-]+'))
              FROM {schema}.pg_get_wal_records_info(%(wal_from)s, %(wal_to)s) c
             WHERE c.resource_manager = 'Transaction' AND c.xid = ANY (array_agg(b.xid))) AS ended
      FROM {schema}.pg_get_wal_block_info(%(wal_from)s, %(wal_to)s, false) b
      LEFT JOIN pg_catalog.pg_database p ON p.oid = b.reldatabase
     WHERE b.reldatabase = ANY (%(oids)s::bigint[]::oid[])
       AND (b.resource_manager = 'Sequence'
            OR b.resource_manager = 'Heap' AND b.record_type ~ '^(INSERT|UPDATE|HOT_UPDATE|DELETE|TRUNCATE)'
            OR b.resource_manager = 'Heap2' AND b.record_type ~ '^MULTI_INSERT')
       AND b.relfilenode NOT IN (2619, 2840, 2841, 3429, 3430, 3431)
       AND NOT (p.datname = current_database() AND b.relfilenode IN (
            SELECT pg_relation_filenode(r.oid) FROM pg_catalog.pg_class j
             CROSS JOIN LATERAL (VALUES (j.oid), (j.reltoastrelid)) AS r (oid)
             WHERE j.relnamespace = 'airflow_pg_freeze'::regnamespace AND j.relkind IN ('r', 'S') AND r.oid <> 0))
     GROUP BY 1, 2, 3 ORDER BY min(b.start_lsn)"""
_COMMITTED: Final[LiteralString] = """
    SELECT c.xid::text AS xid FROM {schema}.pg_get_wal_records_info(%(wal_from)s, %(wal_to)s) c
     WHERE c.resource_manager = 'Transaction' AND c.record_type ~ '^COMMIT' AND c.xid::text = ANY (%(xids)s)"""
_WALINSPECT: Final[LiteralString] = """
    SELECT n.nspname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
     WHERE p.proname IN ('pg_get_wal_block_info', 'pg_get_wal_records_info')
       AND has_function_privilege(p.oid, 'EXECUTE') AND has_schema_privilege(n.oid, 'USAGE')
     GROUP BY 1 HAVING count(DISTINCT p.proname) = 2"""


def violations(first: dict[str, Any], seen: dict[str, Any]) -> Iterator[Violation]:
    """Yield what broke the freeze itself; row changes are told by the WAL or the counters."""
    now = iso(seen["at"])
    if seen["state"] != "frozen":
        yield Violation(
            "thawed",
            f"the freeze was {seen['state']} before the second check",
            seen["thawed_by"],
            iso(seen["restoring_at"]),
        )
    elif not seen["locked"]:
        yield Violation("unlocked", "a session that held the locks ended before the second check", None, now)
    else:
        yield from _settings(seen, now)
    # Under locks it does not matter who is connected, or since when.
    if seen["strategy"] != Strategy.LOCK:
        yield from _sessions(first, "before", first["at"])
        if seen["state"] == "frozen":
            yield from _sessions(seen, "after", now)
    for oid in sorted(set(first["oids"]) - set(seen["oids"])):
        yield Violation("dropped", f"the database with OID {oid} was dropped", None, now)
    for gid in sorted(set(first["prepared"]) ^ set(seen["prepared"])):
        ended = gid in first["prepared"]
        what = "a prepared transaction was committed or rolled back" if ended else "a transaction was prepared"
        yield Violation("prepared", what, gid, now)


def _settings(seen: dict[str, Any], now: str | None) -> Iterator[Violation]:
    if seen["lease_until"] <= seen["at"]:
        until = iso(seen["lease_until"])
        yield Violation("lease-lapsed", "the lease had ended before the second check", None, until)
    if seen["strategy"] == Strategy.LOCK:
        for name in seen.get("unlocked", ()):
            yield Violation("new-table", f"{name} was made under the locks, and could be written", None, now)
        return
    if seen["strategy"] == Strategy.PRIVILEGES:
        for what in seen["granted"]:
            yield Violation("setting", f"a revoked privilege was granted again: {what}", None, now)
        return
    for name in seen["writable"]:
        yield Violation("setting", f"default_transaction_read_only of {name!r} was changed", None, now)
    for name in seen["open"] if seen["admit"] == Admit.NOBODY else ():
        yield Violation("setting", f"{name!r} admits connections", None, now)
    for who in seen["overrides"]:
        yield Violation("role-override", f"a role setting overrides the freeze: {who}", who, now)


def _sessions(look: dict[str, Any], moment: str, when: str | datetime | None) -> Iterator[Violation]:
    at = iso(when) if isinstance(when, datetime) else when
    for one in look["lingering"]:
        yield Violation("lingering", f"a session from before the barrier is there ({moment})", _who(one), at)
    for one in look["open_xids"]:
        yield Violation("open-write", f"a session has a transaction that writes ({moment})", _who(one), at)


def _who(one: dict[str, Any]) -> str:
    return f"pid {one['pid']}, {one['role'] or 'unknown role'}, {one['application'] or one['type'] or 'unknown'}"


def changes(conn: Control, first: dict[str, Any], seen: dict[str, Any]) -> tuple[Method, list[Violation]]:
    """Return what was written between two looks, and by which method that was found out."""
    schema = conn.execute(_WALINSPECT).fetchone()
    # Under the strategy database an open transaction is a violation by itself. With all tables locked it can only have
    # written what the locks do not cover, and matters if it commits.
    open_first = {one["xid"]: one for one in first["open_xids"]} if seen["strategy"] == Strategy.LOCK else {}
    if schema is None and seen["strategy"] == Strategy.LOCK:
        # Sessions that wait report what they did before the locks only now: the counters would tell of that.
        still = {one["xid"] for one in seen["open_xids"]}
        return Method.LOCKS, [_ended(one) for xid, one in open_first.items() if xid not in still]
    if schema is None and seen["strategy"] == Strategy.PRIVILEGES:
        # Superusers and their functions are not stopped, and the counters would tell of the past: as above.
        return Method.PRIVILEGES, list(_numbered(first, seen))
    if schema is None:
        return Method.COUNTERS, list(_counted(first, seen))
    # WAL can be read as far as it is flushed; the commit of a transaction that wrote flushes it.
    conn.execute("SELECT pg_logical_emit_message(true, 'airflow_pg_freeze', '')")
    span = {"wal_from": first["lsn"], "wal_to": seen["lsn"], "oids": first["oids"], "xids": list(open_first)}
    if first["lsn"] == seen["lsn"]:
        return Method.WAL, []
    inside = {"schema": sql.Identifier(schema[0])}
    with conn.cursor(row_factory=dict_row) as cur:
        rows = cur.execute(sql.SQL(_ROW_CHANGES).format(**inside), span).fetchall()
        committed = cur.execute(sql.SQL(_COMMITTED).format(**inside), span).fetchall() if open_first else []
    writers = {one["xid"]: _who(one) for one in (*first["open_xids"], *seen["open_xids"])}
    return Method.WAL, [
        *(
            Violation(
                "row-change",
                f"{row['n']} of {row['kind']} on file {row['file']} of {row['database']!r}, from WAL {row['first']} on",
                "; ".join(writers.get(xid, f"transaction {xid}") for xid in row["xids"]),
                row["ended"],
            )
            for row in rows
        ),
        *(_ended(open_first[row["xid"]]) for row in committed),
    ]


def _ended(one: dict[str, Any]) -> Violation:
    what = "a transaction from before the locks, which had written something that they do not cover, ended meanwhile"
    return Violation("open-write", what, _who(one), None)


def _numbered(first: dict[str, Any], seen: dict[str, Any]) -> Iterator[Violation]:
    """Yield that something was written somewhere: nothing is written without a transaction id."""
    others = seen["next_xid"] - first["next_xid"] - 1  # our record
    if others > 0:
        what = (
            f"{others} transaction(s) wrote on this server, in this database or in another: only the WAL tells, which "
            "pg_walinspect reads, if it is installed in this database"
        )
        yield Violation("not-proved", what, None, None)


def _counted(first: dict[str, Any], seen: dict[str, Any]) -> Iterator[Violation]:
    for name, count in seen["counters"].items():
        moved = count - first["counters"].get(name, 0)
        if moved:
            what = f"the counters of {name!r} moved by {moved} rows (an ANALYZE by autovacuum moves them too)"
            yield Violation("row-change", what, None, None)


def level(first: dict[str, Any], seen: dict[str, Any], violations: Sequence[Violation]) -> Level:
    """Return the level that follows from two looks and what was found to be wrong."""
    if violations:
        return Level.CRASH_ONLY
    nobody = seen["admit"] == Admit.NOBODY and not first["open"] and not seen["open"]
    return Level.STRICT if nobody else Level.READ_ONLY
