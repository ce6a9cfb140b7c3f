"""Verify a backup: start PostgreSQL on a restored copy, thaw it there, and report what state it was taken in.

The copy is changed by this: recovery runs, as at any start, the thaw is committed, and the tables of what was frozen
are vacuumed. No row is another one. So verify a clone of what has to be kept. What keeps the copy from everything else:
the package ``copies``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import psycopg

from pg_freeze import sizes
from pg_freeze.attestation import Attestation
from pg_freeze.control import Control
from pg_freeze.copies import aside, attested, checksums, frozen, lsns, prepared, rows, running, tree, wal, xact
from pg_freeze.copies.relations import Findings
from pg_freeze.copies.server import (
    Open,
    Place,
    let_wal_go,
    place,
    programs_of,
    refuse_without_rights,
    server,
)
from pg_freeze.entrance import in_a_line
from pg_freeze.errors import FreezeError, FreezeRefused, translated
from pg_freeze.journals import frozen_inside
from pg_freeze.model import Freeze, State, iso

_OLDEST: Final = 14
WITHIN: Final = timedelta(hours=12)
_SIGNALS: Final = ("standby.signal", "recovery.signal", "recovery.conf")
_NO_LEVEL: Final = (
    "whether a row changed while the copy was made is not known: give the closed attestation, which `pg-freeze run` or "
    "`pg-freeze attest --after` has written with --attestation FILE, as --attestation FILE"
)

_CONTENTS: Final = (
    "the contents of the rows: they are not compared with those of the freeze. An older file that fits to all others, "
    "or the files of two tables that were exchanged, are not seen"
)


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found on a copy. ``problems`` is empty for a good one.

    :ivar looked_at: what was looked at, and ``unseen`` what was not, and why.
    """

    data_dir: str
    version: int
    isolated: bool
    freezes: tuple[Freeze, ...]
    attestations: tuple[Attestation, ...]
    thawed: tuple[str, ...]
    problems: tuple[str, ...]
    looked_at: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether the copy was taken inside a freeze, in which nothing changed, and came up whole."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {
            "data_dir": self.data_dir,
            "version": self.version,
            "isolated": self.isolated,
            "good": self.good,
            "problems": list(self.problems),
            "freezes": [freeze.as_dict() for freeze in self.freezes],
            "attestations": [attestation.as_dict() for attestation in self.attestations],
            "thawed": list(self.thawed),
            "looked_at": list(self.looked_at),
            "unseen": list(self.unseen),
        }


@dataclass(slots=True)
class _Report(Findings):
    looked_at: list[str] = field(default_factory=list)


def verify_copy(
    data_dir: Path,
    *,
    bin_dir: Path | None = None,
    user: str = "postgres",
    maintenance_database: str = "postgres",
    tablespaces: Mapping[str, Path] | None = None,
    wal_dir: Path | None = None,
    attestation: Path | None = None,
    stale_pid: bool = False,
    trusted: bool = False,
    within: timedelta = WITHIN,
    starting: Callable[[], object] = lambda: None,
) -> Verified:
    """Start PostgreSQL on a copy, look into its journal, thaw it, check it, and stop it again.

    :param data_dir: the restored data directory. It is started, and so changed.
    :param bin_dir: where ``postgres`` of its major version is; looked for on the PATH and in the usual places.
    :param user: a superuser of the copied server.
    :param maintenance_database: where the journal is.
    :param tablespaces: by the old place of a tablespace, or its OID, the directory of its copy.
    :param wal_dir: the copy of pg_wal, if that is a link.
    :param attestation: a file with the closed attestation, as the command line writes it.
    :param stale_pid: no server runs on the directory anywhere, though that cannot be seen from here.
    :param trusted: run it without isolation.
    :param within: the time after which the server is ended.
    :param starting: called just before the server starts, once nothing was found to refuse.
    :raises FreezeRefused: if this is no data directory, a server runs on it or may, something leads out of it, the
        rights to isolate it are missing, or there are no programs for it.
    :raises FreezeError: if the server does not start; the message ends with its log.
    """
    data = tree.resolved(data_dir)
    version = _version(data)
    closed = None if attestation is None else attested.read(attestation)
    programs = programs_of(version, bin_dir)
    refuse_without_rights(trusted=trusted)
    others = [*(tablespaces or {}).values(), *([] if wal_dir is None else [wal_dir])]
    with translated("verify the copy"), aside.alone(data, others):
        found = tree.inspect(data, tablespaces or {}, wal_dir)
        running.refuse_running(found, stale_pid=stale_pid)
        with (
            place(found, programs, version, trusted=trusted) as where,
            aside.set_aside(found, where.uid if where.isolated else None) as moved,
        ):
            report = _Report()
            written = lsns.read(found, version, limit=within)
            starting()
            with server(where, user, limit=within) as connect:
                result = _look(where, connect, maintenance_database, closed, written=written, report=report)
            if result.freezes:
                checked = checksums.check(where, report)
                report.looked_at += ["the checksum of each page"] if checked else []
                report.unseen.append(_CONTENTS)
            report.unseen += [f"{name} of the copy, which was set aside" for name in moved if name in _SIGNALS]
    return Verified(
        str(data),
        version,
        where.isolated,
        result.freezes,
        result.attestations,
        result.thawed,
        tuple(dict.fromkeys(report.problems)),
        tuple(report.looked_at),
        tuple(dict.fromkeys(report.unseen)),
    )


