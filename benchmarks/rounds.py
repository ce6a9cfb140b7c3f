"""One round of each measurement. A round has its own clients; the server is the same throughout."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from benchmarks.procedures import APPLICATION, DATABASE, Paused, Procedure
from benchmarks.written import Written
from devtools.load import Client, Group, Load, Recorded
from devtools.pgserver import Server
from devtools.rights import OWNER, create_application_database, create_roles

WRITERS: Final = 24
READERS: Final = 8
SNAPSHOT: Final = 0.5
LONG_TRANSACTION: Final = 3.0
CALM: Final = 1.0
ACCOUNTS: Final = 1000


@dataclass(frozen=True, slots=True)
class Outage:
    """What the application noticed of one pause, snapshot and resume. Times in seconds."""

    procedure: str
    long_transaction: bool
    write_gap: float
    client_write_gap: float
    read_gap: float
    errors: int
    reconnects: int
    sessions_ended: int
    drain: float
    acts: float
    final_checkpoint: float | None
    write_bound: float | None
    overhead: float | None

    @property
    def unaccounted(self) -> float | None:
        """How much longer the write gap was than drain, final checkpoint and snapshot together."""
        return None if self.final_checkpoint is None else self.write_gap - self.drain - self.final_checkpoint - SNAPSHOT


@dataclass(frozen=True, slots=True)
class Drain:
    """How long it took to end idle sessions, and everything else in pause and resume but checkpoints. Seconds.

    :param written: what the server wrote for this pause and resume.
    """

    procedure: str
    sessions: int
    seconds: float
    overhead: float | None
    written: Written


def start_server() -> Server:
    """Return a server with the application's database, as durable as in production."""
    server = Server(18, settings={"fsync": True})
    server.start()
    create_roles(server)
    server.create_role(APPLICATION)
    create_database(server, DATABASE)
    return server


def create_database(server: Server, name: str) -> None:
    """Create a database with the tables that the application works on."""
    create_application_database(server, name)
    with server.control(name) as conn:
        conn.execute(f"SET ROLE {OWNER}")
        conn.execute("CREATE TABLE accounts (id integer PRIMARY KEY, balance bigint NOT NULL)")
        conn.execute(
            "CREATE TABLE entries (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, account integer, amount integer)"
        )
        conn.execute("INSERT INTO accounts SELECT i, 0 FROM generate_series(0, %s) i", [ACCOUNTS - 1])
        conn.execute("GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO gitlab")


# Behind a pooler a transaction cannot use what another has prepared: nobody prepares, so that all do the same.
def transfer(conn: psycopg.Connection[Any], client: Client) -> None:
    """Do what an application does in a request: read, change, note, in one transaction."""
    account = _account(client.random)
    with conn.transaction():
        conn.execute("SELECT balance FROM accounts WHERE id = %s", [account], prepare=False)
        conn.execute("UPDATE accounts SET balance = balance + 1 WHERE id = %s", [account], prepare=False)
        conn.execute("INSERT INTO entries (account, amount) VALUES (%s, 1)", [account], prepare=False)


def look(conn: psycopg.Connection[Any], client: Client) -> None:
    """Read one row."""
    conn.execute("SELECT balance FROM accounts WHERE id = %s", [_account(client.random)], prepare=False)


def dawdle(conn: psycopg.Connection[Any], client: Client) -> None:
    """Hold a transaction that has written."""
    with conn.transaction():
        conn.execute("INSERT INTO entries (account, amount) VALUES (0, 1)")
        client.sleep(client.settings)


def _account(random: random.Random) -> int:
    return random.randrange(ACCOUNTS)


def outage(
    procedure: Procedure,
    *,
    long_transaction: bool,
    clients: tuple[int, int] = (WRITERS, READERS),
    nap: float = 0.02,
    calm: float = CALM,
) -> Outage:
    """Pause, let a snapshot's time pass, and resume, under load.

    :param nap: what each client waits between two operations, in seconds.
    :param calm: the application works undisturbed for so long before and after, and must have come back by then.
    """
    writers, readers = clients
    groups = [Group("write", writers, transfer, pause=nap), Group("read", readers, look, pause=nap)]
    if long_transaction:
        # Not counted as a writer: its rare commits would only hide how long the others waited.
        groups.append(Group("long", 1, dawdle, settings=LONG_TRANSACTION))
    with (
        Load(procedure.dsn, groups[:2]) as load,
        Load(procedure.dsn, groups[2:]) as long,
    ):
        begin = time.monotonic()
        time.sleep(calm)
        if long_transaction:
            # In the middle of one of its transactions, wherever that falls.
            time.sleep(random.uniform(0, LONG_TRANSACTION / 2))
        started = time.monotonic()
        paused = procedure.pause()
        ready = time.monotonic()
        time.sleep(SNAPSHOT)
        snapshot = time.monotonic()
        procedure.resume()
        end = time.monotonic()
        time.sleep(calm)
        over = time.monotonic()
    acts = ready - started + end - snapshot
    app = load.recorded
    return Outage(
        procedure=procedure.name,
        long_transaction=long_transaction,
        write_gap=app.gap("write", begin, over).seconds,
        client_write_gap=app.client_gap("write", begin, over),
        read_gap=app.gap("read", begin, over).seconds,
        errors=app.errors(begin, over) + long.recorded.errors(begin, over),
        reconnects=app.reconnects(begin, over) + long.recorded.reconnects(begin, over),
        sessions_ended=app.sessions_ended(begin, over) + long.recorded.sessions_ended(begin, over),
        drain=paused.drain,
        acts=acts,
        final_checkpoint=paused.final_checkpoint,
        write_bound=_bound(paused, app, long.recorded),
        overhead=_overhead(paused, acts),
    )


def _bound(paused: Paused, *applications: Recorded) -> float | None:
    """Return the longest of the transactions that were open, the final checkpoint and the snapshot together."""
    if paused.closed is None or paused.final_checkpoint is None:
        return None
    # What was made to wait ends after the snapshot, and was nobody's to wait for.
    until = paused.closed + paused.drain + SNAPSHOT / 2
    asked = paused.closed if paused.asked is None else paused.asked
    longest = max(
        application.open_at(moment, until) for application in applications for moment in (asked, paused.closed)
    )
    return longest + paused.final_checkpoint + SNAPSHOT


def _overhead(paused: Paused, acts: float) -> float | None:
    if paused.first_checkpoint is None or paused.final_checkpoint is None:
        return None
    return acts - paused.first_checkpoint - paused.drain - paused.final_checkpoint


def drain(server: Server, procedure: Procedure, sessions: int) -> Drain:
    """Pause and resume while the application's sessions do nothing."""
    with idle_sessions(procedure.dsn, sessions):
        before = Written.so_far(server)
        began = time.monotonic()
        paused = procedure.pause()
        procedure.resume()
        acts = time.monotonic() - began
        written = Written.so_far(server).since(before)
    return Drain(procedure.name, sessions, paused.drain, _overhead(paused, acts), written)


@contextmanager
def idle_sessions(dsn: str, count: int) -> Iterator[None]:
    """Have *count* sessions of the application that do nothing and are not missed."""
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        for conn in pool.map(lambda _: psycopg.connect(dsn, autocommit=True), range(count)):
            stack.callback(conn.close)
        yield
