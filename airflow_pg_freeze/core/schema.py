"""The journal's schema in the maintenance database, or in the frozen one: whether it is there, and putting it there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Final, LiteralString, NamedTuple

from psycopg import sql

from airflow_pg_freeze.core.control import Control
from airflow_pg_freeze.core.errors import FreezeRefused

_INSTALLED: Final[LiteralString] = """
    SELECT obj_description(oid, 'pg_namespace'), has_schema_privilege(oid, 'USAGE'), pg_has_role(nspowner, 'USAGE')
      FROM pg_namespace WHERE nspname = 'airflow_pg_freeze'"""
_GRANTED: Final[LiteralString] = """
    SELECT r.rolname FROM pg_namespace n CROSS JOIN LATERAL aclexplode(n.nspacl) a JOIN pg_roles r ON r.oid = a.grantee
     WHERE n.nspname = 'airflow_pg_freeze' AND a.grantee <> n.nspowner AND a.privilege_type = 'USAGE'"""


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
    here = files("airflow_pg_freeze.core") / "sql"
    return "".join((here / name).read_text(encoding="utf-8") for name in ("install.sql", "privileges.sql"))


@cache
def version() -> str:
    """Return the version of the journal: the digest of its definition, so that it cannot be forgotten."""
    return "airflow-pg-freeze journal " + hashlib.sha256(_install_script().encode()).hexdigest()[:16]


def installed(conn: Control) -> Installed:
    """Return what journal the server has."""
    row = conn.execute(_INSTALLED).fetchone()
    return Installed(None, False, False) if row is None else Installed(row[0] or "unknown", row[1], row[2])


def install(conn: Control, grant: Sequence[str] = ()) -> bool:
    """Create or upgrade the journal, and let the roles in *grant* use it.

    :returns: whether anything had to be created or replaced.
    :raises psycopg.errors.InsufficientPrivilege: without CREATE on the maintenance database, or as a stranger.
    """
    if not grant and installed(conn).current:
        return False
    with conn.transaction():
        # Two first pauses at once would collide in CREATE SCHEMA IF NOT EXISTS, which is not safe against that.
        conn.execute("SELECT pg_advisory_xact_lock(hashtextextended('airflow_pg_freeze', 0))")
        fresh = not installed(conn).current
        if fresh:
            conn.execute(_install_script())
            conn.execute(sql.SQL("COMMENT ON SCHEMA airflow_pg_freeze IS {}").format(sql.Literal(version())))
        # A view that was replaced has lost its grants.
        for role in (*grant, *([row[0] for row in conn.execute(_GRANTED)] if fresh else ())):
            for right in (
                "USAGE ON SCHEMA airflow_pg_freeze",
                "SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA airflow_pg_freeze",
                "EXECUTE ON ALL ROUTINES IN SCHEMA airflow_pg_freeze",
            ):
                conn.execute(sql.SQL("GRANT " + right + " TO {}").format(sql.Identifier(role)))
            # A superuser who thaws grants what this table says.
            conn.execute(
                sql.SQL("REVOKE INSERT, UPDATE ON airflow_pg_freeze.revoked FROM {}").format(sql.Identifier(role))
            )
    return fresh


def require(conn: Control) -> bool:
    """Return whether there is a journal at all.

    :raises FreezeRefused: if there is one that we may not read.
    """
    found = installed(conn)
    if found.version is not None and not found.usable:
        role = conn.info.user
        raise FreezeRefused(
            f"role {role!r} may not read the journal: as its owner, run `pg-freeze install --grant {role}`"
        )
    return found.version is not None
