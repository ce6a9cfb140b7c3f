"""What preflight looks for, one by one: the databases, our rights, the journal, and who writes in spite of a freeze."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any, Final, LiteralString

from psycopg.rows import dict_row

from pg_freeze import schema, trust
from pg_freeze.control import Control
from pg_freeze.inside import elsewhere
from pg_freeze.model import Finding, Severity
from pg_freeze.names import quoted

_ROLE: Final[LiteralString] = """
    SELECT current_user AS name, r.rolsuper, r.rolcreaterole,
           pg_has_role('pg_read_all_stats', 'USAGE') AS sees, pg_has_role('pg_signal_backend', 'USAGE') AS signals,
           CASE WHEN EXISTS (SELECT FROM pg_roles WHERE rolname = 'pg_checkpoint')
                THEN pg_has_role((SELECT oid FROM pg_roles WHERE rolname = 'pg_checkpoint'), 'USAGE')
                ELSE r.rolsuper END AS checkpoints,
           has_function_privilege('pg_switch_wal()', 'EXECUTE') AS switches,
           has_database_privilege(current_database(), 'CREATE') AS installs,
           current_setting('track_activities')::boolean AS tracked,
           current_database() AS maintenance,
           current_setting('server_version_num')::integer AS version
      FROM pg_roles r WHERE r.rolname = current_user"""

# Who is a member of such a role, in whatever way, can become a superuser. Before 16 every role with CREATEROLE can:
# it can make itself a member of them.
_MIGHTY: Final[LiteralString] = """
    SELECT EXISTS (SELECT FROM pg_roles s
                    WHERE (s.rolsuper OR s.rolname IN ('pg_execute_server_program', 'pg_write_server_files',
                                                       'pg_read_server_files')
                           OR s.rolcreaterole AND current_setting('server_version_num')::integer < 160000)
                      AND pg_has_role(%s, s.oid, 'MEMBER'))"""

_DATABASES: Final[LiteralString] = """
    SELECT d.oid, d.datname::text AS name, pg_has_role(d.datdba, 'USAGE') AS owned, o.rolname AS owner,
           d.datistemplate AS template
      FROM pg_database d JOIN pg_roles o ON o.oid = d.datdba WHERE d.datname::text = ANY (%s)"""

# A setting of `off` that reaches the database: by the role in this database, or by the role everywhere. To counter one
# means ALTER ROLE … IN DATABASE, for which CREATEROLE is needed (from 16 on with ADMIN OPTION on that role) and,
# for a superuser's, superuser.
_OVERRIDES: Final[LiteralString] = """
    WITH settings AS (
        SELECT s.setdatabase, s.setrole, split_part(c.entry, '=', 2) AS value
          FROM pg_db_role_setting s, unnest(s.setconfig) AS c (entry)
         WHERE split_part(c.entry, '=', 1) = 'default_transaction_read_only'
    )
    SELECT d.datname::text AS database, r.rolname AS role, r.rolsuper AS super,
           me.rolsuper OR r.oid = me.oid OR (NOT r.rolsuper AND me.rolcreaterole
               AND (current_setting('server_version_num')::integer < 160000
                    OR EXISTS (SELECT FROM pg_auth_members m WHERE m.roleid = r.oid AND m.admin_option
                                  AND pg_has_role(m.member, 'USAGE')))) AS alterable
      FROM pg_database d
     CROSS JOIN pg_roles r
     CROSS JOIN pg_roles me
      LEFT JOIN settings inside ON inside.setdatabase = d.oid AND inside.setrole = r.oid
      LEFT JOIN settings everywhere ON everywhere.setdatabase = 0 AND everywhere.setrole = r.oid
     WHERE me.rolname = current_user AND d.datname::text = ANY (%s)
       AND NOT COALESCE(inside.value, everywhere.value, 'on')::boolean
       AND r.rolcanlogin AND has_database_privilege(r.oid, d.oid, 'CONNECT')
     ORDER BY 1, 2"""

_PREPARED: Final[LiteralString] = """
    SELECT database::text, count(*) AS n, min(gid) AS gid FROM pg_prepared_xacts
     WHERE database::text = ANY (%s) GROUP BY 1 ORDER BY 1"""

_SUBSCRIPTIONS: Final[LiteralString] = """
    SELECT d.datname::text AS database, s.subname AS name FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid
     WHERE s.subenabled AND d.datname::text = ANY (%s) ORDER BY 1, 2"""

_SUPERUSERS: Final[LiteralString] = """
    SELECT a.datname::text AS database, a.pid, a.usename AS role, a.backend_type
      FROM pg_stat_activity a LEFT JOIN pg_roles r ON r.oid = a.usesysid
     WHERE a.datname::text = ANY (%s) AND COALESCE(r.rolsuper, true)
       AND COALESCE(a.backend_type, '') NOT IN ('autovacuum worker', 'parallel worker', 'walsender')
       AND COALESCE(a.backend_type, '') NOT LIKE 'logical replication%%'
     ORDER BY 1, 2"""


def _rows(conn: Control, query: LiteralString, *parameters: object) -> list[dict[str, Any]]:
    with conn.cursor(row_factory=dict_row) as cur:
        return cur.execute(query, parameters or None).fetchall()


def our_role(conn: Control) -> dict[str, Any]:
    """Return what our role may, for the functions below."""
    return _rows(conn, _ROLE)[0]


def mighty(conn: Control, role: str) -> bool:
    """Whether a role can become a superuser: nobody should be advised to grant it."""
    return bool(conn.execute(_MIGHTY, (role,)).fetchone() == (True,))


def _refuse(code: str, message: str, remedy: str) -> Finding:
    return Finding(Severity.REFUSE, code, message, remedy)


def _warn(code: str, message: str, remedy: str) -> Finding:
    return Finding(Severity.WARN, code, message, remedy)


def databases(conn: Control, role: dict[str, Any], me: str, names: list[str]) -> Iterator[Finding]:
    """Yield the databases that are none to freeze, or not ours."""
    there = {row["name"]: row for row in _rows(conn, _DATABASES, names)}
    for name in names:
        if name not in there:
            yield _refuse(
                "unknown-database",
                f"there is no database {name!r} on this server",
                "check the name: psql -l lists them",
            )
        elif name == role["maintenance"]:
            yield _refuse(
                "maintenance-database",
                f"{name!r} is the maintenance database of this connection, from which the freeze is controlled",
                "give another maintenance database (--maintenance-database, or maintenance_database=)",
            )
        elif there[name]["template"]:
            yield _refuse(
                "template",
                f"{name!r} is a template: CREATE DATABASE copies it",
                "name the database that applications use",
            )
        elif not there[name]["owned"]:
            owner = quoted(there[name]["owner"])
            remedy = f"GRANT {owner} TO {me};"
            if mighty(conn, there[name]["owner"]):
                remedy = (
                    f"ALTER DATABASE {quoted(name)} OWNER TO {me}; or freeze as a superuser, as {owner} can become one"
                )
            yield _refuse("not-owner", f"role {me} does not own database {name!r}", remedy)


def rights(role: dict[str, Any], me: str, *, checkpoint: bool, switch_wal: bool) -> Iterator[Finding]:
    """Yield the rights that our role lacks."""
    if not role["sees"]:
        yield _refuse(
            "no-stats",
            f"role {me} cannot see other roles' sessions, so a busy database would look drained",
            f"GRANT pg_read_all_stats TO {me};",
        )
    if not role["tracked"]:
        yield _refuse(
            "no-activities",
            f"track_activities is off for role {me}, so its dead-man switch could not be seen at work",
            f"ALTER ROLE {me} SET track_activities = on;",
        )
    if not role["signals"]:
        yield _refuse("no-signal", f"role {me} may not end other roles' sessions", f"GRANT pg_signal_backend TO {me};")
    if not role["checkpoints"]:
        # Without the right a copy is consistent all the same, and only takes longer to recover.
        say = _refuse if checkpoint else _warn
        if role["version"] >= 150000:
            yield say(
                "no-checkpoint",
                f"role {me} may not CHECKPOINT (with --no-checkpoint or checkpoint=False the copy is as good, and "
                "takes longer to recover)",
                f"GRANT pg_checkpoint TO {me};",
            )
        else:
            yield say(
                "no-checkpoint",
                f"role {me} may not CHECKPOINT, which before PostgreSQL 15 only superusers may",
                "freeze as a superuser, or without a checkpoint (--no-checkpoint, checkpoint=False): the copy then "
                "takes longer to recover",
            )
    if switch_wal and not role["switches"]:
        yield _refuse(
            "no-switch-wal",
            f"role {me} may not switch WAL files",
            f"GRANT EXECUTE ON FUNCTION pg_switch_wal() TO {me};",
        )


def journal(found: schema.Installed, role: dict[str, Any], me: str) -> Iterator[Finding]:
    """Yield what keeps us from using the journal."""
    database = role["maintenance"]
    where = "" if database == "postgres" else f" --maintenance-database {shlex.quote(database)}"
    install = f"pg-freeze install{where}"
    grant = f"{install} --grant {shlex.quote(role['name'])}"
    if found.version is None:
        if not role["installs"]:
            yield _refuse(
                "no-journal",
                f"the journal is not installed in {database!r}, and role {me} may not create it",
                f"GRANT CREATE ON DATABASE {quoted(database)} TO {me}; or, as a superuser, {grant}",
            )
    elif not found.usable:
        yield _refuse("journal-closed", f"role {me} may not use the journal", f"as its owner: {grant}")
    elif not found.current and not found.owned:
        yield _refuse(
            "journal-version", "the journal is of another version of this package", f"as its owner: {install}"
        )


def overrides(conn: Control, role: dict[str, Any], me: str, names: list[str]) -> Iterator[Finding]:
    """Yield the roles with a setting that overrides the freeze, and that we may not change."""
    for row in _rows(conn, _OVERRIDES, names):
        if row["alterable"]:
            continue
        target, database = quoted(row["role"]), quoted(row["database"])
        right = f", or ALTER ROLE {me} CREATEROLE; GRANT {target} TO {me} WITH ADMIN OPTION;"
        if role["version"] < 160000 or mighty(conn, row["role"]):  # before 16 CREATEROLE is as good as SUPERUSER
            right = ""
        # A role that is no superuser may do so itself, which must not keep anybody from freezing.
        yield (_refuse if row["super"] else _warn)(
            "role-override",
            f"role {target} has default_transaction_read_only = off, which overrides the freeze of {database}, and "
            f"role {me} may not change that: it may write on, and a proof will tell whether it did",
            f"ALTER ROLE {target} RESET default_transaction_read_only; ALTER ROLE {target} IN DATABASE {database} "
            "RESET default_transaction_read_only; or freeze with admit=nobody, or as a superuser" + right,
        )


def writers(conn: Control, role: dict[str, Any], me: str, names: list[str]) -> Iterator[Finding]:
    """Yield what writes in spite of read-only."""
    for row in _rows(conn, _PREPARED, names):
        yield _warn(
            "prepared-transactions",
            f"{row['n']} prepared transaction(s) in {row['database']!r} (one is {row['gid']!r}): COMMIT PREPARED "
            "changes visible data even in a read-only session",
            "SELECT * FROM pg_catalog.pg_prepared_xacts; then COMMIT PREPARED or ROLLBACK PREPARED each",
        )
    for row in _rows(conn, _SUBSCRIPTIONS, names):
        yield _warn(
            "subscription",
            f"subscription {row['name']!r} of {row['database']!r}: its apply worker writes in spite of read-only",
            f"ALTER SUBSCRIPTION {quoted(row['name'])} DISABLE; for the time of the freeze",
        )
    if role["rolsuper"]:
        return
    for row in _rows(conn, _SUPERUSERS, names):
        yield _warn(
            "superuser-session",
            f"pid {row['pid']} in {row['database']!r} is a superuser's session ({row['role'] or row['backend_type']}): "
            f"role {me} may not end it, so it may write on",
            "end it yourself, or freeze as a superuser",
        )


def frozen_inside(conn: Control, names: list[str]) -> Iterator[Finding]:
    """Yield the databases that are frozen already, with a journal of their own."""
    for name in elsewhere(conn, names):
        yield _refuse(
            "held",
            f"{name!r} is frozen by the strategy privileges, and its journal is in that database",
            "wait, or see pg-freeze status, which looks inside",
        )


def clients() -> Iterator[Finding]:
    """Yield that a default is only a default."""
    yield _warn(
        "client-override",
        "read-only is a default: a client that says SET, BEGIN READ WRITE or PGOPTIONS writes on",
        "admit=nobody, for clients that do so",
    )


def login_triggers(conn: Control, me: str, names: list[str], *, enters: bool) -> Iterator[Finding]:
    """Yield the event triggers on login that would run, or have run, with our rights (PostgreSQL 17 and later).

    :param enters: whether this freeze cannot do without a session in the databases.
    """
    remedy = f"ALTER ROLE {me} SET event_triggers = off; as a superuser"
    for trigger, owner in trust.untrusted_logins(conn):
        yield _refuse(
            "login-trigger",
            f"the maintenance database {conn.info.dbname!r} has an event trigger on login ({trigger!r}) whose function "
            f"belongs to role {owner!r}: it has run with the rights of {me} just now",
            remedy,
        )
    for name in names:
        if trust.runs_on_login(conn, name):
            yield (_refuse if enters else _warn)(
                "login-trigger",
                f"database {name!r} has an event trigger on login, which would run with the rights of {me}: so it is "
                + ("not entered" if enters else "not entered, and its sequences and unlogged tables are not looked at"),
                remedy,
            )
