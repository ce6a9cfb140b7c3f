"""The strategy ``read-only``: the database is read-only by default, and every session that may still write is ended.

A session reads the default when it begins, so one from before the freeze may write on until it ends. A default is only
a default: a client that overrides it writes on, unless nobody may connect (``admit=nobody``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Final, LiteralString

from pg_freeze import findings
from pg_freeze.findings import Around
from pg_freeze.model import READ_ONLY, Admit, Finding, Freeze
from pg_freeze.names import quoted
from pg_freeze.strategies.base import SESSIONS, SETTINGS, Strategy

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


class ReadOnly(Strategy):
    """Refuses writes, and ends sessions."""

    name = READ_ONLY
    enters = False
    options = frozenset({"admit"})
    proof = frozenset({SETTINGS, SESSIONS})
    lingers: ClassVar[LiteralString] = "was.there"
    ends_starting = True

    def findings(self, around: Around) -> Iterator[Finding]:
        """Yield who does not let us alter the database, and who writes in spite of it."""
        yield from _owners(around)
        yield from findings.signal(around)
        if around.request.admit is not Admit.NOBODY:
            yield from _overrides(around)
            yield from _clients()
        yield from findings.prepared(around)
        yield from findings.subscriptions(around)
        yield from findings.superusers(around)

    def facts(self, freeze: Freeze) -> dict[str, str]:
        """Return who may connect, too."""
        return {**super().facts(freeze), **({"admits": freeze.admit.value} if freeze.holds else {})}


def _owners(around: Around) -> Iterator[Finding]:
    """Yield the databases that are not ours, so that we may not alter them."""
    me = around.me
    for row in around.rows(findings.DATABASES):
        name, owner = row["name"], quoted(row["owner"])
        if not row["owned"] and not row["template"] and name != around.role["maintenance"]:
            remedy = f"GRANT {owner} TO {me};"
            if findings.mighty(around.conn, row["owner"]):
                remedy = (
                    f"ALTER DATABASE {quoted(name)} OWNER TO {me}; or freeze as a superuser, as {owner} can become one"
                )
            yield findings.refuse("not-owner", f"role {me} does not own database {name!r}", remedy)


def _overrides(around: Around) -> Iterator[Finding]:
    """Yield the roles with a setting that overrides the freeze, and that we may not change."""
    me = around.me
    for row in around.rows(_OVERRIDES):
        if row["alterable"]:
            continue
        target, database = quoted(row["role"]), quoted(row["database"])
        right = f", or ALTER ROLE {me} CREATEROLE; GRANT {target} TO {me} WITH ADMIN OPTION;"
        # Before 16 CREATEROLE is as good as SUPERUSER.
        if around.role["version"] < 160000 or findings.mighty(around.conn, row["role"]):
            right = ""
        # A role that is no superuser may do so itself, which must not keep anybody from freezing.
        yield (findings.refuse if row["super"] else findings.warn)(
            "role-override",
            f"role {target} has default_transaction_read_only = off, which overrides the freeze of {database}, and "
            f"role {me} may not change that: it may write on, and a proof will tell whether it did",
            f"ALTER ROLE {target} RESET default_transaction_read_only; ALTER ROLE {target} IN DATABASE {database} "
            "RESET default_transaction_read_only; or freeze with admit=nobody, or as a superuser" + right,
        )


def _clients() -> Iterator[Finding]:
    """Yield that a default is only a default."""
    yield findings.warn(
        "client-override",
        "read-only is a default: a client that says SET, BEGIN READ WRITE or PGOPTIONS writes on",
        "admit=nobody, for clients that do so",
    )


STRATEGY: Final = ReadOnly()
