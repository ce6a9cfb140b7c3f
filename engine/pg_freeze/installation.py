"""The journal's installation and its removal: acts of their own, which no pause does by the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

import psycopg

from pg_freeze import journal
from pg_freeze.control import Connect, control, unhurried
from pg_freeze.durations import written
from pg_freeze.errors import FreezeRefused, InvalidRequest
from pg_freeze.journal import install as act
from pg_freeze.journals import frozen_inside
from pg_freeze.model import Forgotten


def install(connect: Connect, *, grant: Iterable[str] = (), typed: Sequence[str] | None = None) -> bool:
    """Create or upgrade the journal in the maintenance database, and let the roles in *grant* use it.

    It belongs to who creates it, and stays that role's. Only that role uses it, and others if it is a superuser. An
    upgrade may come while databases are frozen.

    :param typed: the verb and its options, for a refusal that says to type them as another role.
    :returns: whether anything had to be created or replaced.
    :raises FreezeRefused: without the right to; for an unknown role; where the journal is another role's, or newer than
        this program; in a database that is read-only by default.
    :raises FreezeError: if the journal was in use all the time.
    """
    with control(connect, "install") as conn:
        try:
            return act.install(conn, tuple(grant), typed=typed)
        except psycopg.errors.InsufficientPrivilege as error:
            database, role = conn.info.dbname, conn.info.user
            raise FreezeRefused(
                f"role {role!r} may not create the journal in {database!r}: as a superuser, pg-freeze install --grant "
                f"{role}"
            ) from error
        except psycopg.errors.UndefinedObject as error:
            raise FreezeRefused(f"{error.diag.message_primary}. Create the role first, as a superuser") from error


def forget(connect: Connect, *, age: timedelta, typed: Sequence[str] | None = None) -> Forgotten:
    """Forget the freezes that were thawed more than *age* ago, with all that belongs to them.

    :param typed: as for :func:`install`.
    :returns: how many freezes were forgotten, and how many are as old and were kept.
    :raises InvalidRequest: if *age* is not positive.
    :raises FreezeRefused: as a role that the journal does not belong to, or if it is of another version.
    """
    if age <= timedelta(0):
        raise InvalidRequest(f"the age of what is forgotten is {age.total_seconds():g} s: it must be more than zero")
    with control(connect, "forget") as conn, unhurried(conn):
        there = act.is_ours(conn, ("install", "--retain", written(age)) if typed is None else typed)
        return journal.forget(conn, age) if there else Forgotten()


def uninstall(connect: Connect) -> bool:
    """Remove the journal of the maintenance database, with all of its history.

    :returns: whether there was one.
    :raises FreezeRefused: while anything is frozen; where the journal is another role's, or newer than this program;
        or while anything depends on it that is not part of it.
    :raises FreezeError: if the journal was in use all the time.
    """
    with control(connect, "uninstall") as conn:
        inside = frozen_inside(conn)
        if inside:
            raise FreezeRefused(
                f"{', '.join(map(repr, inside))} may be frozen by the strategy privileges: see pg-freeze status, and "
                "resume first"
            )
        return act.uninstall(conn)
