"""What tests of the core share: clients that work while a database freezes, and ways to see what became of things."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql

from devtools.pgserver import Server

SECONDS: Final = tuple(timedelta(seconds=n) for n in range(61))
#: What every ACL of the application's objects says, in a database with a journal; the default, if there is none.
MEANINGS: Final[LiteralString] = """
    SELECT a.type || ' ' || a.name, a."column",
           ARRAY(SELECT x::text FROM aclexplode(COALESCE(a.acl, acldefault(a.kind, a.owner))) x ORDER BY 1)
      FROM pgfreeze.acls a ORDER BY 1, 2"""


def ms(milliseconds: int) -> timedelta:
    return timedelta(milliseconds=milliseconds)


def heed_signals() -> None:
    """Undo, in a child, what it inherits of whoever runs the tests: nohup ignores SIGHUP, and a shell's `&` SIGINT."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def wait_until(met: Callable[[], Any], within: float = 20) -> Any:
    """Return the first true value of *met*, or fail."""
    began = time.monotonic()
    while not (value := met()):
        waited = time.monotonic() - began
        assert waited < within, f"did not happen within {within} s"
        time.sleep(pause_after(waited))
    return value


def pause_after(waited: float) -> float:
    """Return how long to wait until one looks again: a look may open connections, and take more time than the rest."""
    return min(0.01 + waited / 10, 0.2)


class BusyClient:
    """A client that is never idle: one transaction after the other, and a new connection when it loses one.

    Each transaction inserts a row first and then goes on for a while.
    """

    def __init__(self, connect: Callable[[], "psycopg.Connection[Any]"], transaction: timedelta) -> None:
        self._connect = connect
        self._transaction = transaction.total_seconds()
        self._stop = threading.Event()
        self.commits: list[datetime] = []
        self.refused: list[str | None] = []
        self.lost = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        with connect() as conn:
            conn.execute("CREATE TABLE IF NOT EXISTS busy (at timestamptz DEFAULT clock_timestamp())")
        self._thread.start()
        self.began = wait_until(lambda: self._began)

    _began = False

    def _work(self) -> None:
        while not self._stop.is_set():
            with suppress(psycopg.OperationalError), self._connect() as conn:
                self._use(conn)
            self.lost += 1
            time.sleep(0.01)

    def _use(self, conn: "psycopg.Connection[Any]") -> None:
        while not self._stop.is_set():
            try:
                with conn.transaction():
                    conn.execute("INSERT INTO busy DEFAULT VALUES")
                    self._began = True
                    conn.execute("SELECT pg_sleep(%s)", [self._transaction])
                self.commits.append(datetime.now(UTC))
            except psycopg.errors.ReadOnlySqlTransaction as error:
                self.refused.append(error.sqlstate)
                self._stop.wait(0.02)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def commits_after(self, moment: datetime | None) -> int:
        assert moment is not None
        return sum(at > moment for at in self.commits)


@contextmanager
def background(act: Callable[[], Any]) -> Iterator[Future[Any]]:
    """Run *act* in a thread; whoever leaves without asking for its result waits for its end."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(act)


_SETTINGS: Final[LiteralString] = """
    SELECT jsonb_agg(to_jsonb(s) ORDER BY s.setdatabase, s.setrole)::text FROM pg_db_role_setting s"""
# Without what vacuum advances by itself.
_DATABASES: Final[LiteralString] = """
    SELECT jsonb_agg(to_jsonb(d) - 'datfrozenxid' - 'datminmxid' ORDER BY d.oid)::text FROM pg_database d"""


def settings_of(server: Server) -> tuple[Any, ...]:
    """Return all that pg_database and pg_db_role_setting hold, as text."""
    return tuple(server.execute(_DATABASES) + server.execute(_SETTINGS))


def run_as(connect: Callable[[], "psycopg.Connection[Any]"], statement: str) -> None:
    """Run a statement that the product printed."""
    with connect() as conn:
        conn.execute(statement.encode())


def is_read_only(conn: "psycopg.Connection[Any]") -> bool:
    row = conn.execute("SHOW transaction_read_only").fetchone()
    return row == ("on",)


def alter(server: Server, statement: LiteralString, *names: str) -> None:
    """Run a statement whose {} are identifiers."""
    server.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def sessions_of(server: Server, database: str) -> set[int]:
    """Return the pids of the clients of a database."""
    rows = server.execute(
        sql.SQL("SELECT pid FROM pg_stat_activity WHERE datname = {} AND backend_type = 'client backend'").format(
            sql.Literal(database)
        )
    )
    return {pid for (pid,) in rows}


def is_alive(conn: "psycopg.Connection[Any]") -> bool:
    """Whether the server still serves this session."""
    try:
        conn.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


def dead_men(server: Server, database: str | None = None) -> list[int]:
    """Return the dead-man switches of a server, or those in one database."""
    rows = server.execute("SELECT pid, datname FROM pg_stat_activity WHERE application_name LIKE 'pg-freeze dead-man%'")
    return [pid for pid, where in rows if database in (None, where)]
