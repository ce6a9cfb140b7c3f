"""Everything that would make a freeze fail or leak, found at once, each with its remedy. Changes nothing."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, LiteralString

from psycopg.rows import dict_row

from airflow_pg_freeze.core import journal, schema
from airflow_pg_freeze.core.control import Control
from airflow_pg_freeze.core.inside import elsewhere
from airflow_pg_freeze.core.model import Admit, Finding, Freeze, Kind, Severity, Strategy, iso

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

_DATABASES: Final[LiteralString] = """
    SELECT d.oid, d.datname::text AS name, pg_has_role(d.datdba, 'USAGE') AS owned, o.rolname AS owner, o.rolsuper,
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


@dataclass(frozen=True, slots=True)
class Preflight:
    """What preflight found: refusals keep a pause from beginning, warnings are reported with its result."""

    databases: tuple[str, ...]
    findings: tuple[Finding, ...]
    held: tuple[Freeze, ...] = ()

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """The findings for which a pause would not begin."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.REFUSE)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that the freeze cannot stop."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.WARN)

    def as_dict(self) -> dict[str, Any]:
        """Return the findings as JSON-ready values."""
        return {
            "databases": list(self.databases),
            "ok": not self.refusals,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def held_by_another(freeze: Freeze, holder: str) -> Finding:
    """Return the refusal for databases that another holder, or another set of databases of this holder, has frozen."""
    name = freeze.databases[0]
    who = (
        f"{freeze.holder!r}"
        if freeze.holder != holder
        else f"this holder ({holder!r}), with another set of databases or another admit"
    )
    return Finding(
        Severity.REFUSE,
        "held",
        f"{', '.join(map(repr, freeze.databases))} held by {who} since {iso(freeze.requested_at)}; "
        f"admit={freeze.admit}, lease until {iso(freeze.lease_until)}",
        f"wait for its resume, or end it: pg-freeze resume --database {shlex.quote(name)} "
        f"--holder {shlex.quote(freeze.holder)} (or --force)",
    )


def adoptable(freeze: Freeze, holder: str, databases: Sequence[str], kind: Kind) -> bool:
    """Whether a pause of *holder* for these databases goes on with this freeze instead of beginning one."""
    return (
        freeze.kind == kind
        and freeze.strategy is not Strategy.LOCK
        and freeze.holder == holder
        and set(freeze.databases) == set(databases)
    )


def examine(
    conn: Control, databases: Sequence[str], holder: str, kind: Kind, *, checkpoint: bool, switch_wal: bool
) -> Preflight:
    """Return all that was found, refusals first. Reads catalogs and statistics only.

    :param conn: a control connection; that it is direct, to a primary and recent enough was checked as it was opened.
    """
    names = list(databases)
    role = _rows(conn, _ROLE)[0]
    me = quoted(role["name"])
    journalled = schema.installed(conn)
    held = tuple(f for f in journal.active(conn, names) if f.holds) if journalled.usable and journalled.current else ()
    found = [
        *_databases(conn, role, me, names),
        *_rights(role, me, checkpoint=checkpoint, switch_wal=switch_wal),
        *_journal(journalled, role, me),
        *_overrides(conn, me, names),
        *_writers(conn, role, me, names),
        *(held_by_another(freeze, holder) for freeze in held if not adoptable(freeze, holder, databases, kind)),
        *_inside(conn, names),
    ]
    if kind.admit is not Admit.NOBODY:
        found.append(
            _warn(
                "client-override",
                "read-only is a default: a client that says SET, BEGIN READ WRITE or PGOPTIONS writes on",
                "admit=nobody, for clients that do so",
            )
        )
    found.sort(key=lambda finding: finding.severity is not Severity.REFUSE)
    return Preflight(tuple(databases), tuple(found), held)


def _inside(conn: Control, names: list[str]) -> Iterator[Finding]:
    for name in elsewhere(conn, names):
        yield _refuse(
            "held",
            f"{name!r} is frozen by the strategy privileges, and its journal is in that database",
            "wait, or see pg-freeze status, which looks inside",
        )


def _rows(conn: Control, query: LiteralString, *parameters: object) -> list[dict[str, Any]]:
    with conn.cursor(row_factory=dict_row) as cur:
        return cur.execute(query, parameters or None).fetchall()


def _refuse(code: str, message: str, remedy: str) -> Finding:
    return Finding(Severity.REFUSE, code, message, remedy)


def _warn(code: str, message: str, remedy: str) -> Finding:
    return Finding(Severity.WARN, code, message, remedy)


def _databases(conn: Control, role: dict[str, Any], me: str, names: list[str]) -> Iterator[Finding]:
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
            # Membership in a superuser would be far too much.
            owner, its_super = quoted(there[name]["owner"]), there[name]["rolsuper"]
            remedy = f"ALTER DATABASE {quoted(name)} OWNER TO {me};" if its_super else f"GRANT {owner} TO {me};"
            yield _refuse("not-owner", f"role {me} does not own database {name!r}", remedy)


def _rights(role: dict[str, Any], me: str, *, checkpoint: bool, switch_wal: bool) -> Iterator[Finding]:
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


def _journal(found: schema.Installed, role: dict[str, Any], me: str) -> Iterator[Finding]:
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


def _overrides(conn: Control, me: str, names: list[str]) -> Iterator[Finding]:
    for row in _rows(conn, _OVERRIDES, names):
        if row["alterable"]:
            continue
        target, database = quoted(row["role"]), quoted(row["database"])
        right = f", or ALTER ROLE {me} CREATEROLE; GRANT {target} TO {me} WITH ADMIN OPTION;"
        yield _refuse(
            "role-override",
            f"role {target} has default_transaction_read_only = off, which overrides the freeze of {database}, and "
            f"role {me} may not change that",
            f"ALTER ROLE {target} RESET default_transaction_read_only; ALTER ROLE {target} IN DATABASE {database} "
            f"RESET default_transaction_read_only; or freeze as a superuser{'' if row['super'] else right}",
        )


def _writers(conn: Control, role: dict[str, Any], me: str, names: list[str]) -> Iterator[Finding]:
    """Yield what writes in spite of read-only."""
    for row in _rows(conn, _PREPARED, names):
        yield _warn(
            "prepared-transactions",
            f"{row['n']} prepared transaction(s) in {row['database']!r} (one is {row['gid']!r}): COMMIT PREPARED "
            "changes visible data even in a read-only session",
            "SELECT * FROM pg_prepared_xacts; then COMMIT PREPARED or ROLLBACK PREPARED each",
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


def quoted(name: str) -> str:
    """Return *name* as an SQL identifier, for a message; a plain lower-case name stays as it is."""
    plain = name.isidentifier() and name.isascii() and name == name.lower()
    return name if plain else '"' + name.replace('"', '""') + '"'
