"""Whether a database has a journal, of which version it is, and whether we may use it."""

from __future__ import annotations

import shlex
from typing import Final, LiteralString, NamedTuple

from pg_freeze import trust
from pg_freeze.control import Control
from pg_freeze.errors import FreezeRefused
from pg_freeze.journal import definition
from pg_freeze.journal.definition import Version

_INSTALLED: Final[LiteralString] = """
    SELECT obj_description(oid, 'pg_namespace'), has_schema_privilege(oid, 'USAGE'), pg_has_role(nspowner, 'USAGE'),
           pg_get_userbyid(nspowner)::text,
           EXISTS (SELECT FROM pg_class c WHERE c.relnamespace = n.oid AND c.relname = 'tickets')
      FROM pg_namespace n WHERE nspname = 'pgfreeze'"""


class Installed(NamedTuple):
    """The journal of a database.

    :param comment: what its schema says of its version.
    :param usable: whether we may use it.
    :param owned: whether we may replace it.
    :param owner: the role that may.
    :param filled: whether there are tables in it.
    """

    comment: str | None
    usable: bool
    owned: bool
    owner: str
    filled: bool

    @property
    def version(self) -> Version:
        """Its version. Before versions had numbers the comment held something else, and the tables were the first."""
        return Version.read(self.comment or "") or Version(int(self.filled), 0, "", "")

    @property
    def current(self) -> bool:
        """Whether it is the journal that this program brings."""
        return self.version.is_same_as(definition.ours().version)


def installed(conn: Control) -> Installed | None:
    """Return what journal the database has; None if there is none."""
    row = conn.execute(_INSTALLED).fetchone()
    return None if row is None else Installed(*row)


def require(conn: Control) -> bool:
    """Return whether there is a journal at all, of any version, and make sure that its code is of roles that we trust.

    For what works with every version, through the server's own routines: status, resume and guard.

    :raises FreezeRefused: if there is one that we may not read, or whose code is not to be trusted.
    """
    return readable(conn) and trust.has_journal(conn)


def require_current(conn: Control) -> bool:
    """Return whether there is a journal at all, as :func:`require` does, and make sure that it is of our version.

    :raises FreezeRefused: also if it is of another version.
    """
    found = _readable(conn)
    if found is None or not trust.has_journal(conn):
        return False
    check(conn, found)
    return True


def readable(conn: Control) -> bool:
    """Return whether there is a journal at all, whosever it is: for a server of which nothing is to be protected.

    :raises FreezeRefused: if there is one that we may not read.
    """
    return _readable(conn) is not None


def _readable(conn: Control) -> Installed | None:
    found = installed(conn)
    if found is not None and not found.usable:
        role = conn.info.user
        raise FreezeRefused(
            f"role {role!r} may not read the journal: as its owner, run `pg-freeze install --grant {role}`"
        )
    return found


def check(conn: Control, found: Installed) -> None:
    """Refuse a journal that is not of our version.

    :raises FreezeRefused: saying which program, or which role, has to do what.
    """
    wrong = mismatch(found, conn.info.dbname, definition.ours().version)
    if wrong is not None:
        raise FreezeRefused(f"{wrong.what}: {wrong.remedy}")


class Mismatch(NamedTuple):
    """Why a program does not use a journal of another version, and what to do about it."""

    newer: bool
    what: str
    remedy: str


def mismatch(found: Installed, database: str, wanted: Version) -> Mismatch | None:
    """Return why a program that brings the version *wanted* does not use this journal; None if it does."""
    version, journal = found.version, f"the journal in {database!r}"
    if version.is_newer_than(wanted):
        return Mismatch(
            newer=True,
            what=f"{journal} is newer ({version}) than this program, which knows {wanted}: pg-freeze {version.program} "
            "has installed it",
            remedy="install that version or a newer one here: pip install ./engine . in a checkout of it. Until "
            "then only status, resume and guard work",
        )
    if not version.is_same_as(wanted):
        return Mismatch(
            newer=False,
            what=f"{journal} is older ({version}) than this program, which brings {wanted}, and only an installation "
            "upgrades it",
            remedy=f"as its owner {found.owner!r}: {command(database)}",
        )
    return None


def command(database: str, *words: str) -> str:
    """Return what to type to do something with the journal in this database.

    :param words: the verb and its options; by default ``install``.
    """
    where = () if database == "postgres" else ("--maintenance-database", database)
    return shlex.join(("pg-freeze", *(words or ("install",)), *where))
