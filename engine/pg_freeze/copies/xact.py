"""Transactions of which a copy does not know whether they were committed: their rows are not there."""

from __future__ import annotations

from typing import Final, LiteralString

from pg_freeze.control import Control
from pg_freeze.look import Look

_OLDEST: Final[LiteralString] = """
    SELECT oldest_xid::text::bigint, current_setting('block_size')::bigint FROM pg_control_checkpoint()"""
_READ: Final[LiteralString] = "SELECT pg_read_binary_file('pg_xact/' || %s::text, 0, %s, true)"
_PAGES: Final = 32  # of a file: SLRU_PAGES_PER_SEGMENT
_FIRST_NORMAL: Final = 3
_MOST: Final = 1000
# Each byte has two bits for each of four transactions: 00 stands for one that has not ended.
_UNDECIDED: Final = bytes(any(not byte >> shift & 3 for shift in (0, 2, 4, 6)) for byte in range(256))


def undecided(conn: Control, first: Look) -> str | None:
    """Return of how many transactions that had ended by the first look pg_xact has no end; None if of none.

    A crash of the server leaves such transactions behind, too. So it is no proof of a loss.

    :param conn: to the journal of the copy, right after it has recovered and so written pg_xact to its files.
    """
    row = conn.execute(_OLDEST).fetchone()
    assert row is not None
    oldest, block = row
    start = max(_FIRST_NORMAL, first.xid - (first.xid - oldest) % 2**32)
    open_then = {one.xid for one in first.transactions}
    found: list[int] = []
    each = _PAGES * block * 4
    for base in range(start - start % each, first.xid, each):
        kept = conn.execute(_READ, (f"{base % 2**32 // each:04X}", each // 4)).fetchone()
        data = bytes(kept[0] or b"").ljust(each // 4, b"\0") if kept is not None else b""
        marks = data.translate(_UNDECIDED)
        at = marks.find(1, max(0, start - base) // 4)
        while at >= 0 and base + 4 * at < first.xid and len(found) < _MOST:
            four = (base + 4 * at + n for n in range(4) if not data[at] >> 2 * n & 3)
            found += [xid for xid in four if start <= xid < first.xid and xid not in open_then]
            at = marks.find(1, at + 1)
    if not found:
        return None
    count = f"{len(found)}{' or more' if len(found) >= _MOST else ''}"
    return (
        f"the rows of {count} transaction(s) from before the first look ({found[0]} to {found[-1]}): pg_xact does not "
        "say that they were committed or rolled back, as after a crash of the server, or if it has lost something"
    )


def has_ended(conn: Control, xid: int) -> bool:
    """Whether pg_xact says that a transaction was committed or rolled back."""
    row = conn.execute(_OLDEST).fetchone()
    assert row is not None
    each: int = _PAGES * row[1] * 4
    number, at = divmod(xid % 2**32, each)
    kept = conn.execute(_READ, (f"{number:04X}", each // 4)).fetchone()
    data = bytes(kept[0] or b"") if kept is not None else b""
    byte: int = data[at // 4] if at // 4 < len(data) else 0
    return (byte >> 2 * (at % 4)) & 3 != 0
