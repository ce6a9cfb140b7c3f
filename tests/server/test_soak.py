"""Everybody at once: attempts to pause by the same and by different holders, resumes, kills, and writers all the time.

Runs for SOAK_SECONDS (10 by default); SOAK_SEED repeats what is random, though not how the processes interleave.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, LiteralString

import psycopg
import pytest

import pg_freeze as core
from devtools.pgserver import Server
from devtools.rights import create_application_database
from devtools.warm import Ended, Warm
from tests.server.clients import alter, settings_of, wait_until

pytestmark = pytest.mark.pg("!=15,!=16,!=17")

SECONDS: Final = float(os.environ.get("SOAK_SECONDS") or 10)
SEED: Final = int(os.environ.get("SOAK_SEED") or time.time())
HOLDERS: Final = ("anna", "bert")

# One statement, and so one moment: the catalogs say what the journal says.
_AGREES: Final[LiteralString] = """
    SELECT (SELECT count(*) FROM pgfreeze.frozen_databases b JOIN pg_database d ON d.oid = b.database
             WHERE b.active AND d.datname = 'app_db'),
           (SELECT count(*) FROM pgfreeze.freezes WHERE state IN ('draining', 'frozen')),
           (SELECT count(*) FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase
             WHERE d.datname = 'app_db' AND s.setrole = 0
               AND 'default_transaction_read_only=on' = ANY (s.setconfig))"""
# A commit between the moment a freeze said that it stood and the moment its thaw began.
_VIOLATIONS: Final[LiteralString] = """
    SELECT f.token, f.frozen_at, w.committed_at, f.restoring_at
      FROM pgfreeze.freezes f, unnest(%s::timestamptz[]) AS w (committed_at)
     WHERE w.committed_at > f.frozen_at AND w.committed_at < f.restoring_at"""
_OVERLAPS: Final[LiteralString] = """
    SELECT one.token, other.token FROM pgfreeze.freezes one, pgfreeze.freezes other
     WHERE one.token < other.token
       AND tstzrange(one.changed_at, one.restoring_at) && tstzrange(other.changed_at, other.restoring_at)"""


@dataclass
class Soak:
    server: Server
    until: float = field(default_factory=lambda: time.monotonic() + SECONDS)
    reported: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    killed: int = 0
    written: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def going(self) -> bool:
        return time.monotonic() < self.until

    def act(self, warm: Warm, chance: random.Random, name: str, **options: Any) -> Ended:
        """Run one act in a process of its own, and kill that with some probability at a random time."""
        warm.start(name, self.server.dsn("postgres", "freezer"), databases=["app_db"], **options)
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0, 0.2))
            warm.signal(signal.SIGKILL)
        ended = warm.wait()
        with self.lock:
            self.killed += not ended.succeeded and ended.error is None
            if ended.error is not None:
                self.errors.append(f"{name}: {ended.error}")
        return ended

    def pauser(self, seed: int, whose: Callable[[random.Random], str]) -> None:
        chance = random.Random(seed)
        with Warm() as warm:
            while self.going():
                holder = whose(chance)
                ended = self.act(warm, chance, "pause", holder=holder, lease=2, drain_timeout=0.5)
                if ended.returned is not None:
                    with self.lock:
                        self.reported.append(ended.returned)
                    time.sleep(chance.uniform(0, 0.3))
                if chance.random() < 0.7:
                    self.act(warm, chance, "resume", holder=holder)
                time.sleep(chance.uniform(0, 0.3))

    def resumer(self, seed: int) -> None:
        chance = random.Random(seed)
        with Warm() as warm:
            while self.going():
                time.sleep(chance.uniform(0, 0.6))
                self.act(warm, chance, "resume", holder=chance.choice(HOLDERS), force=chance.random() < 0.3)

    def writer(self) -> None:
        while self.going():
            with suppress(psycopg.OperationalError), self.server.connect_factory("app", "app_db")() as conn:
                self._write(conn)
            time.sleep(0.02)

    def _write(self, conn: "psycopg.Connection[Any]") -> None:
        while self.going():
            try:
                with conn.transaction():
                    conn.execute("INSERT INTO written DEFAULT VALUES")
                    time.sleep(0.01)
                self.written += 1
            except psycopg.errors.ReadOnlySqlTransaction:
                time.sleep(0.03)

    def checker(self) -> None:
        with self.server.control() as conn:
            while self.going():
                row = conn.execute(_AGREES).fetchone()
                assert row is not None
                active, holding, read_only = row
                if active > 1 or not active == holding == read_only:
                    self.wrong.append(f"{active} databases frozen, {holding} freezes, read-only: {read_only}")
                time.sleep(0.02)


@pytest.fixture
def soak(server_factory) -> Soak:
    server = server_factory(settings={"track_commit_timestamp": True})
    create_application_database(server, "app_db")
    alter(server, "ALTER DATABASE {} SET work_mem = '5MB'", "app_db")
    alter(server, "ALTER ROLE freezer IN DATABASE {} SET default_transaction_read_only = off", "app_db")
    with server.connect_factory("app", "app_db")() as conn:
        conn.execute("CREATE TABLE written (i int)")
    core.install(server.connect_factory())
    return Soak(server)


@pytest.mark.timeout(SECONDS + 180)
def test_whoever_races_whom_there_is_one_freeze_at_a_time_and_nobody_writes_into_it(soak):
    print(f"SOAK_SEED={SEED}")
    server = soak.server
    prior = settings_of(server)
    actors: list[Callable[[], None]] = [
        lambda: soak.pauser(SEED, lambda _: "anna"),
        lambda: soak.pauser(SEED + 1, lambda chance: chance.choice(HOLDERS)),
        lambda: soak.resumer(SEED + 2),
        soak.checker,
        *[soak.writer] * 3,
    ]
    with ThreadPoolExecutor(len(actors)) as pool:
        for done in [pool.submit(actor) for actor in actors]:
            done.result()

    # Nobody comes to clear up: what is frozen now thaws when its lease ends.
    wait_until(lambda: not core.status(server.connect_factory()).freezes)
    assert settings_of(server) == prior
    assert soak.wrong == []
    assert set(soak.errors) <= {"pause: LeaseLost", "pause: Overtaken", "pause: FreezeRefused"}
    commits = server.execute("SELECT pg_xact_commit_timestamp(xmin) FROM written", "app_db")
    with server.control() as conn:
        assert conn.execute(_VIOLATIONS, [[at for (at,) in commits]]).fetchall() == []
        assert conn.execute(_OVERLAPS).fetchall() == []
        rows = conn.execute("SELECT token::text, frozen_at FROM pgfreeze.freezes").fetchall()
    frozen = {token: core.model.iso(at) for token, at in rows}
    assert [one for one in soak.reported if frozen[one["token"]] != one["frozen_at"]] == []
    assert soak.reported, "no pause succeeded: nothing was tested"
    assert soak.written, "nothing was written: nothing was tested"
    assert soak.killed, "nothing was killed: nothing was tested"
    print(f"{len(frozen)} freezes, {len(soak.reported)} reported, {soak.killed} kills, {len(commits)} commits")
