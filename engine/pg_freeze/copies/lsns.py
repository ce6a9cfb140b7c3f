"""Files of a copy that are from later than the rest: a volume, or a single file, that was copied after the thaw.

The WAL tells when its own volume was copied, and nothing of the others. But each page begins with the LSN up to which
the WAL must be there before the page may be written. So a page with a later LSN than that of a moment was written
after that moment. This is read before a server runs on the copy, and writes pages itself.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final, LiteralString, NamedTuple

import psycopg

from pg_freeze.control import Control
from pg_freeze.copies import lsn
from pg_freeze.copies.server import Open
from pg_freeze.copies.tree import Found, Tree, entries
from pg_freeze.errors import FreezeRefused

# N, N_vm, N.1, N_vm.1. Temporary relations are tM_N. Unlogged ones have an N_init beside them.
_FILE: Final = re.compile(r"(\d+)(_fsm|_vm|_init)?(?:\.\d+)?")
_INIT: Final = "_init"
_SHARED: Final = "global"
_AT_ONCE: Final = 2**20
_HEADER: Final = 24
_SIZES: Final = frozenset(2**n for n in range(10, 16))
_LAYOUT: Final = 4  # of pages, since PostgreSQL 8.3
_NAMED: Final = 5
_BLOCK: Final[LiteralString] = "SELECT current_setting('block_size')::integer"
_RELATION: Final[LiteralString] = """
    SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'm', 't', 'i', 'S') AND pg_relation_filenode(c.oid) = %s::bigint::oid LIMIT 1"""


class Newest(NamedTuple):
    """The newest page of a file: its path in the copy, its database (0: of all), its number, and that page's LSN."""

    path: str
    database: int
    number: int
    lsn: int


@dataclass(slots=True)
class Read:
    """What the pages of a copy say.

    :ivar block: the size of a page.
    :ivar unread: why not all were read.
    """

    block: int = 0
    newest: list[Newest] = field(default_factory=list)
    unread: str | None = None


def read(tree: Tree, version: int, *, limit: timedelta) -> Read:
    """Read the LSN of each page of a copy that no server has run on yet.

    :param version: of its server: a tablespace may hold files of another one, too.
    :param limit: the time that this may take.
    """
    found = Read()
    until = time.monotonic() + limit.total_seconds()
    for root in tree.roots:
        try:
            for one, database, number in _logged(root, version, top=root == tree.data):
                found.block = found.block or _block(one) or 0
                if found.block and (newest := _newest(one, found.block, until)):
                    path = str(one.path if root != tree.data else one.path.relative_to(root))
                    found.newest.append(Newest(path, database, number, newest))
        except TimeoutError:
            found.unread = f"they could not be read within {limit}"
            break
        except (OSError, FreezeRefused) as error:
            found.unread = str(error)
    if not found.block and found.unread is None:
        found.unread = "the size of a page is not known"
    return found


def _logged(root: Path, version: int, *, top: bool) -> Iterator[tuple[Found, int, int]]:
    """Yield the files of relations that are logged, each with its database and number.

    :param top: whether this is the data directory.
    """
    place: Path | None = None
    unlogged: set[str] = set()
    database: int | None = None
    for one in entries(root):
        if one.path.parent != place:
            place = one.path.parent
            database = _database(place.relative_to(root).parts, version, top=top)
            unlogged = set()
            if database is not None:
                names = os.listdir(one.directory)
                unlogged = {name.removesuffix(_INIT) for name in names if name.endswith(_INIT)}
        if database is None or not stat.S_ISREG(one.status.st_mode):
            continue
        name = _FILE.fullmatch(one.path.name)
        if name is not None and (name[1] not in unlogged or name[2] == _INIT):
            yield one, database, int(name[1])


def _database(parts: Sequence[str], version: int, *, top: bool) -> int | None:
    """Return the database whose files are in a directory: 0 for those of all, None for no such directory."""
    if top and tuple(parts) == (_SHARED,):
        return 0
    if len(parts) < 2 or not parts[-1].isdecimal():
        return None
    in_tablespace = re.fullmatch(rf"PG_{version}_\d+", parts[-2]) is not None
    return int(parts[-1]) if in_tablespace or (top and tuple(parts[:-1]) == ("base",)) else None


def _open(one: Found) -> int:
    return os.open(one.path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=one.directory)


def _block(one: Found) -> int | None:
    """Return the size of a page, as the header of a file's first page says; None if it does not."""
    descriptor = _open(one)
    try:
        head = os.pread(descriptor, _HEADER, 0)
    finally:
        os.close(descriptor)
    (said,) = struct.unpack_from("=H", head.ljust(_HEADER, b"\0"), 18)  # pd_pagesize_version
    return said & 0xFF00 if said & 0xFF == _LAYOUT and said & 0xFF00 in _SIZES else None


def _newest(one: Found, block: int, until: float) -> int:
    """Return the highest LSN of the pages of a file; 0 if none has one.

    :raises TimeoutError: if that takes longer than *until*.
    """
    highest = at = 0
    descriptor = _open(one)
    try:
        while data := os.pread(descriptor, _AT_ONCE, at):
            # pd_lsn: two numbers of 32 bits, the higher one first, each as the machine has it. What was cut off counts.
            words = memoryview(data.ljust(-(-len(data) // block) * block, b"\0")).cast("I")
            each = block // 4
            here = max((high << 32) + low for high, low in zip(words[::each], words[1::each], strict=True))
            highest = max(highest, here)
            at += len(data)
            if len(data) % block:
                break
            if not here:
                at = _after_hole(descriptor, at, block)
            if time.monotonic() > until:
                raise TimeoutError
    finally:
        os.close(descriptor)
    return highest


def _after_hole(descriptor: int, at: int, block: int) -> int:
    """Return where the next page is of which there is anything: a file may be as good as endless, and empty."""
    try:
        found = os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            return at
        return os.lseek(descriptor, 0, os.SEEK_END)
    return found - found % block


def later(found: Read, conn: Control, connect: Open, names: Mapping[int, str], *, limit: str, what: str) -> str | None:
    """Return which files have a page from after a moment; None if none has.

    :param conn: to any database of the copy.
    :param names: by their OIDs, the databases that may be entered, to name a relation.
    :param limit: the LSN of the moment, and *what* it is.
    """
    row = conn.execute(_BLOCK).fetchone()
    assert row is not None
    if found.block and row[0] != found.block:
        found.unread = f"the first says that pages have {found.block} bytes, and the server that they have {row[0]}"
        return None
    after = sorted((one for one in found.newest if one.lsn > lsn.number(limit)), key=lambda one: (-one.lsn, one.path))
    if not after:
        return None
    said = ", ".join(_said(one, _relation(connect, names.get(one.database), one.number)) for one in after[:_NAMED])
    return (
        f"{len(after)} file(s) of the copy are from after {what}, at WAL {limit}: {said}"
        f"{' …' if len(after) > _NAMED else ''}. Copy all volumes before the thaw"
    )


def _said(one: Newest, relation: str | None) -> str:
    return f"{'' if relation is None else f'{relation}, '}{one.path} (a page of WAL {lsn.text(one.lsn)})"


def _relation(connect: Open, database: str | None, number: int) -> str | None:
    """Return the name of a relation, if it can be found out."""
    if database is None:
        return None
    with suppress(psycopg.Error), connect(database) as conn:
        row = conn.execute(_RELATION, (number,)).fetchone()
        return None if row is None else f"{row[0]} of {database!r}"
    return None
