"""Whose code we run: routines, views and triggers run with their caller's rights, and belong to who may replace them.

We trust a superuser; ourselves, as we have logged in, since a routine can undo a SET ROLE; and, if we are no superuser,
a role that may act for us. The code of these can do nothing that they could not do anyway. Nobody else: a role that
nobody can become today may be one that somebody could become yesterday, when he gave it his code.

A role may act for us if it can get there by what PostgreSQL 16 and later write on a membership: SET, INHERIT, or ADMIN,
with which a role grants itself the others. A membership with none of the three gives nothing, and is none.

The rows of the journal are believed of these roles, and of those that ``install --grant`` has named. These have INSERT
and UPDATE on its tables, all of them, and no other right to write. If it lets anybody else write, it is not used.
"""

from __future__ import annotations

from typing import Any, Final, LiteralString

from psycopg import Connection, sql

from pg_freeze.errors import FreezeRefused
from pg_freeze.names import quoted

# From us backwards: who can become us (full), and who has at least our privileges. To become another role takes SET all
# the way; privileges are inherited from there on. Whoever has the privileges of an ADMIN grants himself the membership.
# Before PostgreSQL 16 there are no such options: each member may SET ROLE.
_TRUSTED: Final[LiteralString] = """
    WITH RECURSIVE us AS (SELECT oid, rolsuper FROM pg_catalog.pg_roles WHERE rolname = %(user)s),
    way (role, becomes) AS (
        SELECT us.oid, b.becomes FROM us, (VALUES (true), (false)) AS b (becomes) WHERE NOT us.rolsuper
         UNION
        SELECT m.member, b.becomes
          FROM way w JOIN pg_catalog.pg_auth_members m ON m.roleid = w.role
         CROSS JOIN LATERAL (SELECT pg_catalog.to_jsonb(m) AS option) o, (VALUES (true), (false)) AS b (becomes)
         WHERE CASE WHEN w.becomes
                    THEN m.admin_option OR b.becomes AND COALESCE((o.option ->> 'set_option')::boolean, true)
                    ELSE COALESCE((o.option ->> 'inherit_option')::boolean, false) END)
    SELECT oid FROM pg_catalog.pg_roles WHERE rolsuper UNION SELECT role FROM way WHERE becomes
     UNION SELECT oid FROM us"""
# Who was granted a right to write rows otherwise than `install --grant` does it. A view's rights are its tables'.
_WRITERS: Final[LiteralString] = """
    WITH t AS (
        SELECT c.oid, c.relname, c.relkind, c.relacl
          FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = 'pgfreeze' AND c.relkind IN ('r', 'p', 'S')),
    granted AS (
        SELECT t.oid, t.relname, a.grantee, a.privilege_type AS what, a.is_grantable, false AS part
          FROM t, pg_catalog.aclexplode(t.relacl) a
         UNION ALL
        SELECT t.oid, t.relname, a.grantee, a.privilege_type, a.is_grantable, true
          FROM t JOIN pg_catalog.pg_attribute p ON p.attrelid = t.oid AND NOT p.attisdropped,
               pg_catalog.aclexplode(p.attacl) a),
    unnamed AS (
        SELECT g.grantee FROM (SELECT DISTINCT grantee FROM granted) g, t
         WHERE t.relname IN ('tickets', 'freezes', 'frozen_databases', 'prior_settings', 'attestations')
           AND (g.grantee = 0 OR (SELECT pg_catalog.count(DISTINCT f.what) FROM granted f
                                   WHERE f.oid = t.oid AND f.grantee = g.grantee AND NOT f.part
                                     AND f.what IN ('INSERT', 'UPDATE')) < 2))
    SELECT COALESCE(r.rolname::text, CASE g.grantee WHEN 0 THEN 'PUBLIC' END, g.grantee::text), g.what, g.relname::text
      FROM granted g JOIN t USING (oid) LEFT JOIN pg_catalog.pg_roles r ON r.oid = g.grantee
     WHERE g.grantee <> ALL (%(trusted)s::oid[])
       AND (g.what IN ('DELETE', 'TRUNCATE') OR t.relkind = 'S' AND g.what IN ('UPDATE', 'USAGE')
            OR g.what IN ('INSERT', 'UPDATE')
               AND (g.is_grantable OR g.grantee IN (SELECT u.grantee FROM unnamed u)))
     ORDER BY 3, 1, 2 LIMIT 1"""