@dataclass(frozen=True, slots=True)
class _Result:
    freezes: tuple[Freeze, ...]
    attestations: tuple[Attestation, ...]
    thawed: tuple[str, ...]


def _version(data: Path) -> int:
    try:
        said = tree.read_small(data / "PG_VERSION", 16).decode("ascii", errors="replace").strip()
    except OSError as error:
        raise FreezeRefused(f"{data} is no PostgreSQL data directory: PG_VERSION: {error.strerror}") from error
    if not re.fullmatch(r"\d{1,4}(\.\d{1,4})?", said):
        raise FreezeRefused(f"{data} is no PostgreSQL data directory: PG_VERSION in it has no version")
    version = int(said.partition(".")[0])
    if version < _OLDEST:
        raise FreezeRefused(f"{data} is of PostgreSQL {said}: {_OLDEST} is the oldest version that can be frozen")
    return version


def _look(
    where: Place,
    connect: Open,
    database: str,
    closed: attested.Outside | None,
    *,
    written: lsns.Read,
    report: _Report,
) -> _Result:
    """Look at the copy while its server runs; thaw it and check it, if it was frozen."""
    with connect(database) as conn:
        held, newest = frozen.read(conn)
        # Of a copy in which nothing is frozen no attestation says more than that.
        if held and closed is not None and (why := _misfit(where, conn, closed, held, report)) is not None:
            report.problems.append(why)
            closed = None
        if not held:
            report.problems.append(_not_frozen(conn, newest))
        seen: list[wal.Seen] = []
        for one in held:
            seen.append(_judge(where, conn, one, closed, report))
            report.problems += prepared.lost(conn, one, seen[-1])
            if one.first is not None and (what := xact.undecided(conn, one.first)) is not None:
                report.unseen.append(what)
        if held:
            _look_for_later(conn, connect, held, closed, written=written, report=report)
        let_wal_go(where, conn)
        thawed = [name for one in held if _thaw(conn, one, report) for name in one.databases.values()]
    report.problems += frozen.still_read_only(connect, thawed)
    for one, what_wal_says in zip(held, seen, strict=True):
        _look_inside(connect, one, closed, what_wal_says, report)
    if held:
        with connect(database) as conn:
            others = conn.execute(
                """SELECT datname::text FROM pg_database
                    WHERE NOT datistemplate AND oid <> ALL (%s::bigint[]::oid[]) ORDER BY 1""",
                ([oid for one in held for oid in one.databases],),
            ).fetchall()
        report.unseen += [f"database {name!r}: it was not frozen" for (name,) in others]
    return _Result(
        tuple(one.freeze for one in held),
        tuple(attestation for one in held for attestation in one.attestations),
        tuple(thawed),
    )


def _misfit(
    where: Place, conn: Control, closed: attested.Outside, held: Sequence[frozen.Held], report: _Report
) -> str | None:
    """Return why an attestation says nothing of this copy; None if it does."""
    if why := attested.misfit(closed, held):
        return why
    beyond, exactly = wal.beyond(where, conn, closed.until)
    if not exactly:
        report.unseen.append("whether the copy has a few records from after the second look: its WAL cannot be read")
    if beyond:
        return (
            f"the copy goes on after the second look of the attestation, at WAL {closed.until}: it was taken later, or "
            "a server has run on it since, as verify-copy has one do. Verify a fresh copy of the snapshot"
        )
    return None


def _look_for_later(
    conn: Control,
    connect: Open,
    held: Sequence[frozen.Held],
    closed: attested.Outside | None,
    *,
    written: lsns.Read,
    report: _Report,
) -> None:
    """Look for files that were copied later than the WAL was, or than the second look of the attestation."""
    names = {oid: name for one in held for oid, name in one.databases.items()}
    limit, what = wal.recovered(conn), "the end of the copy's own WAL"
    if closed is not None:
        limit, what = closed.until, "the second look of the attestation"
    if why := lsns.later(written, conn, connect, names, limit=limit, what=what):
        report.problems.append(why)
    if written.unread is not None:
        report.unseen.append(f"whether all files are of one time, by the LSNs of their pages: {written.unread}")
    else:
        report.looked_at.append(f"the LSN of each page, against {what}")


