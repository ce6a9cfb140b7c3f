"""The final checkpoint, and what every later act asks first: does this holder's freeze stand?"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from uuid import UUID

import psycopg

from pg_freeze import journal
from pg_freeze.control import Connect, ConnectTo, Control, unhurried
from pg_freeze.errors import FreezeRefused, LeaseLost
from pg_freeze.journal import schema
from pg_freeze.journals import journal_of
from pg_freeze.model import Freeze, State
from pg_freeze.request import names_of

log = logging.getLogger(__name__)


def checkpoint(
    connect: Connect,
    *,
    databases: Sequence[str],
    holder: str,
    switch_wal: bool = False,
    required: bool = True,
    connect_to: ConnectTo | None = None,
) -> Freeze:
    """Write all that is in memory to the volume, and record in the journal where the checkpoint stands.

    :param databases: the frozen databases; CHECKPOINT itself is for the whole server.
    :param switch_wal: switch to a new WAL file as well, as is good for very busy servers.
    :param required: without it a missing right to CHECKPOINT is no error: a copy is consistent all the same and only
        takes longer to recover; ``checkpoint_lsn`` is then that of the server's last checkpoint.
    :param connect_to: returns a new connection to the named database, for one that is frozen from inside.
    :returns: the freeze, with ``checkpoint_lsn``.
    :raises LeaseLost: if this holder has no freeze of these databases that stands, before or after.
    :raises FreezeRefused: without the right to CHECKPOINT or to switch WAL files.
    """
    names = names_of(databases, holder)
    with journal_of(connect, connect_to, names, "checkpoint") as conn:
        token = held(conn, names, holder).token
        return write_out(conn, token, holder, switch_wal=switch_wal, required=required)


def held(conn: Control, names: Sequence[str], holder: str) -> Freeze:
    """Return the freeze that *holder* has of all these databases, drained.

    :raises LeaseLost: if there is none: what follows would touch a database that is not frozen.
    """
    freezes = journal.active(conn, names) if schema.require_current(conn) else ()
    for freeze in freezes:
        if (
            freeze.holder == holder
            and freeze.state is State.FROZEN
            and freeze.locked
            and set(names) <= set(freeze.databases)
        ):
            return freeze
    known = ", ".join(f"{freeze.holder!r} ({freeze.state})" for freeze in freezes) or "nobody"
    others = [freeze.holder for freeze in freezes if freeze.holder != holder]
    say = f"say --holder {shlex.quote(others[0])} if you mean that freeze" if others else "run pg-freeze pause first"
    raise LeaseLost(
        f"{', '.join(map(repr, names))} not frozen by {holder!r}; frozen by: {known}. In Airflow clear the pause task, "
        f"with everything downstream; on the command line {say}"
    )


def write_out(conn: Control, token: UUID, holder: str, *, switch_wal: bool, required: bool) -> Freeze:
    """CHECKPOINT, switch WAL files if asked to, and record it."""
    user = conn.info.user
    try:
        with unhurried(conn):
            conn.execute("CHECKPOINT")
    except psycopg.errors.InsufficientPrivilege as error:
        if required:
            raise FreezeRefused(
                f"role {user!r} may not CHECKPOINT: GRANT pg_checkpoint TO it (PostgreSQL 15 and newer; before that "
                "only superusers may)"
            ) from error
        log.warning("Role %r may not CHECKPOINT; the copy will take longer to recover", user)
    if switch_wal:
        try:
            conn.execute("SELECT pg_switch_wal()")
        except psycopg.errors.InsufficientPrivilege as error:
            raise FreezeRefused(
                f"role {user!r} may not switch WAL files: GRANT EXECUTE ON FUNCTION pg_switch_wal() TO it"
            ) from error
    freeze = journal.record_checkpoint(conn, token)
    if freeze is None:
        raise lost(holder)
    return freeze


def lost(holder: str) -> LeaseLost:
    """Return the error for a freeze that is gone from under its holder."""
    return LeaseLost(
        f"the freeze of {holder!r} is gone: it was resumed, its lease ended, or a newer attempt took it over. "
        "See `pg-freeze history`. Whatever was snapshotted since is not to be trusted"
    )