# The objects of the schema; their parts (rules, triggers, defaults, constraints, policies, indexes) and heirs; and
# whatever these depend on, wherever it is, and so on. What is pinned depends on nothing and is not listed.
_INVOLVED: Final[LiteralString] = """
    WITH RECURSIVE n AS (SELECT * FROM pg_catalog.pg_namespace WHERE nspname = 'pgfreeze'),
    involved (class, object) AS (
        SELECT 'pg_catalog.pg_namespace'::regclass::oid, oid FROM n
         UNION
        SELECT d.class, d.object FROM involved i CROSS JOIN LATERAL (
            SELECT p.classid, p.objid FROM pg_catalog.pg_depend p
             WHERE p.refclassid = i.class AND p.refobjid = i.object
               AND (p.deptype IN ('a', 'i')
                    OR i.class = 'pg_catalog.pg_namespace'::regclass AND i.object IN (SELECT oid FROM n))
             UNION ALL SELECT p.refclassid, p.refobjid FROM pg_catalog.pg_depend p
             WHERE p.classid = i.class AND p.objid = i.object
             UNION ALL SELECT i.class, h.inhrelid FROM pg_catalog.pg_inherits h
             WHERE i.class = 'pg_catalog.pg_class'::regclass AND h.inhparent = i.object) AS d (class, object)),
    o (oid, what) AS (
        SELECT b.owner, CASE WHEN i.class = 'pg_catalog.pg_namespace'::regclass THEN 'the schema'
                             ELSE pg_catalog.pg_describe_object(i.class, i.object, 0) END
          FROM involved i CROSS JOIN LATERAL (
            SELECT nspowner FROM pg_catalog.pg_namespace
             WHERE oid = i.object AND i.class = 'pg_catalog.pg_namespace'::regclass
             UNION ALL
            SELECT relowner FROM pg_catalog.pg_class
             WHERE oid = i.object AND i.class = 'pg_catalog.pg_class'::regclass
             UNION ALL
            SELECT proowner FROM pg_catalog.pg_proc
             WHERE oid = i.object AND i.class = 'pg_catalog.pg_proc'::regclass
             UNION ALL
            SELECT typowner FROM pg_catalog.pg_type
             WHERE oid = i.object AND i.class = 'pg_catalog.pg_type'::regclass
             UNION ALL
            SELECT oprowner FROM pg_catalog.pg_operator
             WHERE oid = i.object AND i.class = 'pg_catalog.pg_operator'::regclass
             UNION ALL
            SELECT collowner FROM pg_catalog.pg_collation
             WHERE oid = i.object AND i.class = 'pg_catalog.pg_collation'::regclass
             UNION ALL
            SELECT opcowner FROM pg_catalog.pg_opclass
             WHERE oid = i.object AND i.class = 'pg_catalog.pg_opclass'::regclass
             UNION ALL
            SELECT lanowner FROM pg_catalog.pg_language
             WHERE oid = i.object AND i.class = 'pg_catalog.pg_language'::regclass
        ) AS b (owner)
         -- A schema that something of ours depends on is but a name.
         WHERE i.class <> 'pg_catalog.pg_namespace'::regclass OR i.object IN (SELECT oid FROM n)
         UNION ALL SELECT a.grantee, 'the right to add to the schema' FROM n, pg_catalog.aclexplode(n.nspacl) a
              WHERE a.privilege_type = 'CREATE'
         UNION ALL SELECT a.grantee, 'the right to put triggers on ' || c.relname
              FROM pg_catalog.pg_class c JOIN n ON n.oid = c.relnamespace, pg_catalog.aclexplode(c.relacl) a
              WHERE a.privilege_type = 'TRIGGER')
    SELECT COALESCE(r.rolname::text, CASE o.oid WHEN 0 THEN 'PUBLIC' END, o.oid::text), o.what
      FROM o LEFT JOIN pg_catalog.pg_roles r ON r.oid = o.oid
     WHERE o.oid <> ALL (%(trusted)s::oid[]) ORDER BY o.what <> 'the schema', 2 LIMIT 1"""
