"""How many locks a server has room for: the strategy ``lock`` takes one for each table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, LiteralString

from pg_freeze.control import Control

_SPARE: Final = 0.9
_SHARED: Final[LiteralString] = """
    SELECT (SELECT count(*) FROM pg_class WHERE relkind IN ('r', 'p') AND relpersistence <> 't' AND oid >= 16384),
           current_setting('max_locks_per_transaction')::integer
           * (current_setting('max_connections')::integer + current_setting('max_prepared_transactions')::integer),
           (SELECT count(*) FROM pg_locks WHERE NOT fastpath),
           current_setting('max_connections')::integer + current_setting('max_prepared_transactions')::integer,
           extract(epoch FROM current_setting('deadlock_timeout')::interval)::float,
           (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)"""


@dataclass(frozen=True, slots=True)
class Room:
    """How many locks a server has, and how many a database takes: one for each table, partitions included."""

    tables: int
    capacity: int
    used: int
    backends: int
    deadlock_timeout: float
    superuser: bool

    @property
    def left(self) -> int:
        """How many more may be taken with some to spare for everybody else."""
        return int((self.capacity - self.used) * _SPARE)

    def setting_for(self, tables: int) -> int:
        """Return the max_locks_per_transaction with which this many tables can be locked."""
        return max(64, math.ceil((tables / _SPARE + self.used) / self.backends) + 1)


def room(session: Control) -> Room:
    """Return what there is room for in the database of *session*."""
    row = session.execute(_SHARED).fetchone()
    assert row is not None
    return Room(*row)
