"""One lane of the crash matrix: databases of its own, a proxy, and a process to be killed. See test_crash_matrix.py."""

import itertools
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from itertools import cycle, product
from queue import SimpleQueue
from typing import Any, Final, LiteralString

import psycopg

import pg_freeze as core
from devtools import asking
from devtools.pgserver import Server
from devtools.rights import checkpointer, create_application_database, keep_private
from devtools.warm import Ended, Warm
from devtools.wire import PLAIN, Moment, Proxy, Step
from pg_freeze.strategies import OURS, named
from tests.server.clients import MEANINGS, alter, pause_after

SHORT: Final = 1.5
LONG: Final = 60.0
#: How long after the end of its lease a freeze may last here: the machine may be busy with other things.
LATE: Final = timedelta(seconds=3)
#: Seconds that a connection may take, for the same reason.
PATIENCE: Final = 60
_numbers = itertools.count(1)


class Event(StrEnum):
    KILLED = "killed"
    CUT = "cut"
    TERMINATED = "terminated"
    SILENT = "silent"
    STOPPED = "stopped"
    CRASHED = "server crashed"
    BOTH = "killed, server crashed"


class Aftermath(StrEnum):
    RESUME = "resume"
    NOTHING = "nothing"
    GUARD = "guard"


THE_TWO: Final = (Aftermath.RESUME, Aftermath.NOTHING)
#: Acts that freeze for the time of a block, and so need no freeze to begin with, by strategy.
HOLDS: Final = {f"block by {name}": name for name in OURS}
#: Acts that leave a freeze behind, by strategy; that of a pause by default has the short name.
PAUSES: Final = {
    "pause": core.READ_ONLY,
    **{f"pause by {name}": name for name in OURS if named(name).outlives and name != core.READ_ONLY},
}
FREEZING: Final = (*PAUSES, *HOLDS)
#: What a lane of either kind can do: with the journal in the maintenance database, or in the frozen one.
INSIDE: Final = tuple(act for act, name in {**PAUSES, **HOLDS}.items() if named(name).own_journal)
OUTSIDE: Final = (*(act for act in FREEZING if act not in INSIDE), "checkpoint", "resume")
#: Events after which the process waits for us, rather than we for its end.
HANGING: Final = (Event.CUT, Event.SILENT, Event.STOPPED)


@dataclass(frozen=True, slots=True)
class Cell:
    act: str
    step: Step
    moment: Moment
    aftermath: Aftermath
    event: Event


@dataclass(slots=True)
class Outcome:
    """What came of one cell: how its freeze ended (None: there was none), how long after its lease, what is wrong."""

    cell: Cell
    reached: bool = False
    ended: Ended | None = None
    thawed_before: bool = False
    thawed_by: str | None = None
    late: timedelta = timedelta(0)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cell = self.cell
        where = f"{cell.act}, {cell.event} {cell.moment} step {cell.step.occurrence} of {cell.step.text[:70]!r}"
        return f"{where}, then {cell.aftermath} (the process {self.ended}): {'; '.join(self.problems)}"


def is_poll(step: Step) -> bool:
    """Whether this is one of several looks that a busy machine may make more often, or fewer times."""
    polls = (
        "SELECT true FROM pg_catalog.pg_stat_activity WHERE pid",
        "WITH held AS MATERIALIZED",
        "SELECT pg_stat_get_snapshot_timestamp()",
    )
    return step.occurrence > 1 and step.text.startswith(polls)


