"""What the number of a database's tables does to a freeze."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from benchmarks.procedures import BLOCKS, Block, PgFreeze, Procedure
from benchmarks.rounds import Outage, create_database, outage, start_server
from devtools.pgserver import Server
from devtools.rights import OWNER
from pg_freeze import Admit

#: Those that the application works on are among them.
TABLES: Final = (50, 500, 5000)
#: Writers and readers: few enough to leave the server idle, busy enough to notice a gap of some milliseconds.
CLIENTS: Final = (2, 2)
NAP: Final = 0.002
CALM: Final = 0.5
#: A transaction holds a lock for each table that it creates until it ends.
AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True)
class Many:
    """One pause on an idle server, and one under a small load.

    :param paused: seconds from the beginning of the pause until the snapshot could be taken, on an idle server.
    :param drain: the seconds of it in which writes were refused or waited, but for the final checkpoint.
    :param outage: what a small load noticed.
    """

    procedure: str
    tables: int
    paused: float
    drain: float
    outage: Outage


def procedures(server: Server, database: str) -> list[Procedure]:
    """Return how a database is frozen."""
    return [PgFreeze(server, Admit.READERS, database), *(Block(server, strategy, database) for strategy in BLOCKS)]


@contextmanager
def databases(counts: Sequence[int]) -> Iterator[dict[int, list[Procedure]]]:
    """Have a server with a database for each number of tables, and the procedures to freeze it."""
    with start_server() as server:
        found = {}
        for count in counts:
            name = f"tables_{count}"
            create_database(server, name)
            _fill(server, name, count)
            found[count] = procedures(server, name)
        # The first freeze of all installs the journal.
        first = found[counts[0]][0]
        first.pause()
        first.resume()
        yield found


def _fill(server: Server, database: str, count: int) -> None:
    with server.control(database) as conn:
        conn.execute(f"SET ROLE {OWNER}")
        ((there,),) = conn.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchall()
        for first in range(there, count, AT_ONCE):
            last = min(first + AT_ONCE, count) - 1
            create = "EXECUTE format('CREATE TABLE t%s (id integer PRIMARY KEY)', i)"
            conn.execute(f"DO $$ BEGIN FOR i IN {first}..{last} LOOP {create}; END LOOP; END $$".encode())
        # What made them is not to be written out in the first measurement.
        conn.execute("RESET ROLE")
        conn.execute("CHECKPOINT")


def many(procedure: Procedure, tables: int) -> Many:
    """Freeze once while nobody works, and once under a small load."""
    began = time.monotonic()
    paused = procedure.pause()
    took = time.monotonic() - began
    procedure.resume()
    seen = outage(procedure, long_transaction=False, clients=CLIENTS, nap=NAP, calm=CALM)
    return Many(procedure.name, tables, took, paused.drain, seen)


def measure(counts: Sequence[int], rounds: int) -> Iterator[Many]:
    """Measure every number of tables *rounds* times, in turn."""
    with databases(counts) as found:
        for _ in range(rounds):
            for count, ways in found.items():
                for procedure in ways:
                    yield many(procedure, count)
