"""Prepared transactions of a copy: those that it has lost, and the tables that they keep locked."""

from __future__ import annotations

from typing import Final, LiteralString

from pg_freeze.control import Control
from pg_freeze.copies import xact
from pg_freeze.copies.frozen import Held
from pg_freeze.copies.wal import Seen

_PREPARED: Final[LiteralString] = "SELECT gid, transaction::text::bigint FROM pg_prepared_xacts"


def lost(conn: Control, held: Held, seen: Seen) -> list[str]:
    """Return what the first look saw prepared, that is not in the copy, and that did not end before it was made.

    If the WAL was not read, it is asked of pg_xact whether one has ended.

    :param conn: to the journal of the copy, right after it has recovered.
    """
    if held.first is None:
        return []
    there = set(conn.execute(_PREPARED).fetchall())
    return [
        f"the prepared transaction {one} was there at the first look, is not in the copy, and has not ended: its rows "
        "are lost"
        for one in held.first.transactions
        if one.gid is not None
        and one.database in held.oids
        and (one.gid, one.xid % 2**32) not in there
        and one.xid % 2**32 not in seen.ended
        and (seen.unread is None or not xact.has_ended(conn, one.xid))
    ]
