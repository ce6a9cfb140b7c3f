"""Proof: what state the databases were in just before and just after a snapshot, and the level that follows.

``before`` observes and opens a record in the journal; ``after`` observes again, compares, reads the WAL that was
written in between, and closes the record. The levels:

``strict``      nobody could connect, and nothing was changed;
``read-only``   writers were refused by default, and nothing was changed;
``crash-only``  something was changed, or might have been: no better than a copy of a running server.

That the LSN moved proves nothing: a server writes WAL of its own (vacuum, hint bits, heartbeats, other databases). So
the records themselves are read, with pg_walinspect, for row changes of the frozen databases. Where that cannot be used
(PostgreSQL 14 and 15 have no block info; the extension or the right may be missing), the locks of the strategy lock
are proof enough: no row of a locked table changes, and tables that were not locked are listed. Under the strategy
privileges it is that everybody's are revoked, before and after, and no superuser is connected. Under the strategy
database the statistics counters have to do: a session may report ten seconds late, and autovacuum's ANALYZE moves them
too. The record says which it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Final, LiteralString
from uuid import UUID, uuid4

from psycopg import sql
from psycopg.rows import dict_row

from airflow_pg_freeze.core import journal
from airflow_pg_freeze.core.attestation import Attestation, Level, Method, Violation
from airflow_pg_freeze.core.control import Connect, Control, control
from airflow_pg_freeze.core.errors import FreezeError
from airflow_pg_freeze.core.freeze import held
from airflow_pg_freeze.core.model import Admit, Strategy, iso
from airflow_pg_freeze.core.request import names_of

# One statement, so that all of it is seen at one moment. `open_xids` are sessions that have been given a transaction
# id: they have written, or are about to. A temporary table counts too, which is harmless and rare.
_OBSERVE: Final[LiteralString] = """
    WITH f AS (SELECT * FROM airflow_pg_freeze.freezes WHERE token = %(token)s),
         d AS (SELECT b.database, p.datname, p.datallowconn FROM airflow_pg_freeze.frozen_databases b
                 JOIN pg_database p ON p.oid = b.database WHERE b.token = %(token)s)
    SELECT clock_timestamp() AS at, pg_current_wal_insert_lsn()::text AS lsn,
           (SELECT state FROM f) AS state, (SELECT strategy FROM f) AS strategy,
           (SELECT airflow_pg_freeze.locked(sessions) FROM f) AS locked, (SELECT lease_until FROM f) AS lease_until,
           (SELECT barrier_at FROM f) AS barrier_at, (SELECT admit FROM f) AS admit,
           (SELECT checkpoint_lsn::text FROM f) AS checkpoint_lsn,
           (SELECT thawed_by FROM f) AS thawed_by, (SELECT restoring_at FROM f) AS restoring_at,
           ARRAY(SELECT database::bigint FROM d ORDER BY 1) AS oids,
           ARRAY(SELECT datname::text FROM d WHERE datallowconn ORDER BY 1) AS open,
           ARRAY(SELECT datname::text FROM d WHERE NOT EXISTS (
                 SELECT FROM pg_db_role_setting s, unnest(s.setconfig) AS c (entry)
                  WHERE s.setdatabase = d.database AND s.setrole = 0
                    AND split_part(c.entry, '=', 1) = 'default_transaction_read_only'
                    AND split_part(c.entry, '=', 2)::boolean) ORDER BY 1) AS writable,
           ARRAY(SELECT o.rolname || ' in ' || o.datname FROM airflow_pg_freeze.overrides o
                   JOIN d ON d.database = o.database ORDER BY 1) AS overrides,
           ARRAY(SELECT p.gid || ' (' || p.owner || ', prepared ' || p.prepared || ')' FROM pg_prepared_xacts p
                   JOIN d ON d.datname = p.database ORDER BY 1) AS prepared,
           COALESCE((SELECT jsonb_agg(jsonb_build_object('pid', s.pid, 'role', s.usename, 'application',
                            s.application_name, 'type', s.backend_type, 'start', s.backend_start) ORDER BY s.pid)
                       FROM airflow_pg_freeze.sessions s JOIN d ON d.database = s.datid
                      WHERE COALESCE(s.backend_start <= (SELECT barrier_at FROM f), true)
                        AND (SELECT f.strategy FROM f) = 'database'), '[]') AS lingering,
           COALESCE((SELECT jsonb_agg(jsonb_build_object('pid', a.pid, 'role', a.usename, 'application',
                            a.application_name, 'type', a.backend_type, 'xid', a.backend_xid::text) ORDER BY a.pid)
                       FROM pg_stat_activity a JOIN d ON d.database = a.datid
                      WHERE a.backend_xid IS NOT NULL AND a.backend_type IS DISTINCT FROM 'autovacuum worker'), '[]')
               AS open_xids,
           COALESCE((SELECT jsonb_object_agg(s.datname, s.tup_inserted + s.tup_updated + s.tup_deleted)
                       FROM pg_stat_database s JOIN d ON d.database = s.datid), '{}') AS counters,
           (SELECT to_jsonb(roles) FROM f) AS roles,
           CASE WHEN (SELECT strategy FROM f) = 'privileges'
                THEN ARRAY(SELECT r.what || ' ' || r.name || ' to ' || r.who
                             FROM airflow_pg_freeze.revoked_entries(%(token)s) r WHERE r.present)
                ELSE '{}' END AS granted,
           COALESCE((SELECT jsonb_agg(jsonb_build_object('pid', s.pid, 'role', s.usename, 'application',
                            s.application_name, 'type', s.backend_type) ORDER BY s.pid)
                       FROM airflow_pg_freeze.sessions s JOIN d ON d.database = s.datid
                       LEFT JOIN pg_roles r ON r.rolname = s.usename
                      WHERE COALESCE(r.rolsuper, true) AND s.application_name NOT LIKE 'pg-freeze%%'
                        AND (SELECT strategy FROM f) = 'privileges'), '[]') AS superusers"""

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
_OPEN: Final[LiteralString] = """
    INSERT INTO airflow_pg_freeze.attestations (token, before_at, before) VALUES (%s, %s, %s) RETURNING id"""
_CLOSE: Final[LiteralString] = """
    UPDATE airflow_pg_freeze.attestations SET after_at = %s, after = %s, method = %s, level = %s, violations = %s
     WHERE id = %s"""
_LAST: Final[LiteralString] = """
    SELECT a.*, f.holder, f.databases, f.checkpoint_lsn::text
      FROM airflow_pg_freeze.attestations a JOIN airflow_pg_freeze.freezes f USING (token)"""


def before(connect: Connect, *, databases: Sequence[str], holder: str) -> Attestation:
    """Observe, just before a snapshot, and open a record in the journal.

    :returns: the open attestation, without a level.
    :raises LeaseLost: if this holder has no drained freeze of these databases.
    """
    names = names_of(databases, holder)
    with control(connect, "attest") as conn:
        return _read(conn, open_record(conn, held(conn, names, holder).token))


def after(connect: Connect, *, databases: Sequence[str], holder: str) -> Attestation:
    """Observe again, just after the snapshot, compare, read the WAL in between, and close the record.

    A freeze that is gone, a lapsed lease or a change is no error here: it is what the attestation then says.

    :returns: the attestation, with its level and whatever breaks it.
    :raises FreezeError: if no record of this holder and these databases is open.
    """
    names = names_of(databases, holder)
    with control(connect, "attest") as conn:
        number, token = _last_open(conn, names, holder)
        return close_record(conn, number, observe(conn, token))


def open_record(conn: Control, token: UUID) -> int:
    """Observe and open a record; return its number."""
    seen = observe(conn, token)
    row = conn.execute(_OPEN, (token, seen["at"], json.dumps(_stored(seen)))).fetchone()
    assert row is not None
    return int(row[0])


def close_record(conn: Control, number: int, seen: dict[str, Any]) -> Attestation:
    """Judge what was seen after the snapshot, close the record, and return it.

    Reading the WAL takes time; it need not be done while the database is frozen.

    :param seen: what :func:`observe` returned just after the snapshot.
    """
    with conn.cursor(row_factory=dict_row) as cur:
        opened = cur.execute(_LAST + " WHERE a.id = %s", (number,)).fetchone()
    assert opened is not None
    method, changes = _changes(conn, opened["before"], seen)
    violations = (*_violations(opened["before"], seen), *changes)
    level = _level(opened["before"], seen, violations)
    told = json.dumps([violation.as_dict() for violation in violations])
    conn.execute(_CLOSE, (seen["at"], json.dumps(_stored(seen)), method.value, level.value, told, number))
    return _read(conn, number)


def of_token(conn: Control, token: UUID) -> tuple[Attestation, ...]:
    """Return the attestations of a freeze, oldest first."""
    with conn.cursor(row_factory=dict_row) as cur:
        return tuple(_attestation(row) for row in cur.execute(_LAST + " WHERE a.token = %s ORDER BY a.id", (token,)))


def _last_open(conn: Control, names: Sequence[str], holder: str) -> tuple[int, UUID]:
    row = None
    if journal.require(conn):
        row = conn.execute(
            """SELECT a.id, a.token FROM airflow_pg_freeze.attestations a JOIN airflow_pg_freeze.freezes f USING (token)
                WHERE f.holder = %s AND f.databases @> %s AND a.after_at IS NULL ORDER BY a.id DESC LIMIT 1""",
            (holder, list(names)),
        ).fetchone()
    if row is None:
        raise FreezeError(
            f"there is no open attestation of {holder!r} for {', '.join(map(repr, names))}: attest before the "
            "snapshot first (pg-freeze attest --before)"
        )
    return int(row[0]), row[1]


def observe(conn: Control, token: UUID) -> dict[str, Any]:
    """Return what is to be seen of a freeze at this moment, for :func:`close_record`."""
    if conn.info.server_version < 150000:
        _await_statistics(conn)
    return _look(conn, token)


def rehearse(conn: Control) -> None:
    """Have the server plan :func:`observe` for this connection: it takes longer than the look itself."""
    _look(conn, uuid4())


def _look(conn: Control, token: UUID) -> dict[str, Any]:
    with conn.cursor(row_factory=dict_row) as cur:
        row = cur.execute(_OBSERVE, {"token": token}, prepare=True).fetchone()
    assert row is not None
    return row


def _await_statistics(conn: Control) -> None:
    """Wait until the counters tell of all that was reported by now: before PostgreSQL 15 they are read from a file.

    It is written when somebody asks, but not more often than every half a second.
    """
    asked = conn.execute("SELECT clock_timestamp()").fetchone()
    assert asked is not None
    for _ in range(100):
        fresh = conn.execute("SELECT pg_stat_get_snapshot_timestamp() >= %s", asked).fetchone()
        if fresh is not None and fresh[0]:
            return
        time.sleep(0.02)


def _stored(seen: dict[str, Any]) -> dict[str, Any]:
    return {key: iso(value) if isinstance(value, datetime) else value for key, value in seen.items()}


def _violations(first: dict[str, Any], seen: dict[str, Any]) -> Iterator[Violation]:
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


def _changes(conn: Control, first: dict[str, Any], seen: dict[str, Any]) -> tuple[Method, list[Violation]]:
    schema = conn.execute(_WALINSPECT).fetchone()
    # Under the strategy database an open transaction is a violation by itself. With all tables locked it can only have
    # written what the locks do not cover, and matters if it commits.
    open_first = {one["xid"]: one for one in first["open_xids"]} if seen["strategy"] == Strategy.LOCK else {}
    if schema is None and seen["strategy"] == Strategy.LOCK:
        # Sessions that wait report what they did before the locks only now: the counters would tell of that.
        still = {one["xid"] for one in seen["open_xids"]}
        return Method.LOCKS, [_ended(one) for xid, one in open_first.items() if xid not in still]
    if schema is None and seen["strategy"] == Strategy.PRIVILEGES:
        # The sessions are there still, and report what they did before it only now: as above.
        return Method.PRIVILEGES, list(_not_stopped(first, seen))
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


def _not_stopped(first: dict[str, Any], seen: dict[str, Any]) -> Iterator[Violation]:
    """Yield who could have written, where only the privileges tell."""
    if seen["roles"]:
        what = "only the privileges of some roles were revoked; what the others did could be read in the WAL only"
        yield Violation("not-revoked", what, ", ".join(seen["roles"]), None)
    told = {_who(one) for one in (*first["superusers"], *seen["superusers"])}
    for who in sorted(told):
        yield Violation("superuser-session", "a superuser, whom no privilege stops, was connected", who, None)


def _counted(first: dict[str, Any], seen: dict[str, Any]) -> Iterator[Violation]:
    for name, count in seen["counters"].items():
        moved = count - first["counters"].get(name, 0)
        if moved:
            what = f"the counters of {name!r} moved by {moved} rows (an ANALYZE by autovacuum moves them too)"
            yield Violation("row-change", what, None, None)


def _level(first: dict[str, Any], seen: dict[str, Any], violations: Sequence[Violation]) -> Level:
    if violations:
        return Level.CRASH_ONLY
    nobody = seen["admit"] == Admit.NOBODY and not first["open"] and not seen["open"]
    return Level.STRICT if nobody else Level.READ_ONLY


def _read(conn: Control, number: int) -> Attestation:
    with conn.cursor(row_factory=dict_row) as cur:
        row = cur.execute(_LAST + " WHERE a.id = %s", (number,)).fetchone()
    assert row is not None
    return _attestation(row)


def _attestation(row: dict[str, Any]) -> Attestation:
    return Attestation(
        id=row["id"],
        token=row["token"],
        holder=row["holder"],
        databases=tuple(row["databases"]),
        before_at=row["before_at"],
        after_at=row["after_at"],
        wal_from=row["before"]["lsn"],
        wal_to=None if row["after"] is None else row["after"]["lsn"],
        checkpoint_lsn=row["checkpoint_lsn"],
        method=None if row["method"] is None else Method(row["method"]),
        level=None if row["level"] is None else Level(row["level"]),
        violations=tuple(Violation(**violation) for violation in row["violations"] or ()),
    )
