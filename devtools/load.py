"""An application under load: clients that reconnect as applications do, and remember every moment of it.

Each group of clients has a process of its own, so that what is measured in this process is not slowed down by them.
Times are those of ``time.monotonic``, which is the same clock in every process of a machine.
"""

import logging
import math
import multiprocessing
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection as Pipe
from multiprocessing.sharedctypes import RawArray
from statistics import median
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import psycopg

#: Seconds before another attempt: after a session was lost, and after a connection or a write was refused. Anything in
#: between, so that not all clients come at once.
RECONNECT: Final = (0.0, 0.1)
BACKOFF: Final = (0.05, 0.15)
STOP_WITHIN: Final = 20.0
_SPAWN: Final = multiprocessing.get_context("spawn")


class Client:
    """What an operation may use besides its connection; it is the same from one operation to the next."""

    def __init__(self, number: int, settings: Any = None, stop: threading.Event | None = None) -> None:
        self.number = number
        self.random = random.Random(number)
        self.settings = settings
        self.notes: set[str] = set()
        self.stop = stop or threading.Event()

    def sleep(self, seconds: float) -> None:
        """Wait, but not past the end of the load."""
        self.stop.wait(seconds)


#: One unit of work, such as a transaction; raises psycopg.Error when refused. A module's function, since it is pickled.
Operation: TypeAlias = Callable[["psycopg.Connection[Any]", Client], None]


@dataclass(frozen=True, slots=True)
class Group:
    """Clients that do the same thing.

    :param operation: what each does over and over.
    :param pause: seconds between two operations of one client.
    :param settings: handed to each client.
    """

    name: str
    clients: int
    operation: Operation
    pause: float = 0.02
    settings: Any = None


@dataclass(slots=True)
class Record:
    """What one client went through."""

    group: str
    done: list[tuple[float, float]] = field(default_factory=list)
    errors: list[tuple[float, str]] = field(default_factory=list)
    connected: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Gap:
    """The longest time without a completed operation."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Recorded:
    """What all clients went through; every question can be asked for a window of time."""

    records: tuple[Record, ...]

    def group(self, name: str) -> tuple[Record, ...]:
        """Return the records of one group."""
        return tuple(record for record in self.records if record.group == name)

    def completions(self, name: str) -> list[float]:
        """Return when the operations of a group were completed, in order."""
        return sorted(end for record in self.group(name) for _, end in record.done)

    def gap(self, name: str, begin: float, end: float) -> Gap:
        """Return the longest time between *begin* and *end* in which no client of the group completed anything."""
        return _longest(self.completions(name), begin, end)

    def client_gap(self, name: str, begin: float, end: float) -> float:
        """Return the median over the group's clients of each one's own longest gap, in seconds."""
        return median(_longest([e for _, e in record.done], begin, end).seconds for record in self.group(name))

    def open_at(self, moment: float, until: float = math.inf) -> float:
        """Return how many seconds the longest of the operations that were under way at *moment* still went on.

        :param until: operations that ended later do not count.
        """
        return max(
            (e - moment for record in self.records for b, e in record.done if b <= moment < e <= until), default=0.0
        )

    def errors(self, begin: float, end: float) -> int:
        """Return how many operations and connections failed."""
        return sum(begin <= at < end for record in self.records for at, _ in record.errors)

    def sessions_ended(self, begin: float, end: float) -> int:
        """Return how many sessions ended under a client."""
        return sum(begin <= at < end for record in self.records for at in record.lost)

    def reconnects(self, begin: float, end: float) -> int:
        """Return how many sessions were opened to replace ended ones."""
        return sum(begin <= at < end for record in self.records for at in record.connected[1:])


def _longest(moments: Sequence[float], begin: float, end: float) -> Gap:
    within = [begin, *(moment for moment in moments if begin < moment < end), end]
    return max((Gap(a, b) for a, b in pairwise(within)), key=lambda gap: gap.seconds)


class Load:
    """The clients at work, from ``with`` to its end; then :attr:`recorded` holds what they went through.

    :param dsn: the connection string of every client.
    :param groups: the clients.
    """

    def __init__(self, dsn: str, groups: Sequence[Group]) -> None:
        self._members = [_Member(dsn, group) for group in groups if group.clients]
        self._recorded: Recorded | None = None

    def __enter__(self) -> Self:
        try:
            for member in self._members:
                member.process.start()
            self._wait_until_all_work()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._recorded = Recorded(tuple(record for member in self._members for record in member.collect()))
        finally:
            self._end()

    @property
    def recorded(self) -> Recorded:
        """What the clients went through; there once the load has ended."""
        assert self._recorded is not None
        return self._recorded

    def completed(self, name: str) -> int:
        """Return how many operations a group has completed so far."""
        return sum(sum(member.counts) for member in self._members if member.group.name == name)

    def _wait_until_all_work(self) -> None:
        deadline = time.monotonic() + 60
        while not all(all(member.counts) for member in self._members):
            for member in self._members:
                if not member.process.is_alive():
                    raise RuntimeError(f"the {member.group.name} clients ended at once")
            if time.monotonic() > deadline:
                raise RuntimeError("not every client got to work within 60 s")
            time.sleep(0.02)

    def _end(self) -> None:
        for member in self._members:
            if member.process.is_alive():
                member.process.kill()
            if member.process.pid is not None:
                member.process.join()


class _Member:
    def __init__(self, dsn: str, group: Group) -> None:
        self.group = group
        self.counts = RawArray("Q", group.clients)
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_work, args=(dsn, group, self.counts, theirs), daemon=True)

    def collect(self) -> list[Record]:
        self.pipe.send("stop")
        if not self.pipe.poll(STOP_WITHIN):
            raise RuntimeError(f"the {self.group.name} clients did not stop within {STOP_WITHIN:g} s")
        records: list[Record] = self.pipe.recv()
        return records


def _work(dsn: str, group: Group, counts: Any, pipe: Pipe) -> None:
    # Ctrl-C reaches the whole foreground group; the parent decides when the clients end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A rollback that fails since the session has been ended is an error that the record holds already.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    stop = threading.Event()
    records = [Record(group.name) for _ in range(group.clients)]
    threads = [
        threading.Thread(
            target=_use, args=(dsn, group, Client(number, group.settings, stop), record, counts), daemon=True
        )
        for number, record in enumerate(records)
    ]
    for thread in threads:
        thread.start()
    try:
        pipe.recv()
    except EOFError:  # the parent is gone
        return
    stop.set()
    for thread in threads:
        thread.join()
    pipe.send(records)


def _use(dsn: str, group: Group, client: Client, record: Record, counts: Any) -> None:
    conn: psycopg.Connection[Any] | None = None
    stop = client.stop
    # Clients that were started together do not stay in step.
    stop.wait(client.random.random() * group.pause)
    while not stop.is_set():
        try:
            if conn is None:
                conn = psycopg.connect(dsn, autocommit=True)
                record.connected.append(time.monotonic())
            began = time.monotonic()
            group.operation(conn, client)
            record.done.append((began, time.monotonic()))
            counts[client.number] += 1
            stop.wait(group.pause)
        except psycopg.Error as error:
            record.errors.append((time.monotonic(), error.sqlstate or type(error).__name__))
            if conn is not None and conn.closed:
                record.lost.append(time.monotonic())
                conn = None
                stop.wait(client.random.uniform(*RECONNECT))
            else:
                stop.wait(client.random.uniform(*BACKOFF))
    if conn is not None:
        conn.close()
