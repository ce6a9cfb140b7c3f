"""One look at a freeze: all that is to be seen from the maintenance database, in one statement.

The order inside the statement matters. The place in the WAL is read first, then a transaction id is drawn, then the
transactions are listed that have one. So each change is in the WAL after that place, or is made by a transaction with
a later id, or by one that is listed; or it was committed before the look was over. One that is listed may be committed
already: see ``judge.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Final, LiteralString
from uuid import UUID, uuid4

from psycopg.rows import dict_row

from pg_freeze.control import Control
from pg_freeze.model import iso
from pg_freeze.sequences import Inside

# xmin tells whether somebody has changed a setting, and changed it back: vacuum leaves it alone.
_LOOK: Final[LiteralString] = """
    WITH moment AS MATERIALIZED (
             SELECT clock_timestamp() AS at, pg_current_wal_insert_lsn()::text AS lsn,
                    pg_current_xact_id()::text::bigint AS xid),
         f AS (SELECT * FROM pgfreeze.freezes WHERE token = %(token)s),
         older AS MATERIALIZED (SELECT * FROM pgfreeze.older(%(token)s)),
         d AS (SELECT b.database, p.* FROM pgfreeze.frozen_databases b
                 JOIN pg_database p ON p.oid = b.database WHERE b.token = %(token)s)
    SELECT m.at, m.lsn, m.xid,
           (SELECT COALESCE(jsonb_agg(jsonb_build_object('xid', a.backend_xid::text::bigint, 'pid', a.pid,
                       'database', a.datid::bigint, 'kind', a.backend_type, 'role', a.usename,
                       'application', a.application_name) ORDER BY a.pid), '[]')
              FROM pg_stat_activity a
             WHERE a.backend_xid IS NOT NULL AND a.pid <> pg_backend_pid() AND m.xid IS NOT NULL) AS working,
           (SELECT COALESCE(jsonb_agg(jsonb_build_object('xid', p.transaction::text::bigint, 'database', o.oid::bigint,
                       'gid', p.gid, 'role', p.owner) ORDER BY p.gid), '[]')
              FROM pg_prepared_xacts p LEFT JOIN pg_database o ON o.datname = p.database
             WHERE m.xid IS NOT NULL) AS prepared,
           (SELECT max(a.backend_start) FROM pg_stat_activity a
             WHERE a.backend_type = 'checkpointer') AS server_started,
           (SELECT state FROM f) AS state, (SELECT strategy FROM f) AS strategy, (SELECT admit FROM f) AS admit,
           (SELECT pgfreeze.locked(sessions) FROM f) AS locked, (SELECT lease_until FROM f) AS lease_until,
           (SELECT checkpoint_lsn::text FROM f) AS checkpoint_lsn,
           (SELECT thawed_by FROM f) AS thawed_by, (SELECT restoring_at FROM f) AS restoring_at,
           (SELECT COALESCE(jsonb_agg(jsonb_build_object('oid', d.database::bigint, 'name', d.datname,
                       'admits', d.datallowconn,
                       'version', (SELECT p.xmin::text FROM pg_database p WHERE p.oid = d.oid),
                       'tablespace', t.spcname, 'settings', s.version, 'read_only', COALESCE(s.read_only, false))
                       ORDER BY d.database), '[]')
              FROM d JOIN pg_tablespace t ON t.oid = d.dattablespace
              LEFT JOIN LATERAL (
                   SELECT c.xmin::text AS version,
                          EXISTS (SELECT FROM unnest(c.setconfig) AS e (entry)
                                   WHERE split_part(e.entry, '=', 1) = 'default_transaction_read_only'
                                     AND split_part(e.entry, '=', 2)::boolean) AS read_only
                     FROM pg_db_role_setting c
                    WHERE c.setdatabase = d.database AND c.setrole = 0) s ON true) AS databases,
           -- Of those who own something there or were granted something: any role may override the default for itself.
           ARRAY(SELECT o.rolname || ' in ' || o.datname FROM pgfreeze.overrides o
                   JOIN d ON d.database = o.database
                  WHERE pg_has_role(o.role, 'pg_write_all_data', 'MEMBER')
                     OR EXISTS (SELECT FROM pg_database w
                                 WHERE w.oid = o.database AND pg_has_role(o.role, w.datdba, 'MEMBER'))
                     OR EXISTS (SELECT FROM pg_shdepend s
                                 WHERE s.dbid = o.database AND s.refclassid = 'pg_authid'::regclass
                                   AND pg_has_role(o.role, s.refobjid, 'MEMBER')) ORDER BY 1) AS overrides,
           COALESCE((SELECT jsonb_agg(jsonb_build_object('pid', s.pid, 'role', s.usename, 'application',
                            s.application_name, 'kind', s.backend_type) ORDER BY s.pid)
                       FROM pgfreeze.sessions s JOIN d ON d.database = s.datid JOIN f ON f.strategy = 'read-only'
                       LEFT JOIN older o ON o.pid = s.pid AND COALESCE(o.backend_start = s.backend_start, true)
                      WHERE f.admit = 'nobody' OR f.barrier_at IS NULL OR s.backend_start IS NULL OR o.pid IS NOT NULL),
                    '[]') AS lingering,
           CASE WHEN (SELECT strategy FROM f) = 'privileges'
                THEN ARRAY(SELECT r.what || ' ' || r.name || ' to ' || r.who
                             FROM pgfreeze.revoked_entries(%(token)s) r WHERE r.present)
                ELSE '{}' END AS granted
      FROM moment m"""


@dataclass(frozen=True, slots=True)
class Database:
    """A frozen database. ``version`` and ``settings`` change with each ALTER DATABASE, even if another undoes it."""

    oid: int
    name: str
    admits: bool
    read_only: bool
    tablespace: str
    version: str
    settings: str | None


@dataclass(frozen=True, slots=True)
class Session:
    """A session. What is hidden from us is None."""

    pid: int
    role: str | None
    application: str | None
    kind: str | None

    def __str__(self) -> str:
        """Return who it is."""
        return f"pid {self.pid}, {self.role or 'unknown role'}, {self.application or self.kind or 'unknown'}"


@dataclass(frozen=True, slots=True)
class Transaction:
    """A transaction that has an id: it has written, or is about to. One that is prepared has a gid and no session.

    :ivar xid: the whole id, with its epoch.
    :ivar database: the OID; None for a process that belongs to none.
    """

    xid: int
    database: int | None
    gid: str | None = None
    pid: int | None = None
    kind: str | None = None
    role: str | None = None
    application: str | None = None

    def __str__(self) -> str:
        """Return who it is."""
        if self.gid is not None:
            return f"{self.gid} ({self.role}, transaction {self.xid})"
        return f"pid {self.pid}, {self.role or 'unknown role'}, {self.application or self.kind or 'unknown'}"


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of a freeze at one moment. The freeze's own fields are None if it is not in the journal any more.

    :ivar lingering: sessions that were there at the barrier; all that are there, if nobody is to be admitted.
    :ivar lsn: the WAL's end. :ivar xid: the id that this look drew.
    :ivar server_started: when the server's processes began, which is anew after a crash.
    :ivar granted: privileges that should be revoked. :ivar unlocked: tables without our lock.
    :ivar inside: what was seen in each of the databases themselves.
    """

    at: datetime
    lsn: str
    xid: int
    server_started: datetime | None
    state: str | None
    strategy: str | None
    admit: str | None
    locked: bool | None
    lease_until: datetime | None
    checkpoint_lsn: str | None
    thawed_by: str | None
    restoring_at: datetime | None
    databases: tuple[Database, ...]
    overrides: tuple[str, ...]
    lingering: tuple[Session, ...]
    transactions: tuple[Transaction, ...]
    granted: tuple[str, ...] = ()
    unlocked: tuple[str, ...] = ()
    inside: tuple[Inside, ...] = field(default=())

    @property
    def oids(self) -> frozenset[int]:
        """The frozen databases that are there."""
        return frozenset(one.oid for one in self.databases)

    def as_json(self) -> dict[str, Any]:
        """Return the look as the journal keeps it."""
        return {key: iso(value) if isinstance(value, datetime) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Look:
        """Return a look that the journal has kept.

        :raises ValueError: or another error, if it is none: what has to be there is not.
        """
        if any(kept[name] is None for name in ("at", "lsn", "xid")):
            raise ValueError("a look without a moment")
        times = ("at", "server_started", "lease_until", "restoring_at")
        return cls(
            **{
                **kept,
                **{name: None if kept[name] is None else datetime.fromisoformat(kept[name]) for name in times},
                "databases": tuple(Database(**one) for one in kept["databases"]),
                "overrides": tuple(kept["overrides"]),
                "lingering": tuple(Session(**one) for one in kept["lingering"]),
                "transactions": tuple(Transaction(**one) for one in kept["transactions"]),
                "granted": tuple(kept["granted"]),
                "unlocked": tuple(kept["unlocked"]),
                "inside": tuple(Inside.from_json(one) for one in kept["inside"]),
            }
        )

    def with_more(self, *, inside: tuple[Inside, ...] = (), unlocked: tuple[str, ...] | None = ()) -> Look:
        """Return this look with what was seen elsewhere at its moment.

        :param unlocked: None if a session that held the locks does not hold them any more.
        """
        locked = self.locked if unlocked is not None else False
        return replace(self, inside=self.inside + inside, unlocked=self.unlocked + (unlocked or ()), locked=locked)


def look(conn: Control, token: UUID) -> Look:
    """Look at a freeze now."""
    with conn.cursor(row_factory=dict_row) as cur:
        row = cur.execute(_LOOK, {"token": token}, prepare=True).fetchone()
    assert row is not None
    working, prepared = row.pop("working"), row.pop("prepared")
    return Look(
        **{
            **row,
            "databases": tuple(Database(**one) for one in row["databases"]),
            "overrides": tuple(row["overrides"]),
            "granted": tuple(row["granted"]),
            "lingering": tuple(Session(**one) for one in row["lingering"]),
            "transactions": tuple(
                Transaction(**{**one, "xid": whole(one["xid"], row["xid"])}) for one in (*working, *prepared)
            ),
        }
    )


def rehearse(conn: Control) -> None:
    """Have the server plan :func:`look` for this connection: it takes longer than the look itself."""
    look(conn, uuid4())


def whole(xid: int, drawn: int) -> int:
    """Return a 32-bit transaction id with its epoch: it is less than 2³¹ from the one that was just drawn."""
    distance = (xid - drawn) % 2**32
    return drawn + (distance if distance < 2**31 else distance - 2**32)
