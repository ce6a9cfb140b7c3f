"""Proof: what state the databases were in just before and just after a snapshot, and the level that follows.

``before`` observes and opens a record in the journal; ``after`` observes again, compares, reads the WAL that was
written in between, and closes the record. The levels:

``strict``      nobody could connect, and nothing was changed;
``read-only``   writers were refused by default, and nothing was changed;
``crash-only``  something was changed, or might have been: no better than a copy of a running server.

How that is found out: ``judge.py``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, LiteralString
from uuid import UUID, uuid4

from psycopg.rows import dict_row

from airflow_pg_freeze.core import judge, schema
from airflow_pg_freeze.core.attestation import Attestation, Level, Method, Violation
from airflow_pg_freeze.core.control import Connect, Control, control
from airflow_pg_freeze.core.errors import FreezeError
from airflow_pg_freeze.core.freeze import held
from airflow_pg_freeze.core.model import iso
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
           pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS next_xid,
           CASE WHEN (SELECT strategy FROM f) = 'privileges'
                THEN ARRAY(SELECT r.what || ' ' || r.name || ' to ' || r.who
                             FROM airflow_pg_freeze.revoked_entries(%(token)s) r WHERE r.present)
                ELSE '{}' END AS granted"""

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
    method, changes = judge.changes(conn, opened["before"], seen)
    violations = (*judge.violations(opened["before"], seen), *changes)
    level = judge.level(opened["before"], seen, violations)
    told = json.dumps([violation.as_dict() for violation in violations])
    conn.execute(_CLOSE, (seen["at"], json.dumps(_stored(seen)), method.value, level.value, told, number))
    return _read(conn, number)


def of_token(conn: Control, token: UUID) -> tuple[Attestation, ...]:
    """Return the attestations of a freeze, oldest first."""
    with conn.cursor(row_factory=dict_row) as cur:
        return tuple(_attestation(row) for row in cur.execute(_LAST + " WHERE a.token = %s ORDER BY a.id", (token,)))


def _last_open(conn: Control, names: Sequence[str], holder: str) -> tuple[int, UUID]:
    row = None
    if schema.require(conn):
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
