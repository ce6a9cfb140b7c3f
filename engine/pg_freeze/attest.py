"""Proof: what state the databases were in just before and just after a snapshot, and the level that follows.

``before`` looks and opens a record in the journal; ``after`` looks again, compares, reads the WAL that was written in
between, and closes the record. All records of a freeze count from its first look. A retry opens another one, but a
snapshot that an earlier try has made may be kept: nothing that changed since then may be overlooked. The levels:

``strict``      nobody could connect, and nothing was changed;
``quiesced``    writers were refused by default, or waited, and nothing was changed;
``crash-only``  something was changed, or might have been: no better than a copy of a running server.

What is seen in one look: ``look.py`` and ``sequences.py``. What follows from it: ``judge.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, LiteralString
from uuid import UUID

from psycopg.rows import dict_row

from pg_freeze import judge, sizes, wal
from pg_freeze.attestation import Attestation, Level, Method, Violation
from pg_freeze.control import Connect, ConnectTo, Control
from pg_freeze.entrance import Entrances
from pg_freeze.errors import FreezeError
from pg_freeze.freeze import held
from pg_freeze.journal import schema
from pg_freeze.journals import journal_of
from pg_freeze.look import Look, look, whole
from pg_freeze.request import names_of
from pg_freeze.sequences import look_inside
from pg_freeze.sizes import Sizes

_OPEN: Final[LiteralString] = """
    INSERT INTO pgfreeze.attestations (token, before_at, before, sizes) VALUES (%s, %s, %s, %s) RETURNING id"""
_FIRST: Final[LiteralString] = """
    SELECT before, id FROM pgfreeze.attestations WHERE token = %s ORDER BY id LIMIT 1"""
# Of each record of this freeze: the transaction that has written it last, how many have, and the id of its second look.
_RECORDS: Final[LiteralString] = """
    SELECT xmin::text::bigint, 1 + (after IS NOT NULL)::integer + (level IS NOT NULL)::integer,
           (after ->> 'xid')::bigint
      FROM pgfreeze.attestations WHERE token = %s"""
_SEEN: Final[LiteralString] = "UPDATE pgfreeze.attestations SET after = %s WHERE id = %s"
_CLOSE: Final[LiteralString] = """
    UPDATE pgfreeze.attestations SET after_at = %s, method = %s, level = %s, violations = %s,
           sequences = %s, unseen = %s, advice = %s, sizes = COALESCE(%s, sizes)
     WHERE id = %s"""
# A transaction that is over is over for good: so this may be asked later.
_FATES: Final[LiteralString] = """
    SELECT x.id::bigint, pg_xact_status(x.id::xid8) FROM unnest(%s::text[]) AS x (id)"""
_LAST: Final[LiteralString] = """
    SELECT a.*, f.holder, f.databases, f.checkpoint_lsn::text
      FROM pgfreeze.attestations a JOIN pgfreeze.freezes f USING (token)"""


def before(
    connect: Connect, *, databases: Sequence[str], holder: str, connect_to: ConnectTo | None = None
) -> Attestation:
    """Look, just before a snapshot, and open a record in the journal; the first look of a freeze counts for all.

    :param connect_to: returns a new connection to the named database, to look at its sequences.
    :returns: the open attestation, without a level.
    :raises LeaseLost: if this holder has no drained freeze of these databases.
    """
    names = names_of(databases, holder)
    with journal_of(connect, connect_to, names, "attest") as conn:
        token = held(conn, names, holder).token
        seen = _first(conn, token)
        with Entrances(conn, connect_to, names) as entrances:
            if seen is None:
                seen = look(conn, token)
                seen = seen.with_more(inside=look_inside(entrances))
            recorded = sizes.record(entrances)
        return _read(conn, open_record(conn, token, seen, recorded))


def after(
    connect: Connect, *, databases: Sequence[str], holder: str, connect_to: ConnectTo | None = None
) -> Attestation:
    """Look again, just after the snapshot, compare, read the WAL in between, and close the record.

    A freeze that is gone, a lapsed lease or a change is no error here: it is what the attestation then says.

    :returns: the attestation, with its level and whatever breaks it.
    :raises FreezeError: if no record of this holder and these databases is open.
    """
    names = names_of(databases, holder)
    with journal_of(connect, connect_to, names, "attest") as conn:
        number, token = _last_open(conn, names, holder)
        # What moves a sequence between this and the look is in the WAL that is read, never the other way round.
        with Entrances(conn, connect_to, names) as entrances:
            inside = look_inside(entrances)
        return close_record(conn, number, look(conn, token).with_more(inside=inside))


def open_record(conn: Control, token: UUID, seen: Look, recorded: Sizes | None = None) -> int:
    """Open a record with the first look that there was of this freeze; return its number."""
    known = None if recorded is None else json.dumps(recorded)
    seen = _first(conn, token) or seen
    row = conn.execute(_OPEN, (token, seen.at, json.dumps(seen.as_json()), known)).fetchone()
    assert row is not None
    return int(row[0])


def close_record(conn: Control, number: int, seen: Look, recorded: Sizes | None = None) -> Attestation:
    """Judge what was seen after the snapshot, close the record, and return it. A level is recorded in any case.

    Reading the WAL takes time; it need not be done while the database is frozen.

    :param seen: the look just after the snapshot.
    :param recorded: sizes that were recorded between the two looks.
    """
    with conn.cursor(row_factory=dict_row) as cur:
        opened = cur.execute(_LAST + " WHERE a.id = %s", (number,)).fetchone()
    assert opened is not None
    first = _look(opened["before"], number)
    xids = [one.xid for one in judge.ended(first, seen)]
    fates = dict(conn.execute(_FATES, (list(map(str, xids)),)).fetchall())
    open_then = [one.xid for one in judge.opened(first)]
    looks, drawn = _ours(conn, opened["token"], first.xid, seen.xid)
    conn.execute(_SEEN, (json.dumps(seen.as_json()), number))
    read = wal.read(conn, first.lsn, seen.lsn, first.oids, ours=(first.xid, *looks), opened=open_then)
    found = judge.judge(first, seen, judge.Evidence(drawn, fates, read, len(opened["databases"])))
    told = json.dumps([violation.as_dict() for violation in found.violations])
    known = None if recorded is None else json.dumps(recorded)
    more = (json.dumps(found.sequences), json.dumps(found.unseen), found.advice, known)
    conn.execute(_CLOSE, (seen.at, found.method.value, found.level.value, told, *more, number))
    return _read(conn, number)


def _first(conn: Control, token: UUID) -> Look | None:
    row = conn.execute(_FIRST, (token,)).fetchone()
    return None if row is None else _look(*row)


def _look(kept: dict[str, Any], number: int) -> Look:
    try:
        return Look.from_json(kept)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise FreezeError(
            f"the first look of attestation {number} is none that this program has written ({type(error).__name__}: "
            f"{error}), so nothing can be attested of this freeze: resume, look who may write to the journal, and "
            "freeze anew"
        ) from error


def _ours(conn: Control, token: UUID, since: int, until: int) -> tuple[tuple[int, ...], int]:
    """Return the transaction ids of our looks between two others, and how many ids we drew there altogether.

    Never too many, or somebody else's would be taken for one of ours: only those count that the journal tells of.
    """
    looks: list[int] = []
    records = 0
    for written, times, after in conn.execute(_RECORDS, (token,)):
        if since < whole(written, until) < until:
            records += times
        if after is not None and since < after < until:
            looks.append(after)
    return tuple(looks), records + len(looks)


def of_token(conn: Control, token: UUID) -> tuple[Attestation, ...]:
    """Return the attestations of a freeze, oldest first."""
    with conn.cursor(row_factory=dict_row) as cur:
        return tuple(_attestation(row) for row in cur.execute(_LAST + " WHERE a.token = %s ORDER BY a.id", (token,)))


def _last_open(conn: Control, names: Sequence[str], holder: str) -> tuple[int, UUID]:
    row = None
    if schema.require_current(conn):
        row = conn.execute(
            """SELECT a.id, a.token FROM pgfreeze.attestations a JOIN pgfreeze.freezes f USING (token)
                WHERE f.holder = %s AND f.databases @> %s AND a.after_at IS NULL ORDER BY a.id DESC LIMIT 1""",
            (holder, list(names)),
        ).fetchone()
    if row is None:
        raise FreezeError(
            f"there is no open attestation of {holder!r} for {', '.join(map(repr, names))}: attest before the "
            "snapshot first (pg-freeze attest --before)"
        )
    return int(row[0]), row[1]


def _read(conn: Control, number: int) -> Attestation:
    with conn.cursor(row_factory=dict_row) as cur:
        row = cur.execute(_LAST + " WHERE a.id = %s", (number,)).fetchone()
    assert row is not None
    return _attestation(row)


def _attestation(row: dict[str, Any]) -> Attestation:
    return Attestation(
        id=row["id"],
        token=row["token"],
        holder=row["holder"],
        databases=tuple(row["databases"]),
        before_at=row["before_at"],
        after_at=row["after_at"],
        wal_from=row["before"]["lsn"],
        wal_to=None if row["after"] is None else row["after"]["lsn"],
        checkpoint_lsn=row["checkpoint_lsn"],
        method=None if row["method"] is None else Method(row["method"]),
        level=None if row["level"] is None else Level(row["level"]),
        violations=tuple(Violation(**violation) for violation in row["violations"] or ()),
        sequences=tuple(row["sequences"] or ()),
        unseen=tuple(row["unseen"] or ()),
        advice=row["advice"],
        sizes=row["sizes"],
    )