_THERE: Final[LiteralString] = "SELECT FROM pg_catalog.pg_namespace WHERE nspname = 'pgfreeze'"
# A login trigger runs as whoever connects, before he can look at it. What switches event triggers off here holds there
# too if it comes with the connection, or if it is our role's or the server's and the other database says nothing else.
_ON_LOGIN: Final[LiteralString] = """
    SELECT true FROM pg_catalog.pg_database d
     WHERE d.datname = %s AND (pg_catalog.to_jsonb(d) ->> 'dathasloginevt')::boolean
       AND NOT EXISTS (
           SELECT FROM pg_catalog.pg_settings s
            WHERE s.name = 'event_triggers' AND s.setting = 'off'
              AND (s.source = 'client' OR d.datname = pg_catalog.current_database()
                   OR s.source NOT IN ('database', 'database user')
                      AND NOT EXISTS (SELECT FROM pg_catalog.pg_db_role_setting o,
                                                  pg_catalog.unnest(o.setconfig) AS c (entry)
                                       WHERE o.setdatabase = d.oid
                                         AND pg_catalog.starts_with(c.entry, 'event_triggers='))))"""
_LOGINS_HERE: Final[LiteralString] = """
    SELECT t.evtname::text, pg_catalog.pg_get_userbyid(p.proowner)::text
      FROM pg_catalog.pg_event_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.evtfoid
     WHERE t.evtevent = 'login' AND t.evtenabled <> 'D' AND p.proowner <> ALL (%s::oid[])
       AND pg_catalog.current_setting('event_triggers', true) IS DISTINCT FROM 'off'
     ORDER BY 1"""


def trusted_roles(conn: Connection[Any]) -> list[int]:
    """Return the OIDs of the roles whose code we run in this server."""
    return [oid for (oid,) in conn.execute(_TRUSTED, {"user": conn.info.user})]


def has_journal(conn: Connection[Any]) -> bool:
    """Return whether there is a journal here, all of which belongs to roles that we trust, and whose rows they write.

    :raises FreezeRefused: if some of it belongs to another role, whose code would run with our rights; or if another
        role may write to it, whom ``install --grant`` has not named.
    """
    if conn.execute(_THERE).fetchone() is None:
        return False
    trusted = {"trusted": trusted_roles(conn)}
    found = conn.execute(_INVOLVED, trusted).fetchone()
    if found is not None:
        raise FreezeRefused(_refusal(conn, *found))
    writer = conn.execute(_WRITERS, trusted).fetchone()
    if writer is not None:
        role, right, table = writer
        name = "PUBLIC" if role == "PUBLIC" else quoted(role)
        raise FreezeRefused(
            f"the journal in {conn.info.dbname!r} cannot be believed: role {role!r} may {right} in pgfreeze.{table}, "
            f"and is none that `pg-freeze install --grant` has named. As its owner: REVOKE ALL ON ALL TABLES IN SCHEMA "
            f"pgfreeze FROM {name}; REVOKE ALL ON ALL SEQUENCES IN SCHEMA pgfreeze FROM {name}; and if it is to "
            "freeze, install --grant it then"
        )
    return True


def _refusal(conn: Connection[Any], role: str, what: str) -> str:
    owner = sql.Identifier(role).as_string(conn)
    return (
        f"{what} of the journal (schema pgfreeze in {conn.info.dbname!r}) belongs to role {role!r}, whose code would "
        f"run with the rights of {conn.info.user!r}: log in as {owner}; or drop it, if it is not ours (DROP SCHEMA "
        "pgfreeze CASCADE), and have a superuser install one for everybody: pg-freeze install --grant … "
        "(docs/security.md)"
    )


def runs_on_login(conn: Connection[Any], name: str) -> bool:
    """Whether to connect to database *name* runs an event trigger (PostgreSQL 17 and later).

    From outside nobody sees whose it is.

    :param conn: a connection to another database, made with the same options.
    """
    return conn.execute(_ON_LOGIN, (name,)).fetchone() is not None


def untrusted_logins(conn: Connection[Any]) -> list[tuple[str, str]]:
    """Return the event triggers on login that ran in this session, but for those whose function we trust.

    :returns: of each its name, and the role that owns its function.
    """
    return conn.execute(_LOGINS_HERE, (trusted_roles(conn),)).fetchall()


def check_login(conn: Connection[Any], name: str) -> None:
    """Refuse to connect to database *name* if that runs somebody's code.

    :param conn: as for :func:`runs_on_login`.
    :raises FreezeRefused: saying what keeps it from running.
    """
    if runs_on_login(conn, name):
        raise FreezeRefused(
            f"database {name!r} has an event trigger on login, which would run with the rights of {conn.info.user!r}: "
            f"as a superuser, ALTER ROLE {quoted(conn.info.user)} SET event_triggers = off;"
        )
