"""The journal of a copy, read as data, and a thaw by statements of ours: none of its routines is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, LiteralString

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from pg_freeze import attest, strategies
from pg_freeze.attestation import Attestation
from pg_freeze.control import Control
from pg_freeze.copies.server import Open
from pg_freeze.errors import FreezeError
from pg_freeze.look import Look
from pg_freeze.model import Admit, Freeze, State
from pg_freeze.sequences import Inside

_TABLES: Final = ("freezes", "frozen_databases", "prior_settings", "attestations", "revoked")
# A column of a type that somebody has made, or one that is computed, and an index over an expression, run his code as
# soon as we read or write a row. Ours have none.
_KINDS: Final[LiteralString] = """
    SELECT c.relname::text, c.relkind = 'r' AND NOT c.relhasrules AND NOT EXISTS (
               SELECT FROM pg_attribute a LEFT JOIN pg_type t ON t.oid = a.atttypid
                WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                  AND (a.attgenerated <> '' OR t.typtype IS DISTINCT FROM 'b'
                       OR t.typnamespace <> 'pg_catalog'::regnamespace))
           AND NOT EXISTS (
               SELECT FROM pg_index i
                WHERE i.indrelid = c.oid
                  AND (i.indexprs IS NOT NULL
                       OR EXISTS (SELECT FROM pg_opclass o WHERE o.oid = ANY (i.indclass::oid[])
                                     AND o.opcnamespace <> 'pg_catalog'::regnamespace)
                       OR EXISTS (SELECT FROM pg_depend d
                                   WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
                                     AND d.refclassid IN ('pg_proc'::regclass, 'pg_operator'::regclass))))
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = 'pgfreeze' AND c.relname = ANY (%s)"""
_FREEZES: Final[LiteralString] = """
    SELECT token::uuid, ticket::bigint, holder::text, databases::text[], strategy::text, roles::text[], admit::text,
           state::text, requested_at::timestamptz, lease_until::timestamptz, barrier_at::timestamptz,
           drained_at::timestamptz, frozen_at::timestamptz, checkpoint_at::timestamptz,
           checkpoint_lsn::pg_lsn::text AS checkpoint_lsn, restored_at::timestamptz, thawed_at::timestamptz,
           thawed_by::text
      FROM pgfreeze.freezes"""
_DATABASES: Final[LiteralString] = """
    SELECT b.database::bigint, d.datname::text
      FROM pgfreeze.frozen_databases b LEFT JOIN pg_database d ON d.oid = b.database WHERE b.token = %s ORDER BY 1"""
_SETTINGS: Final[LiteralString] = """
    SELECT d.datname::text, r.rolname::text, p.value::text
      FROM pgfreeze.prior_settings p JOIN pg_database d ON d.oid = p.database LEFT JOIN pg_roles r ON r.oid = p.role
     WHERE p.token = %s AND (p.role = 0 OR r.oid IS NOT NULL)"""
_CLOSED: Final[LiteralString] = """
    SELECT d.datname::text FROM pgfreeze.frozen_databases b JOIN pg_database d ON d.oid = b.database
     WHERE b.token = %s AND b.closed AND NOT d.datallowconn"""
# Triggers that are enabled ALWAYS fire in spite of session_replication_role, and a CHECK is asked of each row. So for
# the time of our statements the tables have neither. Catalogs have no triggers of their own.
_TABLES_OF_OURS: Final[LiteralString] = """
    SELECT c.oid, c.relhastriggers, c.relchecks FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname = 'pgfreeze' AND c.relname = ANY (%s)"""
_SILENCED: Final[LiteralString] = "UPDATE pg_class SET relhastriggers = %s, relchecks = %s WHERE oid = %s"
_DONE: Final[tuple[LiteralString, ...]] = (
    """UPDATE pgfreeze.freezes SET state = 'thawed', thawed_by = 'verify-copy', thawed_at = clock_timestamp(),
              restoring_at = clock_timestamp(), restored_at = clock_timestamp() WHERE token = %s""",
    "UPDATE pgfreeze.frozen_databases SET active = false WHERE token = %s",
)
_READ_ONLY: Final = "default_transaction_read_only"


@dataclass(frozen=True, slots=True)
class Held:
    """A freeze that held when the copy was taken.

    :ivar databases: by OID, with the names that they have in the copy; those that are there.
    :ivar oids: of all that were frozen, as the journal says.
    :ivar first: what the last open attestation saw before the copy was taken.
    """

    freeze: Freeze
    databases: dict[int, str]
    oids: frozenset[int]
    attestations: tuple[Attestation, ...]
    first: Look | None

    def inside(self, oid: int, name: str) -> Inside | None:
        """Return what the first look has seen inside of a database, or why it has not."""
        seen = () if self.first is None else self.first.inside
        return next((one for one in seen if one.database == oid or (one.database is None and one.name == name)), None)

    @property
    def lost(self) -> str | None:
        """Which databases are not in the copy; None if all are."""
        names = self.freeze.databases
        if self.oids == self.databases.keys() and len(self.oids) == len(names):
            return None
        gone = ", ".join(f"OID {oid}" for oid in sorted(self.oids - self.databases.keys()))
        return (
            f"{', '.join(map(repr, names))} was frozen, and of these {len(names)} databases the copy has "
            f"{len(self.databases)}{gone and f': {gone} is not there'}"
        )


def read(conn: Control) -> tuple[list[Held], Freeze | None]:
    """Return the freezes that held, as the journal says, and the newest of all freezes; no rows where there is none.

    :raises FreezeError: if what is there is no journal that this version can read.
    """
    kinds = dict(conn.execute(_KINDS, (list(_TABLES),)).fetchall())
    if not kinds:
        return [], None
    if missing := [name for name in _TABLES if not kinds.get(name)]:
        raise FreezeError(f"the journal in {conn.info.dbname!r} is none of ours: {missing[0]} is not one of its tables")
    try:
        held = _freezes(conn, " WHERE state IN ('draining', 'frozen') ORDER BY requested_at LIMIT 1000")
        newest = _freezes(conn, " ORDER BY requested_at DESC LIMIT 1")
        return [_held(conn, one) for one in held], next(iter(newest), None)
    except (psycopg.Error, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, psycopg.OperationalError):
            raise
        said = " ".join(str(error).split())
        raise FreezeError(
            f"the journal in {conn.info.dbname!r} cannot be read: {said}. Verify it with the version that froze"
        ) from error


def _freezes(conn: Control, which: LiteralString) -> list[Freeze]:
    with conn.cursor(row_factory=dict_row) as cur:
        return [
            Freeze(
                **{
                    **row,
                    "databases": tuple(row["databases"]),
                    "roles": tuple(row["roles"]),
                    "strategy": strategies.named(row["strategy"]).name,
                    "admit": Admit(row["admit"]),
                    "state": State(row["state"]),
                }
            )
            for row in cur.execute(_FREEZES + which)
        ]


def _held(conn: Control, freeze: Freeze) -> Held:
    rows = conn.execute(_DATABASES, (freeze.token,)).fetchall()
    databases = {int(oid): str(name) for oid, name in rows if name is not None}
    last = conn.execute(
        "SELECT before FROM pgfreeze.attestations WHERE token = %s ORDER BY id DESC LIMIT 1", (freeze.token,)
    ).fetchone()
    first = None if last is None else Look.from_json(last[0])
    return Held(freeze, databases, frozenset(int(oid) for oid, _ in rows), attest.of_token(conn, freeze.token), first)


def thaw(conn: Control, held: Held) -> None:
    """Bring back what the freeze had changed, and say so in the journal, all in one transaction.

    :raises psycopg.Error: if the copy refuses it.
    """
    token = held.freeze.token
    with conn.transaction():
        silenced = conn.execute(_TABLES_OF_OURS, (list(_TABLES),)).fetchall()
        for oid, _, _ in silenced:
            conn.execute(_SILENCED, (False, 0, oid))
        for database, role, value in conn.execute(_SETTINGS, (token,)).fetchall():
            target = sql.SQL("DATABASE {}").format(sql.Identifier(database))
            if role is not None:
                target = sql.SQL("ROLE {} IN DATABASE {}").format(sql.Identifier(role), sql.Identifier(database))
            _set(conn, target, _READ_ONLY, value)
        for (name,) in conn.execute(_CLOSED, (token,)).fetchall():
            conn.execute(sql.SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS true").format(sql.Identifier(name)))
        strategies.of(held.freeze.strategy).thaw_copy(conn, held.freeze)
        for statement in _DONE:
            conn.execute(statement, (token,))
        for oid, triggers, checks in silenced:
            conn.execute(_SILENCED, (triggers, checks, oid))


def _set(conn: Control, target: sql.Composed, setting: LiteralString, value: str | None) -> None:
    if value is None:
        conn.execute(sql.SQL("ALTER {} RESET " + setting).format(target))
    else:
        conn.execute(sql.SQL("ALTER {} SET " + setting + " = {}").format(target, sql.Literal(value)))


def still_read_only(connect: Open, names: Sequence[str]) -> Iterator[str]:
    """Yield why a new session cannot write to a database after the thaw."""
    for name in names:
        try:
            with connect(name, plain=True) as session:
                row = session.execute("SHOW transaction_read_only").fetchone()
                if row is None or row[0] != "off":
                    yield f"{name!r} was read-only before the freeze, and is so again"
        except psycopg.OperationalError as error:
            yield f"{name!r} cannot be entered after the thaw: {' '.join(str(error).split())}"
