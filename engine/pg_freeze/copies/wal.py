"""Row changes in the WAL that a copy brings along: what was written between the first look and the copy itself.

pg_waldump prints texts of anybody as they are: the prefix of a message, the name of a prepared transaction. So a line
may look like a record and be none. But each record names the one before it, and so must be the next in that chain.
A line that was made up breaks the chain, and then it is not known what the WAL says from the first such text on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, LiteralString, NamedTuple

from pg_freeze.control import Control
from pg_freeze.copies import lsn
from pg_freeze.copies.frozen import Held
from pg_freeze.copies.server import Place, run
from pg_freeze.wal_records import RECORDS, Means, databases_in, meaning

_END: Final[LiteralString] = """
    SELECT checkpoint_lsn::text, timeline_id::text, pg_current_wal_flush_lsn()::text FROM pg_control_checkpoint()"""
# Files of statistics, which ANALYZE rewrites, and of the journal, if it is in the frozen database.
_OURS: Final[LiteralString] = """
    SELECT pg_relation_filenode(r.oid)::bigint
      FROM pg_class c CROSS JOIN LATERAL (VALUES (c.oid), (c.reltoastrelid)) AS r (oid)
     WHERE c.relnamespace = to_regnamespace('pgfreeze') AND c.relkind IN ('r', 'S') AND r.oid <> 0
       AND (SELECT oid::bigint FROM pg_database WHERE datname = current_database()) = ANY (%s)"""
_STATISTICS: Final = (2619, 2840, 2841, 3429, 3430, 3431)
# rmgr: Heap  len (rec/tot): 59/59, tx: 735, lsn: 0/01549510, prev 0/015494D8, desc: INSERT off: 1, blkref #0: rel …
_RECORD: Final = re.compile(r"rmgr: (\S+)\s.*?tx:\s*(\d+), lsn: ([0-9A-F/]+), prev ([0-9A-F/]+), desc: (\S+)\s?(.*)")
_TEXT: Final = ("LogicalMessage", "Tablespace")
_TEXT_TOO: Final = ("PREPARE", "RESTORE_POINT")
_END_OF_PREPARED: Final = ("COMMIT_PREPARED", "ABORT_PREPARED")
_BLOCK: Final = re.compile(r"blkref #\d+: rel \d+/(\d+)/(\d+)(?: fork (\w+))? blk")
_MOST: Final = 20
# Recovery ends where the WAL did, or on one of the next two pages, if that was inside a record.
_INEXACT: Final = 2 * 8192
FIRST_LOOK: Final = "the first look at the freeze"


@dataclass(slots=True)
class Seen:
    """What the WAL says.

    :ivar changed: row changes, :ivar moved: sequences, without a row being wrong, and :ivar restarted: starts and stops
        of a server, which may empty tables that are not logged.
    :ivar unread: why it was not read, or not to its end, or what it cannot tell.
    :ivar since: from when on it was read.
    :ivar ended: the prepared transactions that were committed or rolled back, by their ids without the epoch.
    :ivar logged: the files of sequences that have a record, each with its database.
    """

    changed: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    unread: str | None = None
    since: str = FIRST_LOOK
    ended: set[int] = field(default_factory=set)
    logged: set[tuple[int, int]] = field(default_factory=set)

    def logged_in(self, database: int) -> frozenset[int] | None:
        """Return the files of a database's sequences that have a record; None if the WAL was not read to its end."""
        return None if self.unread is not None else frozenset(file for oid, file in self.logged if oid == database)


class _Record(NamedTuple):
    manager: str
    xid: int
    lsn: int
    previous: int
    kind: str
    text: str

    @property
    def has_text(self) -> bool:
        """Whether it may be printed with a text of somebody's, and so with lines that are no records."""
        return self.manager in _TEXT or self.kind in _TEXT_TOO or self.manager not in RECORDS


def changes(where: Place, conn: Control, held: Held) -> Seen:
    """Return what was changed after the first look, as far as the WAL of the copy tells.

    :param conn: to the journal of the copy, right after it has recovered.
    """
    start, since = held.freeze.checkpoint_lsn, "the final checkpoint of the freeze"
    if held.first is not None:
        start, since = held.first.lsn, FIRST_LOOK
    row = conn.execute(_END).fetchone()
    if start is None or row is None or not lsn.is_lsn(start):
        return Seen(unread="the journal does not say where in it the freeze began")
    end, timeline, flushed = row
    if lsn.number(end) < lsn.number(start):
        return Seen(unread=f"it ends at {end}, before {since} at {start}")
    if start == end:
        return Seen(since=since)
    oids = list(held.oids)
    left_out = {*_STATISTICS, *(file for (file,) in conn.execute(_OURS, (oids,)))}
    open_then = None
    if held.first is not None:
        open_then = {one.xid % 2**32 for one in held.first.transactions if one.database in (None, *oids)}
    errors: list[str] = []
    lines = _dumped(where, timeline, "--start", start, "--end", flushed, errors=errors)
    seen = _Reader(lsn.number(start), lsn.number(end), set(oids), left_out, open_then, Seen(since=since)).read(lines)
    if seen.unread is not None and errors:
        seen.unread += f" ({' '.join(errors[-1].split())[:500]})"
    return seen


def recovered(conn: Control) -> str:
    """Return the LSN of where the WAL of the copy ended, or a little after it: recovery has written what follows."""
    row = conn.execute(_END).fetchone()
    assert row is not None
    end: str = row[0]
    return end


