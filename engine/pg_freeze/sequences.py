"""A look into a frozen database itself: what its sequences say, and whether it has unlogged tables.

The database may be a stranger's. So nothing of it is run: catalogs are read, and sequences by their OIDs, since a name
could be a view's the next moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, LiteralString

import psycopg

from pg_freeze.entrance import Entrances, in_a_line
from pg_freeze.errors import FreezeError

#: nextval logs this many values ahead.
LOGGED_AHEAD: Final = 32
_PATIENCE: Final = "5s"

_SEQUENCES: Final[LiteralString] = """
    SELECT c.oid::bigint AS oid, n.nspname || '.' || c.relname AS name, pg_relation_filenode(c.oid)::bigint AS file,
           c.relpersistence = 'u' AS unlogged, s.seqstart AS start, s.seqincrement AS increment, s.seqcache AS cache,
           r.readable, CASE WHEN r.readable THEN pg_sequence_last_value(c.oid::regclass) END AS last
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_sequence s ON s.seqrelid = c.oid
     CROSS JOIN LATERAL (SELECT has_sequence_privilege(c.oid, 'SELECT, USAGE') AS readable) r
     WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND n.nspname <> 'pgfreeze' ORDER BY c.oid"""
_UNLOGGED: Final[LiteralString] = """
    SELECT EXISTS (SELECT FROM pg_class WHERE relpersistence = 'u' AND relkind IN ('r', 'm', 't')),
           (SELECT oid::bigint FROM pg_database WHERE datname = current_database())"""


@dataclass(frozen=True, slots=True)
class State:
    """What a sequence says. ``last`` is the value that was given out last, None if none was or it may not be read."""

    oid: int
    name: str
    file: int | None
    unlogged: bool
    start: int
    increment: int
    cache: int
    readable: bool
    last: int | None


@dataclass(frozen=True, slots=True)
class Inside:
    """What was seen in one database; ``unseen`` says why nothing was."""

    name: str
    database: int | None = None
    sequences: tuple[State, ...] = ()
    unlogged: bool | None = None
    unseen: str | None = None

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Inside:
        """Return what the journal has kept."""
        return cls(**{**kept, "sequences": tuple(State(**one) for one in kept["sequences"])})


def look_inside(entrances: Entrances) -> tuple[Inside, ...]:
    """Look into each of the databases. Never raises: it says why not."""
    return tuple(_inside(entrances, name) for name in entrances.names)


def _inside(entrances: Entrances, name: str) -> Inside:
    try:
        conn = entrances.session(name)
        conn.execute("SELECT set_config('statement_timeout', %s, false)", (_PATIENCE,))
        found = conn.execute(_UNLOGGED).fetchone()
        assert found is not None
        with conn.cursor(row_factory=psycopg.rows.class_row(State)) as cur:
            states = tuple(cur.execute(_SEQUENCES))
    except (psycopg.Error, FreezeError) as error:
        return Inside(name, unseen=in_a_line(error))
    return Inside(name, found[1], states, unlogged=found[0])


@dataclass(frozen=True, slots=True)
class Moved:
    """A sequence that says something else than before. It ran ahead by nextval alone, or was set."""

    name: str
    ahead: bool
    what: str


def moved(
    before: Sequence[State], after: Sequence[State], logged: Mapping[int, int] | None, checkpoints: int
) -> Iterator[Moved]:
    """Yield each sequence that moved between two looks.

    setval writes a record of the WAL each time, nextval one for every 33 values and one at its first call after a
    checkpoint: so the number of records tells whether nextval alone can have come so far. It cannot tell of a setval
    back and forth that happens to write as many.

    :param logged: how many records of the WAL each file has; None if the WAL was not read: nothing was logged then.
    :param checkpoints: how many were begun in between.
    """
    now = {one.oid: one for one in after}
    for then in before:
        one = now.get(then.oid)
        if one is None or one.file != then.file:
            yield Moved(then.name, ahead=False, what="was dropped, or given a new file")
        elif then.readable and one.readable:
            records = (logged or {}).get(then.file or 0, 0)
            if one.last != then.last or records:
                ahead = _by_nextval(then, one, records, checkpoints)
                what = f"went from {_said(then.last)} to {_said(one.last)}"
                yield Moved(then.name, ahead, what if ahead else f"{what}, not by nextval alone ({records} record(s))")


def _said(value: int | None) -> str:
    return "unused" if value is None else str(value)


def _by_nextval(then: State, now: State, records: int, checkpoints: int) -> bool:
    if now.last is None:
        return False
    from_where = then.start - then.increment if then.last is None else then.last
    values, rest = divmod(now.last - from_where, then.increment)
    if rest or values <= 0:
        return False
    if then.unlogged:
        return True
    # One record serves the call that writes it and those that follow, while enough is logged ahead for one more.
    calls_ahead = LOGGED_AHEAD // then.cache
    each = then.cache * (1 + calls_ahead)
    fewest = 1 if then.last is None else 0
    fewest = max(fewest, -(-max(0, values - then.cache * calls_ahead) // each))
    most = -(-values // each) + checkpoints
    return fewest <= records <= most
