"""The strategy ``privileges``: write privileges are revoked, of everybody or of chosen roles, and given back.

An ACL cannot be changed from another database. So the journal, the dead-man switch and the thaw are in the frozen
database itself. The work is done by ``sql/privileges.sql``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Final, LiteralString

from psycopg import sql

from pg_freeze import findings
from pg_freeze.control import Control
from pg_freeze.errors import ThawFailed
from pg_freeze.findings import Around
from pg_freeze.model import PRIVILEGES, Finding, Freeze, State
from pg_freeze.strategies.base import SESSIONS, Strategy

_NOT_GIVEN_BACK: Final[LiteralString] = """
    SELECT what || ' ' || name || ' to ' || who FROM pgfreeze.revoked_entries(%(token)s)
     WHERE NOT present
       AND EXISTS (SELECT FROM pgfreeze.freezes WHERE token = %(token)s AND state = 'thawing')
     ORDER BY level, name"""
# Under a freeze nobody else changes an ACL: it is what it was again, with the dependencies on roles that go with it.
_ACLS: Final[tuple[LiteralString, ...]] = (
    """UPDATE pg_class c SET relacl = v.acl::aclitem[] FROM pgfreeze.revoked v
        WHERE v.token = %s AND v.catalog = 'pg_class'::regclass AND v.object = c.oid""",
    """UPDATE pg_attribute c SET attacl = v.acl::aclitem[] FROM pgfreeze.revoked v
        WHERE v.token = %s AND v.catalog = 'pg_attribute'::regclass AND v.object = c.attrelid
          AND v.attnum = c.attnum""",
    """UPDATE pg_namespace c SET nspacl = v.acl::aclitem[] FROM pgfreeze.revoked v
        WHERE v.token = %s AND v.catalog = 'pg_namespace'::regclass AND v.object = c.oid""",
    """UPDATE pg_largeobject_metadata c SET lomacl = v.acl::aclitem[] FROM pgfreeze.revoked v
        WHERE v.token = %s AND v.catalog = 'pg_largeobject_metadata'::regclass AND v.object = c.oid""",
    """INSERT INTO pg_shdepend (dbid, classid, objid, objsubid, refclassid, refobjid, deptype)
       SELECT DISTINCT d.oid, c.class, v.object, v.attnum::integer, 'pg_authid'::regclass::oid, r.oid, 'a'::"char"
         FROM pgfreeze.revoked v
        CROSS JOIN LATERAL aclexplode(v.acl::aclitem[]) x
        CROSS JOIN LATERAL (VALUES (x.grantor), (x.grantee)) AS r (oid)
        CROSS JOIN LATERAL (SELECT CASE v.catalog WHEN 'pg_attribute'::regclass THEN 'pg_class'::regclass::oid
                                   WHEN 'pg_largeobject_metadata'::regclass THEN 'pg_largeobject'::regclass::oid
                                   ELSE v.catalog END AS class) AS c
         JOIN pg_database d ON d.datname = current_database()
        WHERE v.token = %s AND r.oid <> v.owner AND r.oid >= 16384
          AND NOT EXISTS (SELECT FROM pg_shdepend s WHERE s.dbid = d.oid AND s.classid = c.class AND s.objid = v.object
                             AND s.objsubid = v.attnum AND s.refobjid = r.oid AND s.deptype IN ('a', 'o'))""",
    "DELETE FROM pgfreeze.revoked WHERE token = %s",
)
_MARKS: Final[LiteralString] = """
    SELECT r.rolname::text, substr(c.entry, length('application_name=') + 1)
      FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase AND d.datname = current_database()
      JOIN pg_roles r ON r.oid = s.setrole, unnest(s.setconfig) AS c (entry)
     WHERE starts_with(c.entry, 'application_name=pg-freeze inside ' || %s)"""


class Privileges(Strategy):
    """Refuses writes, and ends nobody who does not write already."""

    name = PRIVILEGES
    own_journal = True
    options = frozenset({"roles"})
    proof = frozenset({SESSIONS})
    ends_idle = False
    # Whoever passed the check before: it has the table's lock until its transaction ends. A statement that needs no new
    # lock does not hear of the revocation either.
    lingers: ClassVar[LiteralString] = """was.in_it
        AND EXISTS (SELECT FROM pg_locks l
                     WHERE l.pid = s.pid AND l.locktype = 'relation' AND l.database = s.datid
                       AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock',
                                      'AccessExclusiveLock'))
        AND (held.roles = '{}' OR 'public' = ANY (held.roles)
             OR EXISTS (SELECT FROM pg_roles r
                         WHERE r.rolname::text = ANY (held.roles)
                           AND COALESCE(pg_has_role(s.usename, r.oid, 'MEMBER'), true)))"""

    def findings(self, around: Around) -> Iterator[Finding]:
        """Yield who writes in spite of it. What may not be revoked, the server finds when it tries."""
        yield from findings.signal(around)
        yield from findings.prepared(around)
        yield from findings.subscriptions(around)
        yield from findings.superusers(around)

    def check_thawed(self, conn: Control, freeze: Freeze) -> None:
        """Raise ThawFailed if some privileges could not be given back: the role that thawed may not grant them."""
        missing = [one for (one,) in conn.execute(_NOT_GIVEN_BACK, {"token": freeze.token})]
        if missing:
            (name,) = freeze.databases
            literal = name.replace("'", "''")
            raise ThawFailed(
                f"STILL FROZEN: {name!r}, in part. Role {conn.info.user!r} may not give back "
                f"{'; '.join(missing[:10])}{'; …' if len(missing) > 10 else ''}. Give it the right "
                "back, and it is thawed by itself; or resume as a role that may; or, as a superuser who has looked "
                f"whose code it is (docs/stuck.md), in psql, connected to {name!r}: CALL pgfreeze.thaw('{literal}')"
            )

    def thaw_copy(self, conn: Control, freeze: Freeze) -> None:
        """Give back each ACL to the letter, and take the mark away."""
        for statement in _ACLS:
            conn.execute(statement, (freeze.token,))
        for role, value in conn.execute(_MARKS, (str(freeze.token),)).fetchall():
            here = sql.SQL("ALTER ROLE {} IN DATABASE {} ").format(
                sql.Identifier(role), sql.Identifier(conn.info.dbname)
            )
            _, _, prior = value.removeprefix("pg-freeze inside ").partition(" ")
            if prior:
                conn.execute(here + sql.SQL("SET application_name = {}").format(sql.Literal(prior)))
            else:
                conn.execute(here + sql.SQL("RESET application_name"))

    def facts(self, freeze: Freeze) -> dict[str, str]:
        """Return whose privileges are revoked."""
        if freeze.state is State.THAWING:
            return {"privileges": "not all given back: whoever thawed may not grant them; thaw it as a role that may"}
        revoked = f"revoked from {', '.join(freeze.roles) or 'everybody but superusers'}"
        return {**({"privileges": revoked} if freeze.holds else {}), **super().facts(freeze)}


STRATEGY: Final = Privileges()
