"""Empty pages of a table: those that had rows, and those of which nobody knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, LiteralString

from pg_freeze.control import Control

_READ: Final[LiteralString] = """
    SELECT pg_read_binary_file(pg_relation_filepath(%s::bigint::oid) || %s::text, %s, %s, true)"""
_AT_ONCE: Final = 512
_SEGMENT: Final = 2**30
_HEADER: Final = 24  # of each page, also of a visibility map, which has two bits for each page of its table


def empty(conn: Control, oid: int, count: int) -> tuple[int, int]:
    """Return how many pages of a table had rows and are empty, as its visibility map says, and how many more are empty.

    The pages at its end may be those by which it was extended in advance.
    """
    row = conn.execute("SELECT current_setting('block_size')::integer").fetchone()
    assert row is not None
    block: int = row[0]
    conn.execute("CHECKPOINT")  # what is in memory only would look empty
    visible = b"".join(page[_HEADER:] for page in _pages(conn, oid, "_vm", count // (4 * (block - _HEADER)) + 1, block))
    lost = others = 0
    for number, page in enumerate(_pages(conn, oid, "", count, block)):
        if any(page):
            continue
        if number // 4 < len(visible) and visible[number // 4] >> 2 * (number % 4) & 1:
            lost += 1
        else:
            others += 1
    return lost, others


def _pages(conn: Control, oid: int, fork: str, count: int, block: int) -> Iterator[bytes]:
    for first in range(0, count, _AT_ONCE):
        segment, at = divmod(first * block, _SEGMENT)
        name = f"{fork}.{segment}" if segment else fork
        row = conn.execute(_READ, (oid, name, at, min(_AT_ONCE, count - first) * block)).fetchone()
        data = bytes(row[0] or b"") if row is not None else b""
        yield from (data[start : start + block] for start in range(0, len(data), block))