class Lane:
    """Two databases with prior settings of every kind, frozen together in each cell."""

    #: How the pauses freeze whose process is not the one under test.
    strategy = core.READ_ONLY

    def __init__(self, server: Server, stack: ExitStack) -> None:
        self.server = server
        self.user = checkpointer(server.version)
        self.databases = self._names()
        for name in self.databases:
            create_application_database(server, name)
            stack.callback(server.drop_database, name)
            alter(server, "ALTER DATABASE {} SET work_mem = '5MB'", name)
            with server.connect_factory("app", name)() as conn:
                conn.execute("CREATE TABLE t (i int, at timestamptz DEFAULT clock_timestamp())")
        first = self.databases[0]
        alter(server, "ALTER DATABASE {} SET default_transaction_read_only = off", first)
        alter(server, "ALTER ROLE freezer IN DATABASE {} SET default_transaction_read_only = off", first)
        self.connect = server.connect_factory(self.user, self._journal(), connect_timeout=PATIENCE)
        core.install(server.connect_factory(dbname=self._journal()))
        self.watch = server.control(self._journal())
        stack.callback(self._leave)
        self.prior = self.settings()
        self.warm = stack.enter_context(Warm())
        self.stopped = False
        self.proxy = stack.enter_context(Proxy(server.port))
        self.dsn = server.dsn("postgres", self.user, **PLAIN, port=self.proxy.port, connect_timeout=PATIENCE)

    def _leave(self) -> None:
        self.watch.close()

    def _names(self) -> list[str]:
        return [f"crash_{next(_numbers)}", f"crash_{next(_numbers)}"]

    def _journal(self) -> str:
        return "postgres"

    def settings(self) -> list[Any]:
        query = """SELECT d.datname::text, d.datallowconn, s.setrole::regrole::text, s.setconfig FROM pg_database d
                     LEFT JOIN pg_db_role_setting s ON s.setdatabase = d.oid WHERE d.datname = ANY (%s) ORDER BY 1, 3"""
        return self.watch.execute(query, [self.databases]).fetchall()

    def freezes(self, more: LiteralString = "true") -> list[Any]:
        query: LiteralString = """
            SELECT token::text, holder, state, thawed_by, restored_at - lease_until FROM pgfreeze.freezes
             WHERE databases && %s AND """
        return self.watch.execute(query + more + " ORDER BY requested_at", [self.databases]).fetchall()

    def open(self) -> list[Any]:
        return self.freezes("state <> 'thawed'")

    def holding(self) -> list[Any]:
        return self.freezes("state IN ('draining', 'frozen')")

    def pause(self, holder: str, lease: float = LONG) -> core.Freeze:
        return asking.pause(
            self._outside,
            databases=self.databases,
            holder=holder,
            lease=timedelta(seconds=lease),
            drain_timeout=timedelta(seconds=1),
            strategy=self.strategy,
            connect_to=self._connect_to,
        )

    def resume(self, holder: str) -> core.Resumed:
        return core.resume(self._outside, databases=self.databases, holder=holder, connect_to=self._connect_to)

    def _connect_to(self, name: str) -> core.Control:
        return self.server.connect_factory(self.user, name, connect_timeout=PATIENCE)()

    def _outside(self) -> core.Control:
        return self._connect_to("postgres")

    def options(self, act: str, holder: str, lease: float) -> dict[str, Any]:
        more: dict[str, Any] = {"lease": lease, "drain_timeout": 1} if act in FREEZING else {}
        if act in HOLDS:
            more["application"] = self.server.dsn(self.databases[0], "app", connect_timeout=PATIENCE)
        return {"databases": self.databases, "holder": holder, **more}

    def application(self) -> psycopg.Connection[Any] | None:
        """Return a session of the application; None while the database is closed."""
        try:
            return self.server.connect_factory("app", self.databases[0], connect_timeout=PATIENCE)()
        except psycopg.OperationalError:
            return None

    def representatives(self, acts: Iterable[str], events: Iterable[Event]) -> list[Cell]:
        """Return one cell for each statement, state of the journal, event and strategy.

        Its moment and its aftermath go round, so that each pair of them meets statements of every kind.
        """
        cells: dict[tuple[object, ...], Cell] = {}
        runs = {act: min((self._dry_run(act) for _ in range(2)), key=len) for act in acts}
        for event in events:
            moments = {Event.SILENT: [Moment.BEFORE], Event.STOPPED: [Moment.AFTER]}.get(event, list(Moment))
            turns = cycle(product(moments, THE_TWO))
            for act, steps in runs.items():
                if event is Event.STOPPED and act not in FREEZING:
                    continue
                # The last thing that pause does is to ask whether its freeze stands: it did.
                for step, state in steps[:-1] if (act in PAUSES and event is Event.STOPPED) else steps:
                    key = (step.text, state, event, {**PAUSES, **HOLDS}.get(act, self.strategy))
                    if not is_poll(step) and key not in cells:
                        cells[key] = Cell(act, step, *next(turns), event)
        return list(cells.values())

    def steps(self, act: str) -> list[Step]:
        """Return every statement that *act* sends when nothing happens to it, and nothing has to be tried twice."""
        return min(([step for step, _ in self._dry_run(act)] for _ in range(2)), key=len)

    def _dry_run(self, act: str) -> list[tuple[Step, str]]:
        """Return every statement that *act* sends, with the state of its freeze just before."""
        holder = f"{self.databases[0]} dry run {next(_numbers)}"
        if act not in FREEZING:
            self.pause(holder)
        self.proxy.reset()
        query = "SELECT coalesce((SELECT state FROM pgfreeze.freezes WHERE holder = %s), 'none')"
        self.proxy.observe = lambda: str(self.watch.execute(query, [holder]).fetchall()[0][0])
        self.warm.start(act, self.dsn, **self.options(act, holder, LONG))
        ended = self.warm.wait()
        self.proxy.observe = None
        assert ended.succeeded, ended
        self.resume(holder)
        return [(step, self.proxy.states[step]) for step in self.proxy.steps]

    def run(self, cell: Cell) -> Outcome:
        """Let it happen, and look at everything that must hold afterwards."""
        out = self.try_once(cell, SHORT)
        # On a machine that is busy with other things the short lease may end before the statement comes.
        return out if out.reached or out.problems else self.try_once(cell, 3 * SHORT)

    def try_once(self, cell: Cell, short: float) -> Outcome:
        out = Outcome(cell)
        lease = LONG if cell.aftermath is Aftermath.RESUME or self._needs_no_lease(cell) else short
        try:
            with ExitStack() as stack:
                self._run(cell, out, f"{self.databases[0]} {next(_numbers)}", lease, stack)
        except (core.FreezeError, psycopg.Error, TimeoutError) as error:
            out.problems.append(f"{type(error).__name__}: {error}")
        finally:
            if self.warm.pid:
                self.warm.signal(signal.SIGKILL)
                self.warm.wait()
            if out.problems:
                self.watch.execute("CALL pgfreeze.thaw(%s)", [self.databases[0]])
        return out

    def _run(self, cell: Cell, out: Outcome, holder: str, lease: float, stack: ExitStack) -> None:
        idle = stack.enter_context(self.server.connect_factory("app", self.databases[0])())
        self.proxy.reset()
        self.stopped = False
        if cell.act not in FREEZING:
            self.pause(holder, lease)
        self.proxy.trap(cell.step, cell.moment, self._spring(cell.event))
        self.warm.start(cell.act, self.dsn, **self.options(cell.act, holder, lease))
        if cell.event in HANGING:
            self._until(lambda: self.proxy.done.is_set() or self.warm.ended(), 10, "the step never came")
        else:
            out.ended = self.warm.wait()
        out.reached = self.proxy.sprung.is_set()
        if out.reached:
            self.proxy.done.wait(60)
        if not out.reached:
            out.ended = out.ended or self.warm.wait()
        if out.ended is not None:
            self._check_report(cell.act, out)
        reader = self.application()
        out.thawed_before = not self.holding()

        if cell.aftermath is Aftermath.RESUME:
            self.resume(holder)
        else:
            # What the process had sent before it died may yet be carried out. Where nothing is passed on, it is not.
            if cell.event is not Event.SILENT:
                self._until(self._settled, PATIENCE, "a session of the process never ended")
            over = self._guarded if cell.aftermath is Aftermath.GUARD else lambda: not self.open()
            within = LATE.total_seconds() + (0 if self._needs_no_lease(cell) else lease)
            self._until(over, within, "still frozen, although it should have thawed by itself")
        for _, whose, _, by, late in self.freezes():
            if whose == holder:
                out.thawed_by, out.late = by, max(late, timedelta(0))
        self._check_thawed(out, [session for session in (idle, reader) if session is not None])
        self._check_next(out, holder)
        self._check_block(out, holder)

    @staticmethod
    def _needs_no_lease(cell: Cell) -> bool:
        """Whether the server notices at once: what sessions hold goes with them."""
        return (
            cell.act in HOLDS
            and not named(HOLDS[cell.act]).outlives
            and cell.event not in (Event.SILENT, Event.STOPPED)
        )

    def _settled(self) -> bool:
        """Whether the sessions of the process have ended; those of one that stands still are there, and idle.

        But for the dead-man switch and what keeps its way clear, which wait for the freeze to begin.
        """
        query = """SELECT FROM pg_stat_activity WHERE pid = ANY (%s) AND application_name LIKE 'pg-freeze%%'
                     AND application_name !~ '^pg-freeze (dead-man|watch) ' AND (state = 'active' OR NOT %s)"""
        return not self.watch.execute(query, [self.proxy.backends_ever, self.stopped]).fetchall()

    def _guarded(self) -> bool:
        self.watch.execute("CALL pgfreeze.thaw_expired()")
        return not self.open()

    def _check_next(self, out: Outcome, holder: str) -> None:
        """The next pause works, and is not disturbed by what is left of the act under test."""
        if out.cell.act not in FREEZING:
            self._let_go_on(out)
        hung = out.ended is None
        token = str(self.pause(holder).token)
        self._let_go_on(out)
        if hung and out.cell.act in PAUSES and out.ended is not None and out.ended.succeeded:
            out.problems.append("reported a freeze that is gone")
        if [(row[0], row[2]) for row in self.open()] != [(token, "frozen")]:
            out.problems.append(f"the next freeze did not last: {self.freezes()[-2:]}")
        query = "SELECT voided_at FROM pgfreeze.tickets JOIN pgfreeze.freezes USING (ticket) "
        if self.watch.execute(query + "WHERE token = %s", [token]).fetchall() != [(None,)]:
            out.problems.append("the next freeze lost its ticket")
        self.resume(holder)
        self._check_thawed(out, [])

    def _let_go_on(self, out: Outcome) -> None:
        self.proxy.mend()
        if out.ended is None:
            self.warm.signal(signal.SIGCONT)
            out.ended = self.warm.wait()

    def _spring(self, event: Event) -> Callable[[], bool]:
        def killed() -> bool:
            self.warm.signal(signal.SIGKILL)
            return False

        def cut() -> bool:
            self.proxy.cut()
            return False

        def terminated() -> bool:
            with self.server.control() as conn:
                for pid in self.proxy.backends():
                    conn.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
            return True

        def silent() -> bool:
            self.proxy.black_hole()
            return True

        def stopped() -> bool:
            self.warm.signal(signal.SIGSTOP)
            self.stopped = True
            time.sleep(0.1)  # what it has sent is on its way
            return True

        def crashed() -> bool:
            self.server.stop("immediate")
            self.server.start()
            self.watch = self.server.control(self._journal())
            return True

        def both() -> bool:
            return killed() or not crashed()

        return {
            Event.KILLED: killed,
            Event.CUT: cut,
            Event.TERMINATED: terminated,
            Event.SILENT: silent,
            Event.STOPPED: stopped,
            Event.CRASHED: crashed,
            Event.BOTH: both,
        }[event]

    def _check_report(self, act: str, out: Outcome) -> None:
        """What the process said must be so: frozen, or not."""
        assert out.ended is not None
        holding = [row[2] for row in self.holding()]
        expired = self.freezes("lease_until <= clock_timestamp()")
        if out.ended.succeeded and act in (*PAUSES, "checkpoint") and holding != ["frozen"] and not expired:
            out.problems.append(f"{act} reported success, but the freeze is {self.freezes()[-1:]}")
        if out.ended.succeeded and act in ("resume", *HOLDS) and self.open():
            out.problems.append(f"{act} reported success, but the freeze is {self.open()}")
        if act in FREEZING and out.ended.error not in (None, "ThawFailed") and holding:
            out.problems.append(f"{act} said that it was undone ({out.ended}), but the freeze is {self.holding()}")

    def _check_block(self, out: Outcome, holder: str) -> None:
        """A block that was reported as done was frozen from its beginning to its end."""
        if out.cell.act not in HOLDS or out.ended is None or not out.ended.succeeded:
            return
        assert out.ended.returned is not None
        block = out.ended.returned
        query = """SELECT thawed_by, frozen_at < to_timestamp(%(entered)s) AND restoring_at > to_timestamp(%(left)s)
                     FROM pgfreeze.freezes WHERE holder = %(holder)s ORDER BY requested_at LIMIT 1"""
        stood = self.watch.execute(query, {**block, "holder": holder}).fetchone()
        if stood is None or not stood[1]:
            out.problems.append(f"reported a freeze that is gone: {stood}")
        query = "SELECT i FROM t WHERE at BETWEEN to_timestamp(%(entered)s) AND to_timestamp(%(left)s)"
        with self.server.connect_factory("app", self.databases[0])() as conn:
            written = conn.execute(query, block).fetchall()
        if written:
            out.problems.append(f"reported success, but the application wrote in the block: {written}")

    def _check_thawed(self, out: Outcome, sessions: list[psycopg.Connection[Any]]) -> None:
        if self.settings() != self.prior:
            out.problems.append(f"settings were {self.prior}, are {self.settings()}")
        if self.open() or self._active():
            out.problems.append(f"the journal is open: {self.open()}")
        fresh = self.application()
        if fresh is None:
            out.problems.append("the application cannot connect")
        for session in [*sessions, *([fresh] if fresh is not None else [])]:
            with session:
                try:
                    session.execute("INSERT INTO t VALUES (1)")
                except (psycopg.errors.ReadOnlySqlTransaction, psycopg.errors.InsufficientPrivilege) as error:
                    out.problems.append(f"a session cannot write: {error}")
                except psycopg.OperationalError:
                    if session is fresh:
                        out.problems.append("a new session was ended")

    def _active(self) -> bool:
        query = """SELECT FROM pgfreeze.frozen_databases b JOIN pg_database d ON d.oid = b.database
                    WHERE b.active AND d.datname = ANY (%s)"""
        return bool(self.watch.execute(query, [self.databases]).fetchall())

    @staticmethod
    def _until(done: Callable[[], bool], seconds: float, otherwise: str) -> None:
        began = time.monotonic()
        while not done():
            waited = time.monotonic() - began
            if waited > seconds:
                raise TimeoutError(otherwise)
            time.sleep(pause_after(waited))