def _thaw(conn: Control, held: frozen.Held, report: _Report) -> bool:
    """Undo a freeze in the copy; say whether that was done."""
    try:
        frozen.thaw(conn, held)
    except psycopg.Error as error:
        if conn.broken:
            raise
        report.problems.append(f"the freeze of {', '.join(held.freeze.databases)} cannot be undone: {in_a_line(error)}")
        return False
    return True


def _look_inside(
    connect: Open, held: frozen.Held, closed: attested.Outside | None, seen: wal.Seen, report: _Report
) -> None:
    """Check each database of a freeze. An error of the copy is a problem of it, as long as the server is there."""
    kept = _sizes(held, closed)
    for oid, name in held.databases.items():
        try:
            inside = connect(name)
        except psycopg.OperationalError as error:
            report.problems.append(f"{name!r} cannot be entered: {in_a_line(error)}")
            continue
        with inside:
            try:
                _check(
                    inside,
                    (oid, name),
                    kept,
                    rows.Then(held.inside(oid, name), sizes.recorded(kept, oid), seen.logged_in(oid)),
                    report,
                )
            except psycopg.Error as error:
                if inside.broken:
                    raise
                report.problems.append(f"{name!r} cannot be checked: {in_a_line(error)}")


def _sizes(held: frozen.Held, closed: attested.Outside | None) -> sizes.Sizes | None:
    """Return the sizes from the attestation that was given, or else from the copy's own journal, the newest of them."""
    if closed is not None and closed.token == str(held.freeze.token) and closed.sizes:
        return closed.sizes
    try:
        return sizes.checked(next((one.sizes for one in reversed(held.attestations) if one.sizes), None))
    except (ValueError, TypeError):
        return None


def _judge(
    where: Place, conn: Control, held: frozen.Held, closed: attested.Outside | None, report: _Report
) -> wal.Seen:
    """Say whether anything changed between the beginning of the freeze and the copy; return what its WAL says."""
    freeze = held.freeze
    report.problems += [] if held.lost is None else [held.lost]
    if freeze.state is not State.FROZEN:
        report.problems.append(f"the copy was taken while {', '.join(freeze.databases)} still drained")
    outside = closed if closed is not None and closed.token == str(freeze.token) else None
    if outside is not None:
        report.looked_at.append("the attestation that was given")
        report.problems += [] if outside.broken is None else [outside.broken]
        report.unseen += outside.unseen
    for one in held.attestations:
        report.problems += [f"attestation {one.id}: {violation.what}" for violation in one.violations]
    seen = wal.changes(where, conn, held)
    if seen.restarted:
        report.problems.append(
            f"a server was stopped or started while {', '.join(freeze.databases)} was frozen, or has run on the copy "
            f"since, as verify-copy has one do: {seen.restarted[0]}. Verify a fresh copy of the snapshot"
        )
    report.problems += [f"a row changed while {', '.join(freeze.databases)} was frozen: {one}" for one in seen.changed]
    report.unseen += [f"whether a sequence stood still: {one}" for one in seen.moved]
    if seen.unread is None:
        report.looked_at.append(f"the copy's own WAL, from {seen.since} on")
        return seen
    report.unseen.append(f"the copy's own WAL, for changes of rows: {seen.unread}")
    if outside is None:
        report.problems.append(_NO_LEVEL)
    return seen


def _check(
    conn: Control, database: tuple[int, str], kept: sizes.Sizes | None, then: rows.Then, report: _Report
) -> None:
    oid, name = database
    for bad, what in sizes.compare(conn, kept, oid, name):
        (report.problems if bad else report.unseen).append(what)
    found = rows.check(conn, name, then)
    report.problems += found.problems
    report.unseen += found.unseen
    report.looked_at.append(f"tables, B-trees and sequences of {name!r}")


def _not_frozen(conn: Control, newest: Freeze | None) -> str:
    if newest is not None and newest.thawed_by == "verify-copy":
        return (
            f"the copy was thawed before, by verify-copy at {iso(newest.thawed_at)}, and shows no more in "
            "which state it was taken: verify a fresh copy of the snapshot"
        )
    if names := frozen_inside(conn):
        return (
            f"the journal in {conn.info.dbname!r} has no freeze that held; but {', '.join(map(repr, names))} was "
            f"frozen by privileges, with a journal of its own: --maintenance-database {shlex.quote(names[0])}"
        )
    return "the copy was not taken inside a freeze: its journal has none that held"


__all__ = ["WITHIN", "FreezeError", "Verified", "verify_copy"]
