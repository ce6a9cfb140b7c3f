"""The procedures that are compared. Another one is another class with the same members."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, LiteralString, Protocol

import psycopg

from devtools.pgbouncer import PgBouncer
from devtools.pgserver import Server
from devtools.rights import FREEZER
from pg_freeze import READ_ONLY, Admit, Connect, FreezeRequest, frozen, pause, resume
from pg_freeze.strategies import OURS

DATABASE: Final = "gitlabhq"
APPLICATION: Final = "gitlab"
#: The strategies that are measured as a block in one process; read-only is measured as a pause, each way to admit.
BLOCKS: Final = tuple(name for name in OURS if name != READ_ONLY)

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
    """What a pause tells about itself; times in seconds. None: has no such step, or does not tell.

    :param drain: how long it waited for those who were at work, or ended them.
    :param closed: when that began, on the monotonic clock: writes that come later are refused, or wait.
    :param asked: when it first tried, if it gave up and tried again.
    """

    drain: float
    closed: float | None = None
    asked: float | None = None
    first_checkpoint: float | None = None
    final_checkpoint: float | None = None


class Procedure(Protocol):
    """One way to make a database stand still.

    :param dsn: the application's connection string while this procedure is in use.
    """

    name: str
    dsn: str

    def pause(self) -> Paused:
        """Stop the writes; on return a snapshot may be taken."""

    def resume(self) -> None:
        """Let the application write again."""


class Seed:
    """The published script, run by the superuser as its author did."""

    name = "published script"

    def __init__(self, server: Server) -> None:
        self.dsn = server.dsn(DATABASE, APPLICATION)
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

    def __init__(self, server: Server, admit: Admit, database: str = DATABASE) -> None:
        self.name = f"pg-freeze, admit={admit.value}"
        self.dsn = server.dsn(database, APPLICATION)
        self._database = database
        self._admit = admit
        self._checkpoints: list[Checkpoint] = []
        self._connect = _timing(server.dsn("postgres", FREEZER), self._checkpoints)

    def pause(self) -> Paused:
        """Freeze, drain, and make the final checkpoint."""
        self._checkpoints.clear()
        frozen = pause(
            self._connect,
            FreezeRequest.of(
                [self._database], "benchmark", admit=self._admit, lease=timedelta(minutes=2), checkpoint=True
            ),
        )
        assert frozen.barrier_at is not None
        assert frozen.drained_at is not None
        first, final = self._checkpoints
        return Paused(
            (frozen.drained_at - frozen.barrier_at).total_seconds(),
            _monotonic(frozen.barrier_at),
            first_checkpoint=first.seconds,
            final_checkpoint=final.seconds,
        )

    def resume(self) -> None:
        """Thaw."""
        resume(self._connect, databases=[self._database], holder="benchmark")


class Block:
    """One block in one process, as ``@task.pg_frozen`` has it, with a strategy that the operators do not have."""

    def __init__(self, server: Server, strategy: str, database: str = DATABASE) -> None:
        self.name = f"pg-freeze, strategy={strategy}"
        self.dsn = server.dsn(database, APPLICATION)
        self._database = database
        self._strategy = strategy
        self._checkpoints: list[Checkpoint] = []
        self._connect = _timing(server.dsn("postgres", FREEZER), self._checkpoints)
        self._connect_to = lambda name: _timing(server.dsn(name, FREEZER), self._checkpoints)()
        self._block = ExitStack()

    def pause(self) -> Paused:
        """Enter the block: make writers wait, and make the final checkpoint."""
        self._checkpoints.clear()
        held = self._block.enter_context(
            frozen(
                self._connect,
                self._connect_to,
                FreezeRequest.for_block(
                    [self._database], "benchmark", strategy=self._strategy, lease=timedelta(minutes=2)
                ),
            )
        )
        assert held.freeze.barrier_at is not None
        assert held.freeze.drained_at is not None
        # By the strategy lock, the barrier is when the attempt that succeeded began.
        waited = (held.freeze.drained_at - held.freeze.barrier_at).total_seconds()
        first, final = self._checkpoints
        return Paused(waited, _monotonic(held.freeze.barrier_at), asked=first.ended, final_checkpoint=final.seconds)

    def resume(self) -> None:
        """Leave the block."""
        self._block.close()


class Pooler:
    """PgBouncer's PAUSE and RESUME, with the checkpoints of the others. The application connects through it."""

    name = "PgBouncer PAUSE"

    def __init__(self, server: Server, pgbouncer: PgBouncer) -> None:
        self.dsn = pgbouncer.dsn(DATABASE, APPLICATION)
        self._connect = server.connect_factory(FREEZER)
        self._pgbouncer = pgbouncer

    def pause(self) -> Paused:
        """Checkpoint, wait until no transaction is open and let none begin, and checkpoint again."""
        with self._connect() as conn, self._pgbouncer.console() as console:
            conn.execute("CHECKPOINT")
            closed = time.monotonic()
            console.execute(f"PAUSE {DATABASE}".encode())
            paused = time.monotonic()
            conn.execute("CHECKPOINT")
            return Paused(paused - closed, closed, final_checkpoint=time.monotonic() - paused)

    def resume(self) -> None:
        """Let transactions begin."""
        with self._pgbouncer.console() as console:
            console.execute(f"RESUME {DATABASE}".encode())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How long one took, and when it was over, on the monotonic clock."""

    seconds: float
    ended: float


def _timing(dsn: str, checkpoints: list[Checkpoint]) -> Connect:
    """Return a ``connect`` whose connections note how long each of their checkpoints took."""

    class Timing(psycopg.Connection[Any]):
        def execute(self, query: Any, params: Any = None, **options: Any) -> psycopg.Cursor[Any]:
            began = time.monotonic()
            cursor = super().execute(query, params, **options)
            if query == "CHECKPOINT":
                ended = time.monotonic()
                checkpoints.append(Checkpoint(ended - began, ended))
            return cursor

    return lambda: Timing.connect(dsn, autocommit=True)


def _monotonic(moment: datetime) -> float:
    """Return the server's *moment* on the monotonic clock: it runs on this machine."""
    return time.monotonic() - (time.time() - moment.timestamp())


def procedures(server: Server, pgbouncer: PgBouncer | None) -> list[Procedure]:
    """Return what is compared; the one that all others are compared with comes first.

    :param pgbouncer: in front of the server; None leaves it out.
    """
    found: list[Procedure] = [
        Seed(server),
        *(PgFreeze(server, admit) for admit in (Admit.READERS, Admit.READERS_ONCE_DRAINED, Admit.NOBODY)),
        *(Block(server, strategy) for strategy in BLOCKS),
    ]
    return found if pgbouncer is None else [*found, Pooler(server, pgbouncer)]