class LaneInside(Lane):
    """One database, frozen by privileges: its journal is in it."""

    strategy = core.PRIVILEGES

    def __init__(self, server: Server, stack: ExitStack) -> None:
        super().__init__(server, stack)
        keep_private(server, self.databases[0])
        # In the name of others as well: what has no ACL yet, what the owner granted, and what rests on that.
        with server.connect_factory("app", self.databases[0])() as conn:
            conn.execute("CREATE SEQUENCE s")
            conn.execute("GRANT INSERT, UPDATE ON t TO app_owner WITH GRANT OPTION")
        with self.connect() as conn:
            conn.execute("SET ROLE app_owner")
            conn.execute("GRANT UPDATE ON t TO freezer")
        self.prior = self.settings()

    def _names(self) -> list[str]:
        return [f"crash_{next(_numbers)}"]

    def _journal(self) -> str:
        return self.databases[0]

    def settings(self) -> list[Any]:
        return [*super().settings(), *self.watch.execute(MEANINGS).fetchall()]

    def _guarded(self) -> bool:
        core.thaw_expired(self._outside, self._connect_to)
        return not self.open()


@contextmanager
def lanes(server: Server, number: int, kind: type[Lane] = Lane) -> Iterator[list[Lane]]:
    with ExitStack() as stack:
        core.install(server.connect_factory())
        # Who locks a table needs a right on it, and who revokes one must act for its owner.
        server.execute("GRANT app TO freezer")
        stack.callback(server.execute, "REVOKE app FROM freezer")
        yield [kind(server, stack) for _ in range(number)]


def run(all_lanes: list[Lane], cells: list[Cell]) -> list[Outcome]:
    """Run cells, as many at a time as there are lanes."""
    free: SimpleQueue[Lane] = SimpleQueue()
    for lane in all_lanes:
        free.put(lane)

    def one(cell: Cell) -> Outcome:
        lane = free.get()
        try:
            return lane.run(cell)
        finally:
            free.put(lane)

    with ThreadPoolExecutor(len(all_lanes)) as pool:
        return list(pool.map(one, cells))


def check(outcomes: list[Outcome]) -> None:
    wrong = [str(outcome) for outcome in outcomes if outcome.problems]
    assert not wrong, "\n".join(wrong)
    # A poll may come fewer times than in the dry run; everything else must have been reached.
    missed = [str(outcome) for outcome in outcomes if not outcome.reached and not is_poll(outcome.cell.step)]
    assert not missed, "\n".join(missed)
