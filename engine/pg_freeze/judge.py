"""Judges, from two looks and what was read of the time between them: what changed, and the level that follows.

Asks nothing of the server. That nothing changed is proved in one of two ways, or it is not proved:

- by the WAL: every record that concerns a frozen database is one of those that leave the rows alone. What is unlogged
  is not in the WAL, but nothing is written without a transaction id: so where there are unlogged tables, a committed
  transaction of which it is not known where it wrote counts as a change.
- by transaction ids, where the WAL cannot be read: none but ours was given out on the whole server, and whatever was
  open at the first look was rolled back.

A transaction that is still listed may be committed all the same. Its record is in the WAL, and so in a copy, before it
waits for the disk and for a synchronous standby; only then does it leave the list. That goes for COMMIT PREPARED, too.
So "still there" never means "not committed": the WAL tells, and without it nothing does.

Statistics prove nothing: a session reports late, and need not report at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from pg_freeze import strategies
from pg_freeze.attestation import Level, Method, Violation
from pg_freeze.look import Look, Transaction
from pg_freeze.model import Admit, iso
from pg_freeze.sequences import Inside, Moved, moved
from pg_freeze.strategies.base import SESSIONS, SETTINGS
from pg_freeze.wal import Unread, Wal


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of the time between two looks.

    :ivar ours: how many transaction ids we drew after the first look and before the second.
    :ivar fates: what became of the transactions that were open at the first look, and not any more at the second.
    :ivar wal: what was read, or why nothing was.
    :ivar databases: how many databases the freeze has: one that was gone at the first look is in neither.
    """

    ours: int
    fates: Mapping[int, str | None]
    wal: Wal | Unread
    databases: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows: see :class:`~pg_freeze.attestation.Attestation`."""

    method: Method
    level: Level
    violations: tuple[Violation, ...]
    sequences: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    advice: str | None = None


@dataclass(slots=True)
class _Found:
    violations: list[Violation] = field(default_factory=list)
    sequences: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)


def opened(first: Look) -> tuple[Transaction, ...]:
    """Return the transactions that were open at the first look and may be of the frozen databases."""
    return tuple(one for one in first.transactions if _concerns(one, first))


def ended(first: Look, second: Look) -> tuple[Transaction, ...]:
    """Return the transactions that were open at the first look, not any more at the second, and may be of ours."""
    still = {one.xid for one in second.transactions}
    return tuple(one for one in first.transactions if one.xid not in still and (_concerns(one, first) or _drops(one)))


def judge(first: Look, second: Look, evidence: Evidence) -> Verdict:
    """Return the level of what was made between two looks, and how it is known."""
    found = _Found()
    found.violations += _untold(first, second, evidence.databases)
    found.violations += _held(first, second)
    found.violations += _finished(first, second, evidence)
    method, advice = _proved(first, second, evidence, found)
    _sequences(first, second, evidence, found)
    if found.violations:
        level = Level.CRASH_ONLY
    elif _closed(first) and _closed(second) and not found.sequences:
        level = Level.STRICT
    else:
        level = Level.QUIESCED
    return Verdict(method, level, tuple(found.violations), tuple(found.sequences), tuple(found.unseen), advice)


def _proved(first: Look, second: Look, evidence: Evidence, found: _Found) -> tuple[Method, str | None]:
    """Return what proves that nothing else than *found* was changed, and, if nothing does, what would."""
    if isinstance(evidence.wal, Wal):
        found.violations += _written(first, second, evidence.wal)
        return Method.WAL, None
    unknown = list(_unknown(first, second, evidence, evidence.wal))
    if not unknown:
        return Method.TRANSACTION_IDS, None
    if not found.violations:  # otherwise the level is the same, and why is known better
        found.violations += unknown
    return Method.NONE, f"for a proof that does not need a quiet server, {evidence.wal.remedy}"


def _concerns(one: Transaction, look: Look) -> bool:
    return one.database is None or one.database in look.oids


def _drops(one: Transaction) -> bool:
    """Whether a transaction of another database may be a DROP DATABASE of ours. A prepared one cannot be."""
    return one.gid is None and one.kind != "autovacuum worker"


def _unknown(first: Look, second: Look, evidence: Evidence, unread: Unread) -> Iterator[Violation]:
    """Yield those of whom only the WAL could tell what they did: new ones, and what was open at the first look."""
    if others := second.xid - first.xid - 1 - evidence.ours:
        what = f"{others} transaction id(s) were given out meanwhile on this server, in these databases or in others"
        yield Violation("not-proved", f"{what}, and {unread.why}", None, None)
    closed = _closed(first) and _closed(second)
    for one in first.transactions:
        if closed and one.gid is not None:
            continue  # only a session in its own database can end it
        if evidence.fates.get(one.xid) != "aborted" and (_concerns(one, first) or _drops(one)):
            what = "a transaction that was open at the first check may have been committed, even if it is still listed"
            yield Violation("not-proved", f"{what}, and {unread.why}", str(one), None)


def _closed(look: Look) -> bool:
    return look.admit == Admit.NOBODY and bool(look.databases) and not any(one.admits for one in look.databases)


#: What a look that was to be had tells of a freeze that is in the journal. None is no answer, and proves nothing.
_NEEDED: Final = ("state", "strategy", "admit", "locked", "lease_until")


def _untold(first: Look, second: Look, databases: int) -> Iterator[Violation]:
    """Yield what one of the looks does not tell: nothing follows from what was not seen."""
    for look, which in ((first, "first"), (second, "second")):
        # Of one that is gone, the second look tells nothing at all: that is a reason of its own.
        missing = [name for name in _NEEDED if getattr(look, name) is None]
        if (missing and look.state is not None) or (look is first and missing):
            yield Violation("not-proved", f"the {which} check does not tell {', '.join(missing)}", None, iso(look.at))
    if first.state not in (None, "frozen"):
        yield Violation("not-proved", f"the freeze was {first.state} at the first check", None, iso(first.at))
    if first.strategy != second.strategy and second.strategy is not None:
        yield Violation("not-proved", "the two checks are of different strategies", None, iso(second.at))
    if len(first.databases) < databases:
        what = f"the first check saw {len(first.databases)} of {databases} database(s)"
        yield Violation("not-proved", what, None, iso(first.at))


def _held(first: Look, second: Look) -> Iterator[Violation]:
    """Yield what broke the freeze itself."""
    proof = strategies.of(second.strategy or "").proof
    now = iso(second.at)
    if second.state != "frozen":
        what = f"the freeze was {second.state or 'gone from the journal'} before the second check"
        yield Violation("thawed", what, second.thawed_by, iso(second.restoring_at))
    elif not second.locked:
        yield Violation("unlocked", "a session that held the locks ended before the second check", None, now)
    else:
        yield from _settings(first, second, now, proof)
    if None in (first.server_started, second.server_started):
        what = "the freezing role may not see whether the server was started anew: GRANT pg_read_all_stats to it"
        yield Violation("not-proved", what, None, now)
    elif first.server_started != second.server_started:
        what = "the server was started anew, or crashed and recovered: unlogged tables may have been emptied"
        yield Violation("restarted", what, None, iso(second.server_started))
    # Under locks it does not matter who is connected, or since when.
    if SESSIONS in proof:
        yield from _sessions(first, "before")
        if second.state == "frozen":
            yield from _sessions(second, "after")
    for oid in sorted(first.oids - second.oids):
        yield Violation("dropped", f"the database with OID {oid} was dropped", None, now)
    before = {(one.gid, one.xid) for one in first.transactions if one.gid is not None and _concerns(one, first)}
    after = {(one.gid, one.xid) for one in second.transactions if one.gid is not None and _concerns(one, second)}
    for gid, xid in sorted(before ^ after, key=str):
        was_there = (gid, xid) in before
        what = "a prepared transaction was committed or rolled back" if was_there else "a transaction was prepared"
        yield Violation("prepared", what, gid, now)


def _settings(first: Look, second: Look, now: str | None, proof: frozenset[str]) -> Iterator[Violation]:
    if second.lease_until is not None and second.lease_until <= second.at:
        yield Violation("lease-lapsed", "the lease had ended before the second check", None, iso(second.lease_until))
    then = {one.oid: one for one in first.databases}
    for one in second.databases:
        earlier = then.get(one.oid)
        if earlier is not None and earlier.version != one.version:
            what = (
                f"{one.name!r} itself was altered (ALLOW_CONNECTIONS, TABLESPACE, OWNER, a GRANT …), perhaps back again"
            )
            yield Violation("setting", what, None, now)
        if SETTINGS in proof and not one.read_only:
            yield Violation("setting", f"default_transaction_read_only of {one.name!r} was changed", None, now)
        elif earlier is not None and earlier.settings != one.settings and SETTINGS in proof:
            yield Violation("setting", f"the settings of {one.name!r} were changed, perhaps back again", None, now)
        if one.admits and second.admit == Admit.NOBODY and SETTINGS in proof:
            yield Violation("setting", f"{one.name!r} admits connections", None, now)
    for name in second.unlocked:
        yield Violation("new-table", f"{name} was made under the locks, and could be written", None, now)
    for name in second.granted:
        yield Violation("setting", f"a revoked privilege was granted again: {name}", None, now)
    # One that was there before is warned of when the freeze begins; whether it was used, the evidence tells.
    for who in set(second.overrides) - set(first.overrides) if SETTINGS in proof else ():
        yield Violation("role-override", f"a role setting overrides the freeze: {who}", who, now)


def _sessions(look: Look, moment: str) -> Iterator[Violation]:
    at = iso(look.at)
    which = "though nobody was to be admitted" if look.admit == Admit.NOBODY else "from before the barrier"
    for session in look.lingering:
        yield Violation("lingering", f"a session is there, {which} ({moment})", str(session), at)
    for one in look.transactions:
        # An autovacuum worker is let work on. What it commits is looked at as everybody else's.
        if one.gid is None and one.database in look.oids and one.kind != "autovacuum worker":
            yield Violation("open-write", f"a session has a transaction that writes ({moment})", str(one), at)


def _finished(first: Look, second: Look, evidence: Evidence) -> Iterator[Violation]:
    """Yield the transactions that had begun to write before the first look, and were committed or prepared after it."""
    gone = [one for one in ended(first, second) if _concerns(one, first)]
    for one in gone:
        fate = evidence.fates.get(one.xid)
        if fate != "aborted":
            what = "a transaction from before the first check, which had written already, "
            what += "was committed meanwhile" if fate == "committed" else "ended meanwhile"
            yield Violation("open-write", what, str(one), None)
    if isinstance(evidence.wal, Wal):
        yield from _still_listed(first, second, gone, evidence.wal)


_ENDS: Final[Mapping[str, tuple[str, str]]] = {
    "COMMIT": ("open-write", "a transaction from before the first check, which had written already, was committed"),
    "COMMIT_PREPARED": ("prepared", "a prepared transaction was committed"),
    "ABORT_PREPARED": ("prepared", "a prepared transaction was rolled back"),
    "PREPARE": ("prepared", "a transaction from before the first check was prepared"),
}


def _still_listed(first: Look, second: Look, gone: Sequence[Transaction], wal: Wal) -> Iterator[Violation]:
    """Yield the transactions that the WAL has the end of, and the second look still listed as they were."""
    known = {one.xid % 2**32: one for one in opened(first) if one not in gone}
    prepared = {one.xid % 2**32 for one in second.transactions if one.gid is not None}
    for end in wal.ends:
        if end.xid in known and not (end.kind == "PREPARE" and end.xid in prepared):
            code, what = _ENDS[end.kind]
            what += f" at WAL {end.lsn}, and waits for the disk or for a standby"
            yield Violation(code, what, str(known[end.xid]), None)


def _written(first: Look, second: Look, wal: Wal) -> Iterator[Violation]:
    writers = {one.xid % 2**32: str(one) for one in (*first.transactions, *second.transactions)}
    for change in wal.changes:
        who = "; ".join(writers.get(xid, f"transaction {xid}") for xid in change.xids if xid) or None
        yield Violation("row-change", change.what, who, None)
    if wal.restarted:
        yield Violation("restarted", "the WAL says that the server was stopped, or crashed and recovered", None, None)
    if wal.silent and not (_closed(first) and _closed(second)):
        doubtful = [name for name, unlogged in _unlogged(first, second) if unlogged is not False]
        if doubtful:
            what = (
                f"{len(wal.silent)} transaction(s) were committed that may have written to unlogged tables, which the "
                f"WAL does not show: {', '.join(doubtful)} has some, or could not be looked into"
            )
            yield Violation("unlogged", what, f"transaction {wal.silent[0]}", None)


def _unlogged(first: Look, second: Look) -> Iterator[tuple[str, bool | None]]:
    """Yield for each database whether it has unlogged tables; None if that is not known."""
    for one in second.databases:
        seen = [inside.unlogged for look in (first, second) for inside in look.inside if inside.database == one.oid]
        yield one.name, (any(seen) if len(seen) == 2 and None not in seen else None)


def _sequences(first: Look, second: Look, evidence: Evidence, found: _Found) -> None:
    wal = evidence.wal if isinstance(evidence.wal, Wal) else None
    for database in second.databases:
        then, now = _inside(first, database.oid), _inside(second, database.oid)
        logged = {file: n for (oid, file), n in wal.sequences.items() if oid == database.oid} if wal else {}
        states = () if then is None or now is None else then.sequences
        if then is None or now is None:
            why = next((one.unseen for one in (*second.inside, *first.inside) if one.name == database.name), None)
            if database.admits is False:
                why = "nobody can connect to read them"
            found.unseen.append(f"the sequences and unlogged tables of {database.name!r}: {why or 'not looked at'}")
        else:
            checkpoints = wal.checkpoints if wal else 0
            for one in moved(states, now.sequences, logged if wal else None, checkpoints):
                _moved(one, database.name, found)
            hidden = [one.name for one in now.sequences if not one.readable]
            if hidden:
                found.unseen.append(
                    f"{len(hidden)} sequence(s) of {database.name!r}, such as {hidden[0]}, which the freezing role may "
                    "not read: GRANT pg_read_all_data to it"
                )
        known = {one.file for one in states if (one.readable and one.last is not None) or one.readable}
        for file in sorted(set(logged) - known):
            name = next((one.name for one in states if one.file == file), f"the one in file {file}")
            what = f"a sequence of {database.name!r} ran ahead or was set, and cannot be read: {name}"
            found.violations.append(Violation("sequence", what, None, None))


def _moved(one: Moved, database: str, found: _Found) -> None:
    if one.ahead:
        found.sequences.append(f"sequence {one.name} of {database!r} ran ahead: it {one.what}")
    else:
        found.violations.append(Violation("sequence", f"sequence {one.name} of {database!r} {one.what}", None, None))


def _inside(look: Look, oid: int) -> Inside | None:
    return next((one for one in look.inside if one.database == oid), None)
