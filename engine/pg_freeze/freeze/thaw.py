"""Undoing: a pause that failed, and a freeze that has done its work. Both call the server's procedure."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Final

import psycopg

from pg_freeze import journal
from pg_freeze.control import Connect, ConnectTo, Control, control
from pg_freeze.dead_man import unhindered
from pg_freeze.errors import FreezeError, ServerLost, ThawFailed, is_server_lost
from pg_freeze.journal import schema
from pg_freeze.journals import in_each_journal
from pg_freeze.model import Freeze, Resumed
from pg_freeze.request import NO_TIME, check_known, check_not_negative, names_of

log = logging.getLogger(__name__)

#: Seconds between attempts over a fresh connection: a server that restarts is back soon.
RETRY_AFTER: Final = (0.1, 0.2, 0.5, 1.0, 2.0)


def undo(connect: Connect, ticket: int, databases: Sequence[str], why: BaseException) -> None:
    """Void a ticket and thaw its freeze if it has one, over a fresh connection; tried again for a few seconds.

    The ticket comes first: a freezing statement that is still under way in the server either finds it void, or is
    waited for.

    :raises ThawFailed: from *why*, if it could not be done.
    """
    failed: BaseException | None = None
    for delay in (0.0, *RETRY_AFTER):
        try:
            time.sleep(delay)
            with control(connect, "undo") as conn:
                freeze = unhindered(conn, partial(journal.void_ticket, conn, ticket))
                if freeze is not None:
                    journal.thaw(conn, freeze, f"undone: {type(why).__name__}")
            return
        except BaseException as error:  # noqa: BLE001
            # A signal or a timeout that comes now must not leave the database frozen; *why* ends the pause anyhow.
            failed = error
    raise ThawFailed(
        f"pause failed ({why}) and could not be undone ({failed}): {_listed(databases)} may still be frozen. "
        + _what_to_type(databases)
    ) from why


def resume(
    connect: Connect,
    *,
    databases: Sequence[str],
    holder: str,
    reader_grace: timedelta = NO_TIME,
    force: bool = False,
    connect_to: ConnectTo | None = None,
) -> Resumed:
    """Thaw: every write is possible again, with exactly the prior settings. Voids all earlier attempts of the holder.

    Safe to repeat, and no error when nothing is frozen, or only by others: those are left alone and returned. A server
    that is away is tried again for a few seconds.

    :param databases: the databases; a freeze of several is thawed as a whole.
    :param reader_grace: how long read-only sessions that run a query may go on before they are ended; idle ones end at
        once. Writes are possible from the start.
    :param force: thaw whoever's freeze it is.
    :param connect_to: returns a new connection to the named database, to thaw what is frozen from inside.
    :raises FreezeRefused: for a database that neither the server nor any freeze knows.
    :raises ThawFailed: if it could not be done: still frozen.
    :raises ServerLost: if the server could not even be reached.
    """
    names = names_of(databases, holder)
    check_not_negative(reader_grace=reader_grace)
    reached = False
    for delay in (*RETRY_AFTER, None):
        try:
            with control(connect, "resume") as conn:
                reached = True
                places = in_each_journal(
                    conn,
                    connect_to,
                    names,
                    lambda place, its: _resume(place, its or names, holder, reader_grace, force),
                    doing="resume",
                    unmarked=lambda done: not (done.thawed or done.others),
                )
                return Resumed(
                    holder,
                    names,
                    tuple(freeze for done in places for freeze in done.thawed),
                    tuple(freeze for done in places for freeze in done.others),
                )
        except ServerLost as error:
            if delay is None:
                raise (_still_frozen(names, error) if reached else error) from error
            log.warning("Resume: %s; trying again", error)
            time.sleep(delay)
    raise AssertionError("the loop returns or raises")


def _resume(conn: Control, names: Sequence[str], holder: str, grace: timedelta, force: bool) -> Resumed:
    if not schema.require(conn):
        check_known(conn, names)
        return Resumed(holder, tuple(names), (), ())
    # The ticket first: whoever of ours is about to freeze either finds his own void, or is waited for and found below.
    undrawn = _draw_ticket(conn, holder, names)
    try:
        found = unhindered(conn, partial(journal.active, conn, names, former=True))
    except psycopg.errors.LockNotAvailable as error:
        raise _still_frozen(names, error) from error
    if not found:
        check_known(conn, names)
    thawed: list[Freeze] = []
    others: list[Freeze] = []
    for freeze in found:
        if freeze.holder == holder or force:
            thawed.append(_thaw(conn, freeze, holder, grace))
        else:
            others.append(freeze)
    if undrawn is not None:
        done = _listed([name for freeze in thawed for name in freeze.databases]) or "nothing"
        said = " ".join(str(undrawn).split())
        raise FreezeError(
            f"thawed {done}, but an attempt to pause that {holder!r} began earlier could still freeze, since it could "
            f"not be voided: {said}. Resume again"
        ) from undrawn
    return Resumed(holder, tuple(names), tuple(thawed), tuple(others))


def _draw_ticket(conn: Control, holder: str, databases: Sequence[str]) -> psycopg.Error | None:
    """Void all earlier attempts, or return why that failed, as on a full disk: the thaw is more urgent."""
    try:
        unhindered(conn, partial(journal.draw_ticket, conn, "resume", holder, databases))
    except psycopg.Error as error:
        if is_server_lost(error):
            raise
        return error
    return None


def _thaw(conn: Control, freeze: Freeze, holder: str, grace: timedelta) -> Freeze:
    if freeze.holder != holder:
        _draw_ticket(conn, freeze.holder, freeze.databases)
    try:
        journal.thaw(conn, freeze, f"resume by {holder}", grace)
        after = journal.by_token(conn, freeze.token)
    except psycopg.Error as error:
        if is_server_lost(error):
            raise
        raise _still_frozen(freeze.databases, error, journal.named(conn, [freeze])) from error
    if after.holds:
        raise _still_frozen(freeze.databases, None)
    return after


def _still_frozen(databases: Sequence[str], error: BaseException | None, named: str = "") -> ThawFailed:
    said = "" if error is None else f": {' '.join(str(error).split())}"
    return ThawFailed(
        f"STILL FROZEN: {_listed(databases)} could not be thawed{said}{named}. {_what_to_type(databases)}"
    )


def _listed(databases: Sequence[str]) -> str:
    return ", ".join(map(repr, databases))


def _what_to_type(databases: Sequence[str]) -> str:
    literal = databases[0].replace("'", "''")
    return (
        "The dead-man switch thaws when the lease ends; sooner, as the role that froze it or a superuser: "
        f"pg-freeze resume --force --database {shlex.quote(databases[0])}; or in psql, in the database that has "
        f"the journal (a superuser looks first whose code that is: docs/stuck.md): CALL pgfreeze.thaw('{literal}')"
    )
