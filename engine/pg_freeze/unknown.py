"""What cannot be known: signs of a freeze that no journal which we believe accounts for.

A freeze is read from the journal. But the journal may be another role's, or gone, or in another database than the one
that was named. Then the catalog still tells something: a mark, or a dead-man switch at work. "Not frozen" is said only
where there is no such sign. Any role can make one up. So a sign counts only if its role could have made a journal
there: if it may create a schema in that database, or owns one. What another role makes up keeps nothing from being
called clear.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, LiteralString, NamedTuple

from pg_freeze import trust
from pg_freeze.control import Connect, ConnectTo, Control, control
from pg_freeze.entrance import entered, in_a_line
from pg_freeze.errors import FreezeError
from pg_freeze.names import quoted, visible
from pg_freeze.request import names_of

# pg_shdepend lists the schemas of other databases too: their owner, though not their names.
_MARKS: Final[LiteralString] = """
    SELECT d.datname::text, r.rolname::text, r.oid, substr(c.entry, 35, 36)
      FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase JOIN pg_roles r ON r.oid = s.setrole,
           unnest(s.setconfig) AS c (entry)
     WHERE d.datname <> current_database() AND starts_with(c.entry, 'application_name=pg-freeze inside ')
       AND (has_database_privilege(r.oid, d.oid, 'CREATE')
            OR EXISTS (SELECT FROM pg_shdepend o
                        WHERE o.dbid = d.oid AND o.classid = 'pg_namespace'::regclass AND o.deptype = 'o'
                          AND o.refclassid = 'pg_authid'::regclass AND o.refobjid = r.oid))
     ORDER BY 1, 2"""
_DEAD_MEN: Final[LiteralString] = """
    SELECT DISTINCT d.datname::text
      FROM pg_stat_activity a JOIN pg_database d ON d.oid = a.datid JOIN pg_roles r ON r.oid = a.usesysid
     WHERE d.datname <> current_database() AND a.state = 'active' AND starts_with(a.query, 'CALL pgfreeze.dead_man(')
       AND starts_with(a.application_name, 'pg-freeze dead-man ') AND d.datname::text <> ALL (%s)
       AND (r.rolname = session_user
            OR has_database_privilege(r.oid, d.oid, 'CREATE')
            OR EXISTS (SELECT FROM pg_shdepend o
                        WHERE o.dbid = d.oid AND o.classid = 'pg_namespace'::regclass AND o.deptype = 'o'
                          AND o.refclassid = 'pg_authid'::regclass AND o.refobjid = r.oid))
     ORDER BY 1"""
_JOURNALLED: Final[LiteralString] = "SELECT FROM pgfreeze.freezes WHERE token::text = %s"


@dataclass(frozen=True, slots=True)
class Doubt:
    """A database of which it is not known whether it is frozen, or by whom: what was seen, and what to do."""

    database: str
    why: str
    remedy: str

    def as_dict(self) -> dict[str, str]:
        """Return the doubt as JSON-ready values."""
        return {"database": self.database, "why": visible(self.why), "remedy": visible(self.remedy)}


def doubts(
    connect: Connect, connect_to: ConnectTo | None, *, databases: Sequence[str] | None = None
) -> tuple[Doubt, ...]:
    """Return what looks frozen, of *databases* or of all, though no journal that we believe says so.

    :param connect_to: returns a new connection to the named database, to look for the journal of a mark.
    :raises ServerLost: if the server cannot be reached.
    """
    names = None if databases is None else names_of(databases, "anybody")
    with control(connect, "look for marks") as conn:
        return doubtful(conn, connect_to, names)


def doubtful(conn: Control, connect_to: ConnectTo | None, names: Sequence[str] | None) -> tuple[Doubt, ...]:
    """Return the same, through a control connection to the maintenance database."""
    trusted = set(trust.trusted_roles(conn))
    everywhere = [_Mark(*row) for row in conn.execute(_MARKS)]
    marks = [mark for mark in everywhere if names is None or mark.database in names]
    found = [doubt for mark in marks for doubt in _of_mark(conn, connect_to, trusted, mark)]
    for (name,) in conn.execute(_DEAD_MEN, ([mark.database for mark in everywhere],)):
        why = f"a dead-man switch is at work in {name!r}: what it watches is in the journal there, and may be frozen"
        found.append(Doubt(name, why, f"pg-freeze status --maintenance-database {quoted(name)}"))
    return tuple(dict.fromkeys(found))


class _Mark(NamedTuple):
    """A mark of a freeze from inside: of which database, whose, and of which freeze."""

    database: str
    role: str
    owner: int
    token: str


def _of_mark(conn: Control, connect_to: ConnectTo | None, trusted: Collection[int], mark: _Mark) -> Iterator[Doubt]:
    name, role = mark.database, mark.role
    why = f"{name!r} is marked as frozen from inside by role {role!r}"
    unmark = f"ALTER ROLE {quoted(role)} IN DATABASE {quoted(name)} RESET application_name;"
    if mark.owner not in trusted:
        yield Doubt(
            name,
            f"{why}, whose code we do not run",
            f"log in as {quoted(role)}: pg-freeze status. If there is no freeze: {unmark}",
        )
        return
    if connect_to is None:
        yield Doubt(name, f"{why}, and no way into it was given", "pg-freeze status")
        return
    try:
        with entered(conn, connect_to, name, f"look for the journal inside {name!r}") as inside:
            if trust.has_journal(inside) and inside.execute(_JOURNALLED, (mark.token,)).fetchone() is not None:
                return
    except FreezeError as error:
        yield Doubt(name, f"{why}, and its journal cannot be read: {in_a_line(error)}", "mend that, and look again")
        return
    yield Doubt(
        name,
        f"{why}, and the journal there does not know of that freeze: somebody has dropped it",
        "docs/stuck.md, “Privileges are revoked, and the journal is gone”: grant again what was revoked; then "
        f"{unmark}",
    )
