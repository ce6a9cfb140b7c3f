"""The journal's schema in the maintenance database, or in the frozen one: whether it is there, and putting it there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.resources import files
from typing import Final, LiteralString, NamedTuple

import psycopg
from psycopg import sql

from pg_freeze import trust
from pg_freeze.control import Control
from pg_freeze.errors import FreezeRefused

_INSTALLED: Final[LiteralString] = """
    SELECT obj_description(oid, 'pg_namespace'), has_schema_privilege(oid, 'USAGE'), pg_has_role(nspowner, 'USAGE')
      FROM pg_namespace WHERE nspname = 'pgfreeze'"""
# Who may use the journal as `install --grant` lets them.
_USERS: Final[LiteralString] = """
    SELECT r.rolname::text FROM pg_class c
      CROSS JOIN LATERAL aclexplode(c.relacl) a JOIN pg_roles r ON r.oid = a.grantee
     WHERE c.oid = to_regclass('pgfreeze.tickets') AND a.grantee <> c.relowner AND a.privilege_type = 'INSERT'"""
# A view that is made anew has lost its grants. Whoever may only read, may only read afterwards.
_READERS: Final[LiteralString] = """
    SELECT c.relname::text, r.rolname::text FROM pg_class c
      CROSS JOIN LATERAL aclexplode(c.relacl) a JOIN pg_roles r ON r.oid = a.grantee
     WHERE c.relnamespace = to_regnamespace('pgfreeze') AND c.relkind = 'v' AND a.grantee <> c.relowner
       AND a.privilege_type = 'SELECT'"""


class Installed(NamedTuple):
    """What is installed: nothing (version None), ours, or another version; and whether we may use and replace it."""

    version: str | None
    usable: bool
    owned: bool

    @property
    def current(self) -> bool:
        """Whether the journal on the server is the one that this package brings."""
        return self.version == version()


@cache
def _install_script() -> str:
    here = files("pg_freeze") / "sql"
    return "".join((here / name).read_text(encoding="utf-8") for name in ("install.sql", "rows.sql", "privileges.sql"))


@cache
def version() -> str:
    """Return the version of the journal: the digest of its definition, so that it cannot be forgotten."""
    return "airflow-pg-freeze journal " + hashlib.sha256(_install_script().encode()).hexdigest()[:16]


def installed(conn: Control) -> Installed:
    """Return what journal the server has."""
    row = conn.execute(_INSTALLED).fetchone()
    return Installed(None, False, False) if row is None else Installed(row[0] or "unknown", row[1], row[2])


def install(conn: Control, grant: Sequence[str] = ()) -> bool:
    """Create or upgrade the journal, and let the roles in *grant* use it. What is created is ours.

    :returns: whether anything had to be created or replaced.
    :raises FreezeRefused: if there is one already, and somebody else made it.
    :raises psycopg.errors.InsufficientPrivilege: without CREATE on the maintenance database, or as a stranger.
    """
    if trust.has_journal(conn) and not grant and installed(conn).current:
        return False
    for _ in range(3):
        # An advisory lock would be anybody's to take, and to hold. Two first pauses at once collide in CREATE SCHEMA
        # instead, and whoever comes second looks again, also at whose it is.
        with suppress(psycopg.errors.UniqueViolation, psycopg.errors.DuplicateSchema):
            return _install(conn, grant)
    return _install(conn, grant)


def _install(conn: Control, grant: Sequence[str]) -> bool:
    with conn.transaction():
        if not trust.has_journal(conn):
            conn.execute("CREATE SCHEMA pgfreeze")  # fails if somebody has made one since
        elif installed(conn).owned and conn.execute("SELECT to_regclass('pgfreeze.tickets')").fetchone() != (None,):
            conn.execute("LOCK TABLE pgfreeze.tickets IN SHARE ROW EXCLUSIVE MODE")  # one at a time
        fresh = not installed(conn).current
        users = list(grant)
        if fresh:
            users += [role for (role,) in conn.execute(_USERS)]
            readers = conn.execute(_READERS).fetchall()
            conn.execute(_install_script())
            conn.execute(sql.SQL("COMMENT ON SCHEMA pgfreeze IS {}").format(sql.Literal(version())))
            for view, role in readers:
                if conn.execute("SELECT to_regclass(format('pgfreeze.%%I', %s::text))", (view,)).fetchone() != (None,):
                    reads = sql.SQL("GRANT SELECT ON pgfreeze.{} TO {}")
                    conn.execute(reads.format(sql.Identifier(view), sql.Identifier(role)))
        for role in users:
            for right in (
                "USAGE ON SCHEMA pgfreeze",
                "SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA pgfreeze",
                "EXECUTE ON ALL ROUTINES IN SCHEMA pgfreeze",
            ):
                conn.execute(sql.SQL("GRANT " + right + " TO {}").format(sql.Identifier(role)))
    return fresh


def require(conn: Control) -> bool:
    """Return whether there is a journal at all, and make sure that its code is of roles that we trust.

    :raises FreezeRefused: if there is one that we may not read, or whose code is not to be trusted.
    """
    return readable(conn) and trust.has_journal(conn)


def readable(conn: Control) -> bool:
    """Return whether there is a journal at all, whosever it is: for a server of which nothing is to be protected.

    :raises FreezeRefused: if there is one that we may not read.
    """
    found = installed(conn)
    if found.version is not None and not found.usable:
        role = conn.info.user
        raise FreezeRefused(
            f"role {role!r} may not read the journal: as its owner, run `pg-freeze install --grant {role}`"
        )
    return found.version is not None