def beyond(where: Place, conn: Control, moment: str) -> tuple[bool, bool]:
    """Return whether the copy had WAL from after a moment when it was taken, and whether that is known to a record.

    :param conn: to the copy, right after it has recovered.
    :param moment: where the server inserted the next record then, an LSN.
    """
    row = conn.execute(_END).fetchone()
    assert row is not None
    end, timeline, flushed = row
    # What recovery has written at its end names the last record that was there.
    newest = _at(where, timeline, lsn.number(end), "--end", flushed)
    if newest is None:
        return lsn.number(end) >= lsn.number(moment) + _INEXACT, False
    last = newest.previous
    before = _at(where, timeline, last)
    if before is not None and before.kind == "OVERWRITE_CONTRECORD":
        last = before.previous
    return last >= lsn.number(moment), True


def _at(where: Place, timeline: str, start: int, *words: str) -> _Record | None:
    """Return the record that begins there, if there is one."""
    lines = _dumped(where, timeline, "--start", lsn.text(start), "--limit", "1", *words)
    record = next(filter(None, map(_record, lines)), None)
    return record if record is not None and record.lsn == start else None


def _dumped(where: Place, timeline: str, *words: str, errors: list[str] | None = None) -> Iterator[str]:
    place = ("--path", str(where.tree.data / "pg_wal"), "--timeline", timeline)
    return run(where, "pg_waldump", *place, *words, errors=[] if errors is None else errors)


@dataclass(slots=True)
class _Reader:
    """Judges the records from the first look to the checkpoint that ended the recovery of the copy.

    :ivar open_then: the transactions of these databases that were open at the beginning; None if nobody looked then.
    """

    start: int
    end: int
    oids: Collection[int]
    left_out: Collection[int]
    open_then: Collection[int] | None
    seen: Seen
    #: Transactions that have written to another database, and so to none of these; where nobody looked.
    others: set[int] = field(default_factory=set)
    doubtful: str | None = None

    def read(self, lines: Iterable[str]) -> Seen:
        """Return what they say. What comes after a text is believed only if the whole chain holds."""
        last: _Record | None = None
        sure: int | None = None
        reached = False
        for record in filter(None, map(_record, lines)):
            if last is None and record.lsn > self.start + 64:
                return Seen(unread=f"it does not reach back to {self.seen.since}", since=self.seen.since)
            if last is not None and (record.previous != last.lsn or record.lsn <= last.lsn):
                return self._unread("it has a text that looks like a record", sure)
            # Recovery itself writes OVERWRITE_CONTRECORD, if the WAL ended inside a record.
            if last is not None and not (last.kind == "OVERWRITE_CONTRECORD" and record.lsn == self.end):
                self._judge(last)
            if sure is None and record.has_text:
                sure = len(self.seen.changed)
            reached = reached or record.lsn == self.end
            last = record
        if last is None or not reached:
            return self._unread("it cannot be read to its end", sure)
        self.seen.unread = self.doubtful
        return self.seen

    def _unread(self, why: str, sure: int | None) -> Seen:
        return Seen(changed=self.seen.changed[:sure], unread=why, since=self.seen.since)

    def _judge(self, record: _Record) -> None:
        """Note what a record means, but for what was written after the recovery."""
        if record.lsn >= self.end or len(self.seen.changed) >= _MOST:
            return
        at = f"at WAL {lsn.text(record.lsn)}"
        blocks = _BLOCK.findall(record.text)
        for means, what in _meanings(record, blocks, self.oids, self.left_out):
            said = f"{record.manager}/{record.kind}{what} {at} (transaction {record.xid})"
            kept = {Means.SEQUENCE: self.seen.moved, Means.RESTART: self.seen.restarted}.get(means, self.seen.changed)
            kept += [said] if len(kept) < _MOST else []
        if record.manager == "Sequence":
            self.seen.logged |= {(int(database), int(file)) for database, file, _ in blocks}
        if self.open_then is None and any(int(database) not in (0, *self.oids) for database, _, _ in blocks):
            self.others.add(record.xid)
        prepared = re.match(r"(\d+):", record.text) if record.kind in _END_OF_PREPARED else None
        if prepared is not None and record.manager == "Transaction":
            self.seen.ended.add(int(prepared[1]))
        if record.manager == "Transaction" and record.kind.startswith("COMMIT"):
            xid = int(prepared[1]) if prepared else record.xid
            if self.open_then is None and xid not in self.others:
                # Perhaps it had written before, and then its rows came with this record alone.
                self.doubtful = (
                    f"a transaction ({xid}) was committed {at}, and nobody had looked before whether it was open then"
                )
            elif self.open_then is not None and xid in self.open_then:
                self.seen.changed.append(f"a transaction that had been open before was committed {at}")


def _record(line: str) -> _Record | None:
    found = _RECORD.match(line)
    if found is None or not (lsn.is_lsn(found[3]) and lsn.is_lsn(found[4])):
        return None
    return _Record(found[1], int(found[2]), lsn.number(found[3]), lsn.number(found[4]), found[5].rstrip(",;"), found[6])


def _meanings(
    record: _Record, blocks: Sequence[tuple[str, str, str]], oids: Collection[int], left_out: Collection[int]
) -> Iterator[tuple[Means, str]]:
    """Yield what one record means for these databases, where it means anything.

    :param blocks: that it changes: database, file and fork of each.
    """
    for database, file, fork in blocks:
        if int(database) in oids and int(file) not in left_out:
            means = meaning(record.manager, record.kind, fork or "main")
            if means in (Means.CHANGE, Means.SEQUENCE):
                yield means, f" on file {file}"
    if blocks:
        return
    means = meaning(record.manager, record.kind)
    if means is Means.FILES:
        named = databases_in(record.manager, record.text)
        if named is None or not set(oids).isdisjoint(named):
            yield means, f" ({record.text})"
    elif means in (Means.CHANGE, Means.RESTART):
        yield means, ""
