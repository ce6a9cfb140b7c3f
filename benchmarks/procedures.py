"""The procedures that are compared. Another one is another class with the same four members."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, LiteralString, Protocol

import psycopg

from airflow_pg_freeze.core import Admit, Connect, Strategy, frozen, pause, resume
from devtools.pgserver import Server
from devtools.rights import FREEZER

DATABASE: Final = "gitlabhq"
APPLICATION: Final = "gitlab"

# The script as it was published, statement by statement; only that it named its database in two ways is corrected.
SEED_CLOSE: Final[tuple[LiteralString, ...]] = (
    "alter database gitlabhq with allow_connections = off",
    "alter database gitlabhq set default_transaction_read_only = true",
)
SEED_DRAIN: Final[LiteralString] = """
DO $X$ BEGIN
-- kill open idle connections, try up to 9x. Last time, kill regardless
FOR i IN 1..10 LOOP
PERFORM pg_terminate_backend(pid) from pg_stat_activity where usename = 'gitlab'
and (i >= 10 OR state in ('idle', 'disabled' ));
PERFORM pg_stat_clear_snapshot();
EXIT WHEN NOT EXISTS ( select pid from pg_stat_activity where usename = 'gitlab' );
RAISE NOTICE 'pg backends still open: sleeping 2 seconds';
PERFORM pg_sleep(2);
PERFORM pg_stat_clear_snapshot();
END LOOP;
-- send notice if still open connections
IF EXISTS ( select pid from pg_stat_activity where usename = 'gitlab' ) THEN
RAISE NOTICE 'Hung backends. Backup might not be 100%% consistent';
END IF;
END;$X$"""
SEED_OPEN: Final[tuple[LiteralString, ...]] = ("alter database gitlabhq with allow_connections = on", "CHECKPOINT")
SEED_RESUME: Final[tuple[LiteralString, ...]] = (
    "alter database gitlabhq with allow_connections = off",
    "alter database gitlabhq set default_transaction_read_only = false",
    "SELECT pg_stat_clear_snapshot()",
    "SELECT pg_terminate_backend(pid) from pg_stat_activity where usename = 'gitlab'",
    "alter database gitlabhq with allow_connections = on",
)


@dataclass(frozen=True, slots=True)
class Paused:
    """What a pause tells about itself; seconds, and the barrier on the monotonic clock. None: has no such step."""

    drain: float
    barrier: float | None = None
    first_checkpoint: float | None = None
    final_checkpoint: float | None = None


class Procedure(Protocol):
    """One way to make a database stand still."""

    name: str

    def pause(self) -> Paused:
        """Stop the writes; on return a snapshot may be taken."""

    def resume(self) -> None:
        """Let the application write again."""


class Seed:
    """The published script, run by the superuser as its author did."""

    name = "published script"

    def __init__(self, server: Server) -> None:
        self._server = server

    def pause(self) -> Paused:
        """Close, make read-only, end sessions every two seconds, open, checkpoint."""
        with self._server.control() as conn:
            for statement in SEED_CLOSE:
                conn.execute(statement)
            began = time.monotonic()
            conn.execute(SEED_DRAIN)
            drain = time.monotonic() - began
            for statement in SEED_OPEN:
                conn.execute(statement)
        return Paused(drain)

    def resume(self) -> None:
        """Close, make writable, end every session, open."""
        with self._server.control() as conn:
            for statement in SEED_RESUME:
                conn.execute(statement)


class PgFreeze:
    """Our core, with the rights that its documentation asks for."""

    def __init__(self, server: Server, admit: Admit) -> None:
        self.name = f"pg-freeze, admit={admit.value}"
        self._admit = admit
        self._checkpoints: list[float] = []
        self._connect = _timing(server.dsn("postgres", FREEZER), self._checkpoints)

    def pause(self) -> Paused:
        """Freeze, drain, and make the final checkpoint."""
        self._checkpoints.clear()
        frozen = pause(
            self._connect,
            databases=[DATABASE],
            holder="benchmark",
            admit=self._admit,
            lease=timedelta(minutes=2),
            checkpoint=True,
        )
        assert frozen.barrier_at is not None
        assert frozen.drained_at is not None
        first, final = self._checkpoints
        return Paused(
            (frozen.drained_at - frozen.barrier_at).total_seconds(), _monotonic(frozen.barrier_at), first, final
        )

    def resume(self) -> None:
        """Thaw."""
        resume(self._connect, databases=[DATABASE], holder="benchmark")


class Locks:
    """The strategy ``lock``: nobody is ended, writers wait."""

    name = "pg-freeze, strategy=lock"

    def __init__(self, server: Server) -> None:
        self._checkpoints: list[float] = []
        self._connect = _timing(server.dsn("postgres", FREEZER), self._checkpoints)
        self._connect_to = lambda database: _timing(server.dsn(database, FREEZER), self._checkpoints)()
        self._block = ExitStack()

    def pause(self) -> Paused:
        """Lock every table, and make the final checkpoint."""
        self._checkpoints.clear()
        held = self._block.enter_context(
            frozen(
                self._connect,
                self._connect_to,
                databases=[DATABASE],
                holder="benchmark",
                strategy=Strategy.LOCK,
                lease=timedelta(minutes=2),
            )
        )
        assert held.freeze.barrier_at is not None
        assert held.freeze.drained_at is not None
        waited = (held.freeze.drained_at - held.freeze.requested_at).total_seconds()
        return Paused(waited, _monotonic(held.freeze.barrier_at), final_checkpoint=self._checkpoints[-1])

    def resume(self) -> None:
        """Release the locks."""
        self._block.close()


def _timing(dsn: str, checkpoints: list[float]) -> Connect:
    """Return a ``connect`` whose connections note how long each of their checkpoints took."""

    class Timing(psycopg.Connection[Any]):
        def execute(self, query: Any, params: Any = None, **options: Any) -> psycopg.Cursor[Any]:
            began = time.monotonic()
            cursor = super().execute(query, params, **options)
            if query == "CHECKPOINT":
                checkpoints.append(time.monotonic() - began)
            return cursor

    return lambda: Timing.connect(dsn, autocommit=True)


def _monotonic(moment: datetime) -> float:
    """Return the server's *moment* on the monotonic clock: it runs on this machine."""
    return time.monotonic() - (time.time() - moment.timestamp())


def procedures(server: Server) -> list[Procedure]:
    """Return what is compared; the one that all others are compared with comes first."""
    ours = (Admit.READERS, Admit.READERS_ONCE_DRAINED, Admit.NOBODY)
    return [Seed(server), *(PgFreeze(server, admit) for admit in ours), Locks(server)]
