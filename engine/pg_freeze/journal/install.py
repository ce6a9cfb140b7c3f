"""Creates the journal, upgrades it, and removes it: each in one transaction, so a death leaves what was there before.

An upgrade may come while databases are frozen. Their dead-man switches go on in the routines of the version that they
began in. These call other routines by name, and so from then on the new ones. Two rules keep such a switch alive:

- An upgrade waits for nobody while it holds a lock that a switch may want. So no deadlock can end a switch. It takes
  all its locks at once, or none, and tries again. After that nobody reads or writes the journal until it is done.
- What a switch, or a program of another version, calls keeps its name and its parameters. A test lists these routines.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Final, LiteralString

import psycopg
from psycopg import sql

from pg_freeze import trust
from pg_freeze.control import Control
from pg_freeze.errors import FreezeError, FreezeRefused
from pg_freeze.journal import definition
from pg_freeze.journal.definition import Definition
from pg_freeze.journal.schema import Installed, Mismatch, check, command, installed, mismatch

#: For how long an upgrade tries to find the journal unused for a moment.
PATIENCE: Final = timedelta(seconds=20)
# What shows that somebody was faster: a lock, the same row of a catalog ("tuple concurrently updated" has no better
# SQLSTATE), a deadlock, or a schema that was not there a moment before.
_COLLISIONS: Final = ("55P03", "XX000", "40P01", "23505", "42P06")

# Who may use the journal as `install --grant` lets them.
_USERS: Final[LiteralString] = """
    SELECT r.rolname::text FROM pg_class c
      CROSS JOIN LATERAL aclexplode(c.relacl) a JOIN pg_roles r ON r.oid = a.grantee
     WHERE c.oid = to_regclass('pgfreeze.tickets') AND a.grantee <> c.relowner AND a.privilege_type = 'INSERT'"""
# A view that is made anew has lost its grants. Whoever may only read, may only read afterwards.
_READERS: Final[LiteralString] = """
    SELECT c.relname::text, r.rolname::text FROM pg_class c
      CROSS JOIN LATERAL aclexplode(c.relacl) a JOIN pg_roles r ON r.oid = a.grantee
     WHERE c.relnamespace = 'pgfreeze'::regnamespace AND c.relkind = 'v' AND a.grantee <> c.relowner
       AND a.privilege_type = 'SELECT'"""
_RELATIONS: Final[LiteralString] = """
    SELECT relname::text FROM pg_class
     WHERE relnamespace = 'pgfreeze'::regnamespace AND relkind::text = ANY (%s) ORDER BY oid"""
# The routines that this transaction has not made. While anything is frozen its switch may still call one of them.
_LEFT_OVER: Final[LiteralString] = """
    SELECT p.oid::regprocedure::text FROM pg_proc p
     WHERE p.pronamespace = 'pgfreeze'::regnamespace
       AND p.xmin::text::bigint <> pg_current_xact_id()::text::bigint % 4294967296
       AND NOT EXISTS (SELECT FROM pgfreeze.freezes WHERE state <> 'thawed')"""
# Each as DROP names it. The routines are dropped in one statement: some depend on others.
_TRIGGERS: Final[LiteralString] = """
    SELECT format('%I ON %s', t.tgname, t.tgrelid::regclass) FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
     WHERE c.relnamespace = 'pgfreeze'::regnamespace AND NOT t.tgisinternal"""
_ROUTINES: Final[LiteralString] = """
    SELECT string_agg(p.oid::regprocedure::text, ', ') FROM pg_proc p
     WHERE p.pronamespace = 'pgfreeze'::regnamespace HAVING count(*) > 0"""
_OPEN: Final[LiteralString] = """
    SELECT databases, holder, state FROM pgfreeze.freezes WHERE state <> 'thawed' ORDER BY requested_at"""
_READ_ONLY_HERE: Final[LiteralString] = """
    SELECT true FROM pg_database d JOIN pg_db_role_setting s ON s.setdatabase = d.oid AND s.setrole = 0,
           unnest(s.setconfig) AS c (entry)
     WHERE d.datname = current_database() AND split_part(c.entry, '=', 1) = 'default_transaction_read_only'
       AND split_part(c.entry, '=', 2)::boolean"""
_WHO: Final[LiteralString] = """
    SELECT DISTINCT format('pid %s (%s, %s)', a.pid, COALESCE(a.usename, 'unknown'),
                           COALESCE(NULLIF(a.application_name, ''), a.backend_type, 'unknown'))
      FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_stat_activity a ON a.pid = l.pid
      JOIN pg_database d ON d.oid = l.database AND d.datname = current_database()
     WHERE c.relnamespace = to_regnamespace('pgfreeze') AND a.pid <> pg_backend_pid() ORDER BY 1 LIMIT 5"""


def ensure(conn: Control) -> None:
    """Create the journal where there is none. Where there is one, make sure that it is of our version.

    :raises FreezeRefused: if it belongs to a role that we do not trust, or is of another version.
    :raises psycopg.errors.InsufficientPrivilege: if there is none, and we have no right to CREATE.
    """
    if not trust.has_journal(conn):
        # An advisory lock would be anybody's to take, and to hold. Two first pauses at once collide in CREATE SCHEMA
        # instead. Whoever comes second looks at what the first one made, also at whose it is.
        with suppress(psycopg.errors.UniqueViolation, psycopg.errors.DuplicateSchema):
            _create(conn, (), definition.ours())
            return
        trust.has_journal(conn)
    found = installed(conn)
    if found is not None:
        check(conn, found)


def install(
    conn: Control, grant: Sequence[str] = (), wanted: Definition | None = None, typed: Sequence[str] | None = None
) -> bool:
    """Create or upgrade the journal, and let the roles in *grant* use it. What is created is ours, or its owner's.

    :param wanted: what to install; by default what this program brings.
    :param typed: the verb and its options, for a refusal that says to type them as another role.
    :returns: whether anything had to be created or replaced.
    :raises FreezeRefused: if there is one that belongs to another role, is newer, or that something else depends on.
    :raises FreezeError: if the journal was in use all the time. Nothing was changed then.
    :raises psycopg.errors.InsufficientPrivilege: without CREATE on the maintenance database.
    """
    definite = definition.ours() if wanted is None else wanted
    words = ("install", *(word for role in grant for word in ("--grant", role))) if typed is None else typed
    return _persistently(conn, lambda: _install(conn, grant, definite, words))


def is_ours(conn: Control, typed: Sequence[str]) -> bool:
    """Return whether there is a journal, and make sure that it is of our version and that we may do with it as we like.

    :param typed: the verb and its options, for a refusal that says to type them as another role.
    :raises FreezeRefused: if it is of another version, or belongs to another role.
    """
    found = installed(conn) if trust.has_journal(conn) else None
    if found is not None:
        check(conn, found)
        _check_replaceable(conn, found, None, typed)
    return found is not None


def uninstall(conn: Control) -> bool:
    """Remove the journal, with all of its history.

    :returns: whether there was one.
    :raises FreezeRefused: while anything is frozen; if it belongs to another role; or if anything depends on it that is
        not part of it.
    :raises FreezeError: if the journal was in use all the time. Nothing was changed then.
    """
    return _persistently(conn, lambda: _uninstall(conn, definition.ours()))


def _persistently(conn: Control, change: Callable[[], bool]) -> bool:
    give_up = time.monotonic() + PATIENCE.total_seconds()
    while True:
        try:
            return change()
        except psycopg.Error as error:
            if error.sqlstate == "2BP01":
                depends = "; ".join((error.diag.message_detail or str(error)).splitlines())
                raise FreezeRefused(
                    f"something depends on the journal in {conn.info.dbname!r} that is not part of it: {depends}. Drop "
                    "that first"
                ) from error
            if error.sqlstate not in _COLLISIONS:
                raise
            if time.monotonic() > give_up:
                who = ", ".join(name for (name,) in conn.execute(_WHO)) or "somebody who is gone"
                raise FreezeError(
                    f"the journal in {conn.info.dbname!r} was in use for {PATIENCE.seconds} s, now by {who}: nothing "
                    "was changed. Try again when that is done"
                ) from error
        time.sleep(0.05)


def _install(conn: Control, grant: Sequence[str], wanted: Definition, typed: Sequence[str]) -> bool:
    found = installed(conn) if trust.has_journal(conn) else None
    if found is None:
        _create(conn, grant, wanted)
        return True
    wrong = mismatch(found, conn.info.dbname, wanted.version)
    if wrong is None and not grant:
        return False
    _check_replaceable(conn, found, wrong, typed)
    with conn.transaction():
        _as_owner(conn, found)
        if wrong is not None:
            _upgrade(conn, found, wanted)
        _grant(conn, grant)
    return wrong is not None


def _create(conn: Control, grant: Sequence[str], wanted: Definition) -> None:
    _check_not_read_only(conn)
    with conn.transaction():
        conn.execute("CREATE SCHEMA pgfreeze")  # fails if somebody has made one since we looked
        _run(conn, wanted, 0)
        _grant(conn, grant)


def _upgrade(conn: Control, found: Installed, wanted: Definition) -> None:
    users = [role for (role,) in conn.execute(_USERS)]
    readers = conn.execute(_READERS).fetchall()
    _take(conn, found, wanted)
    _run(conn, wanted, found.version.tables)
    for (routine,) in conn.execute(_LEFT_OVER).fetchall():
        conn.execute(sql.SQL("DROP ROUTINE {}").format(sql.SQL(routine)))
    views = {name for (name,) in conn.execute(_RELATIONS, (["v"],))}
    for view, role in readers:
        if view in views:
            reads = sql.SQL("GRANT SELECT ON pgfreeze.{} TO {}")
            conn.execute(reads.format(sql.Identifier(view), sql.Identifier(role)))
    _grant(conn, users)


def _run(conn: Control, wanted: Definition, done: int) -> None:
    for migration in wanted.migrations[done:]:
        conn.execute(migration)
    conn.execute(wanted.routines)
    conn.execute(sql.SQL("COMMENT ON SCHEMA pgfreeze IS {}").format(sql.Literal(wanted.version.comment())))


def _grant(conn: Control, roles: Sequence[str]) -> None:
    for role in roles:
        for right in (
            "USAGE ON SCHEMA pgfreeze",
            "SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA pgfreeze",
            "EXECUTE ON ALL ROUTINES IN SCHEMA pgfreeze",
        ):
            conn.execute(sql.SQL("GRANT " + right + " TO {}").format(sql.Identifier(role)))


def _take(conn: Control, found: Installed, wanted: Definition) -> None:
    """Drop the views and lock the tables, without waiting; see that the journal is still the one that was *found*.

    The views go first: whoever reads one may then want a table, so no table may be locked while we wait for a view.
    """
    known = wanted.tables()
    conn.execute("SET LOCAL lock_timeout = '1ms'")
    for kind, statement in (("v", "DROP VIEW {}"), ("r", "LOCK TABLE {} IN ACCESS EXCLUSIVE MODE NOWAIT")):
        names = [name for (name,) in conn.execute(_RELATIONS, ([kind],)) if name in known]
        if names:
            listed = sql.SQL(", ").join(sql.Identifier("pgfreeze", name) for name in names)
            conn.execute(sql.SQL(statement).format(listed))
    trust.has_journal(conn)
    if installed(conn) != found:  # as with a lock that another one has
        raise psycopg.errors.LockNotAvailable("another installation was faster")


def _as_owner(conn: Control, found: Installed) -> None:
    """Let what is made in this transaction belong to whom the journal belongs to."""
    if found.owner != conn.info.user:
        conn.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(found.owner)))


def _check_replaceable(conn: Control, found: Installed, wrong: Mismatch | None, typed: Sequence[str]) -> None:
    if wrong is not None and wrong.newer:
        raise FreezeRefused(f"{wrong.what}: {wrong.remedy}")
    if not found.owned:
        raise FreezeRefused(
            f"role {conn.info.user!r} may not change the journal in {conn.info.dbname!r}, which belongs to "
            f"{found.owner!r}: log in as that role, and there {command(conn.info.dbname, *typed)}"
        )
    _check_not_read_only(conn)


def _check_not_read_only(conn: Control) -> None:
    if conn.execute(_READ_ONLY_HERE).fetchone() is not None:
        name = sql.Identifier(conn.info.dbname).as_string(conn)
        raise FreezeRefused(
            f"database {conn.info.dbname!r} is read-only by default, perhaps frozen, with the journal in another "
            "database: see pg-freeze status there, and thaw it; if no freeze did that, ALTER DATABASE "
            f"{name} RESET default_transaction_read_only"
        )


def _uninstall(conn: Control, ours: Definition) -> bool:
    found = installed(conn) if trust.has_journal(conn) else None
    if found is None:
        return False
    _check_replaceable(conn, found, mismatch(found, conn.info.dbname, ours.version), ("uninstall",))
    with conn.transaction():
        _as_owner(conn, found)
        _take(conn, found, ours)
        opened = conn.execute(_OPEN).fetchall()
        if opened:
            named = "; ".join(f"{', '.join(names)} by {holder!r} ({state})" for names, holder, state in opened)
            raise FreezeRefused(
                f"still frozen, and without the journal nobody would know how to thaw it: {named}. First pg-freeze "
                f"resume --force --database {shlex.quote(opened[0][0][0])}"
            )
        for kind, parts in (("TRIGGER", _TRIGGERS), ("ROUTINE", _ROUTINES)):
            for (part,) in conn.execute(parts).fetchall():
                conn.execute(sql.SQL("DROP " + kind + " {}").format(sql.SQL(part)))
        names = [name for (name,) in conn.execute(_RELATIONS, (["r"],)) if name in ours.tables()]
        conn.execute(
            sql.SQL("DROP TABLE {}").format(sql.SQL(", ").join(sql.Identifier("pgfreeze", name) for name in names))
        )
        conn.execute("DROP SCHEMA pgfreeze")
    return True
