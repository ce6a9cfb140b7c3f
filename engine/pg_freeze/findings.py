"""What preflight looks for, one by one: the databases, our rights, the journal, and who writes in spite of a freeze."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, LiteralString

from psycopg.rows import dict_row

from pg_freeze import journals, trust
from pg_freeze.control import ConnectTo, Control
from pg_freeze.errors import FreezeRefused
from pg_freeze.journal import schema
from pg_freeze.journal.definition import ours
from pg_freeze.journal.schema import Installed
from pg_freeze.model import Finding, Severity
from pg_freeze.names import quoted
from pg_freeze.request import FreezeRequest
from pg_freeze.strategies import named

if TYPE_CHECKING:
    from pg_freeze.strategies.base import Strategy

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

DATABASES: Final[LiteralString] = """
    SELECT d.oid, d.datname::text AS name, pg_has_role(d.datdba, 'USAGE') AS owned, o.rolname AS owner,
           d.datistemplate AS template
      FROM pg_database d JOIN pg_roles o ON o.oid = d.datdba WHERE d.datname::text = ANY (%s)"""

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


@dataclass(frozen=True, slots=True)
class Around:
    """What preflight looks at.

    :param conn: a control connection to the database that has the journal.
    :param role: what our role may: see :func:`our_role`.
    """

    conn: Control
    connect_to: ConnectTo | None
    request: FreezeRequest
    role: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """The databases to freeze."""
        return list(self.request.databases)

    @property
    def me(self) -> str:
        """The name of our role, quoted for SQL."""
        return quoted(self.role["name"])

    @property
    def strategy(self) -> Strategy:
        """The strategy that is asked for."""
        return named(self.request.strategy)

    def rows(self, query: LiteralString) -> list[dict[str, Any]]:
        """Return what a query finds that has the databases as its parameter."""
        return _rows(self.conn, query, self.names)


def check(found: Sequence[Finding]) -> None:
    """Raise FreezeRefused for what was found, if that is anything."""
    if found:
        listed = "; ".join(f"{finding.message} → {finding.remedy}" for finding in found)
        raise FreezeRefused(f"refused, nothing was changed: {listed}", tuple(found))


def _rows(conn: Control, query: LiteralString, *parameters: object) -> list[dict[str, Any]]:
    with conn.cursor(row_factory=dict_row) as cur:
        return cur.execute(query, parameters or None).fetchall()


def our_role(conn: Control) -> dict[str, Any]:
    """Return what our role may, for the functions below."""
    return _rows(conn, _ROLE)[0]


def mighty(conn: Control, role: str) -> bool:
    """Whether a role can become a superuser: nobody should be advised to grant it."""
    return bool(conn.execute(_MIGHTY, (role,)).fetchone() == (True,))


def refuse(code: str, message: str, remedy: str) -> Finding:
    """Return a finding for which no freeze begins."""
    return Finding(Severity.REFUSE, code, message, remedy)


def warn(code: str, message: str, remedy: str) -> Finding:
    """Return a finding that a freeze cannot stop."""
    return Finding(Severity.WARN, code, message, remedy)


def databases(around: Around) -> Iterator[Finding]:
    """Yield the databases that are none to freeze."""
    there = {row["name"]: row for row in around.rows(DATABASES)}
    for name in around.names:
        if name not in there:
            yield refuse(
                "unknown-database",
                f"there is no database {name!r} on this server",
                "check the name: psql -l lists them",
            )
        elif name == around.role["maintenance"] and not around.strategy.own_journal:
            yield refuse(
                "maintenance-database",
                f"{name!r} is the maintenance database of this connection, from which the freeze is controlled",
                "give another maintenance database (--maintenance-database, or maintenance_database=)",
            )
        elif there[name]["template"]:
            yield refuse(
                "template",
                f"{name!r} is a template: CREATE DATABASE copies it",
                "name the database that applications use",
            )


def rights(around: Around) -> Iterator[Finding]:
    """Yield the rights that our role lacks, whatever the strategy."""
    role, me, request = around.role, around.me, around.request
    if not role["sees"]:
        yield refuse(
            "no-stats",
            f"role {me} cannot see other roles' sessions, so a busy database would look drained",
            f"GRANT pg_read_all_stats TO {me};",
        )
    if not role["tracked"]:
        yield refuse(
            "no-activities",
            f"track_activities is off for role {me}, so its dead-man switch could not be seen at work",
            f"ALTER ROLE {me} SET track_activities = on;",
        )
    if not role["checkpoints"]:
        # Without the right a copy is consistent all the same, and only takes longer to recover.
        say = refuse if request.checkpoint else warn
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
    if request.switch_wal and not role["switches"]:
        yield refuse(
            "no-switch-wal",
            f"role {me} may not switch WAL files",
            f"GRANT EXECUTE ON FUNCTION pg_switch_wal() TO {me};",
        )


def signal(around: Around) -> Iterator[Finding]:
    """Yield that we may not end sessions."""
    if not around.role["signals"]:
        grant = f"GRANT pg_signal_backend TO {around.me};"
        yield refuse("no-signal", f"role {around.me} may not end other roles' sessions", grant)


def journal(around: Around, found: Installed | None) -> Iterator[Finding]:
    """Yield what keeps us from using the journal."""
    role, me = around.role, around.me
    database = role["maintenance"]
    grant = f"{schema.command(database)} --grant {shlex.quote(role['name'])}"
    if found is None:
        if not role["installs"]:
            yield refuse(
                "no-journal",
                f"the journal is not installed in {database!r}, and role {me} may not create it",
                f"GRANT CREATE ON DATABASE {quoted(database)} TO {me}; or, as a superuser, {grant}",
            )
    elif (wrong := schema.mismatch(found, database, ours().version)) is not None:
        yield refuse("journal-version", wrong.what, wrong.remedy)
    elif not found.usable:
        yield refuse("journal-closed", f"role {me} may not use the journal", f"as its owner: {grant}")


def prepared(around: Around) -> Iterator[Finding]:
    """Yield the prepared transactions: they hold locks, and can be committed in spite of a freeze."""
    for row in around.rows(_PREPARED):
        yield warn(
            "prepared-transactions",
            f"{row['n']} prepared transaction(s) in {row['database']!r} (one is {row['gid']!r}): COMMIT PREPARED "
            "changes visible data even in a read-only session",
            "SELECT * FROM pg_catalog.pg_prepared_xacts; then COMMIT PREPARED or ROLLBACK PREPARED each",
        )


def subscriptions(around: Around) -> Iterator[Finding]:
    """Yield the subscriptions whose workers write on."""
    for row in around.rows(_SUBSCRIPTIONS):
        yield warn(
            "subscription",
            f"subscription {row['name']!r} of {row['database']!r}: its apply worker writes in spite of read-only",
            f"ALTER SUBSCRIPTION {quoted(row['name'])} DISABLE; for the time of the freeze",
        )


def superusers(around: Around) -> Iterator[Finding]:
    """Yield the sessions of superusers, which we may not end."""
    if around.role["rolsuper"]:
        return
    me = around.me
    for row in around.rows(_SUPERUSERS):
        yield warn(
            "superuser-session",
            f"pid {row['pid']} in {row['database']!r} is a superuser's session ({row['role'] or row['backend_type']}): "
            f"role {me} may not end it, so it may write on",
            "end it yourself, or freeze as a superuser",
        )


def frozen_inside(around: Around) -> Iterator[Finding]:
    """Yield the databases that are frozen already, with a journal of their own."""
    for name in journals.frozen_inside(around.conn, around.names):
        yield refuse(
            "held",
            f"{name!r} is frozen by the strategy privileges, and its journal is in that database",
            "wait, or see pg-freeze status, which looks inside",
        )


def login_triggers(around: Around) -> Iterator[Finding]:
    """Yield the event triggers on login that would run, or have run, with our rights (PostgreSQL 17 and later)."""
    conn, me, enters = around.conn, around.me, around.strategy.enters
    remedy = f"ALTER ROLE {me} SET event_triggers = off; as a superuser"
    for trigger, owner in trust.untrusted_logins(conn):
        yield refuse(
            "login-trigger",
            f"the maintenance database {conn.info.dbname!r} has an event trigger on login ({trigger!r}) whose function "
            f"belongs to role {owner!r}: it has run with the rights of {me} just now",
            remedy,
        )
    for name in around.names:
        if trust.runs_on_login(conn, name):
            yield (refuse if enters else warn)(
                "login-trigger",
                f"database {name!r} has an event trigger on login, which would run with the rights of {me}: so it is "
                + ("not entered" if enters else "not entered, and its sequences and unlogged tables are not looked at"),
                remedy,
            )


def not_enterable(conn: Control, names: Sequence[str]) -> Iterator[Finding]:
    """Yield the databases that are not there, closed, or closed to us: for a strategy that works from inside."""
    me = quoted(conn.info.user)
    for name in names:
        way = journals.way_in(conn, name)
        if way is None:
            yield refuse(
                "unknown-database",
                f"there is no database {name!r} on this server",
                "check the name: psql -l lists them",
            )
        elif trust.runs_on_login(conn, name):
            yield refuse(
                "login-trigger",
                f"database {name!r} has an event trigger on login, which would run with the rights of {me}",
                f"ALTER ROLE {me} SET event_triggers = off; as a superuser",
            )
        elif way != (True, True):
            yield (
                refuse("closed", f"database {name!r} is closed, perhaps by a freeze", "see pg-freeze status")
                if not way[0]
                else refuse(
                    "no-connect",
                    f"role {me} may not connect to {name!r}",
                    f"GRANT CONNECT ON DATABASE {quoted(name)} TO {me};",
                )
            )
