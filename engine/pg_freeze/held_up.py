"""Who keeps a thaw waiting and could not be ended, and what a superuser types to end it.

Whoever may use the journal can write into it. So no command is taken from there. What it names is a process id or the
name of a prepared transaction, which is quoted, and shown only as long as that is there.
"""

from __future__ import annotations

from typing import Any, Final, LiteralString

import psycopg

from pg_freeze.control import Control
from pg_freeze.names import literal, quoted

# The prepared transactions that hold a lock on what a thaw changes. A lock of a weaker mode is in no thaw's way.
_PREPARED: Final[LiteralString] = """
    SELECT DISTINCT p.database::text, p.gid
      FROM pg_catalog.pg_prepared_xacts p
      JOIN pg_catalog.pg_locks x ON x.pid IS NULL AND x.transactionid = p.transaction
      JOIN pg_catalog.pg_locks h ON h.pid IS NULL AND h.virtualtransaction = x.virtualtransaction AND h.granted
     WHERE h.mode NOT IN ('AccessShareLock', 'RowShareLock')
       AND (h.relation = ANY (ARRAY['pg_catalog.pg_db_role_setting', 'pg_catalog.pg_database',
                                    'pg_catalog.pg_authid']::pg_catalog.regclass[]::pg_catalog.oid[])
            OR h.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
               AND h.relation IN (SELECT c.oid FROM pg_catalog.pg_class c
                                    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                                   WHERE n.nspname = 'pgfreeze')
            OR h.locktype = 'object' AND h.classid = 'pg_catalog.pg_database'::pg_catalog.regclass)
     ORDER BY 1, 2 LIMIT 10"""


def explained(blocker: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the journal with ``why_not``: why it could not be ended, and what to type; None if it was ended.

    :param blocker: a row with ``there``: whether that session, or prepared transaction, still exists.
    """
    known = {name: value for name, value in blocker.items() if name != "there"}
    if blocker["ended"]:
        return {**known, "why_not": None}
    if not blocker["there"]:
        return {**known, "why_not": "could not be ended, and is gone since"}
    if blocker["pid"] == 0:
        return {**known, "why_not": f"prepared: {_roll_back(blocker['database'], blocker['application'])}"}
    end = f"SELECT pg_catalog.pg_terminate_backend({int(blocker['pid'])})"
    return {**known, "why_not": f"the role that thaws may not end it: as a superuser, {end}"}


def sentence(blocker: dict[str, Any]) -> str:
    """Return who it is, and why it could not be ended."""
    who = f"pid {blocker['pid']}" if blocker["pid"] else "a transaction"
    return f"{who}, {blocker['why_not']}"


def prepared(conn: Control) -> str:
    """Return the prepared transactions that may keep a thaw waiting, as the end of a sentence; empty if there are none.

    The journal is not read, so that it can be locked.
    """
    try:
        found = conn.execute(_PREPARED).fetchall()
    except psycopg.Error:  # whatever it is about is more urgent
        return ""
    said = [f"a transaction, prepared: {_roll_back(database, gid)}" for database, gid in found]
    return f"; in the way may be {'; '.join(said)}" if said else ""


def _roll_back(database: str, gid: str) -> str:
    return f"in {quoted(database)}, ROLLBACK PREPARED {literal(gid)}"
