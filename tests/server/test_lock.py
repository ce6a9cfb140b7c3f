"""The strategy lock: writers wait, readers go on, nobody is ended, and nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from devtools.asking import frozen, pause
from devtools.pgserver import Server
from devtools.rights import checkpointer
from pg_freeze import Connect, ConnectTo, DrainTimeout, FreezeRefused, LeaseLost, history, resume

pytestmark = pytest.mark.every_version

SHORT = {"lease": timedelta(seconds=60), "drain_timeout": timedelta(seconds=5)}


@pytest.fixture
def connect(server: Server) -> Connect:
    return server.connect_factory(checkpointer(server.version))


@pytest.fixture
def connect_to_database(server: Server, app_database: str) -> ConnectTo:
    server.execute("GRANT app TO freezer")
    return lambda name: psycopg.connect(server.dsn(name, "freezer"), autocommit=True)


@pytest.fixture
def table(app_connect: Callable[..., psycopg.Connection[Any]], app_database: str) -> str:
    conn = app_connect(app_database)
    conn.execute("CREATE TABLE things (id serial PRIMARY KEY, name text)")
    conn.execute("CREATE TABLE others (id serial PRIMARY KEY, name text)")
    return "things"


def test_writers_wait_and_readers_go_on(connect, connect_to_database, app_connect, app_database, table):
    writer, reader = app_connect(app_database), app_connect(app_database)
    done: list[float] = []

    def write() -> None:
        writer.execute(f"INSERT INTO {table} (name) VALUES ('waited')")
        done.append(time.monotonic())

    with frozen(connect, connect_to_database, databases=[app_database], holder="locker", **SHORT) as hold:
        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(0.3)
        assert reader.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
        assert not done
        assert hold.freeze.strategy == "lock"
        assert hold.freeze.checkpoint_lsn
        released = time.monotonic()
    thread.join(5)

    assert done
    assert done[0] >= released
    assert writer.info.backend_pid in {
        row[0] for row in reader.execute("SELECT pid FROM pg_stat_activity").fetchall()
    }, "nobody is ended"
    (freeze,) = history(connect, limit=1)
    assert (freeze.state, freeze.strategy) == ("thawed", "lock")
    assert hold.attestation is not None
    assert hold.attestation.violations == ()
    assert hold.attestation.level == "quiesced"


def test_an_open_transaction_is_waited_for_while_everybody_else_works(
    connect, connect_to_database, app_connect, app_database, table
):
    slow, fast = app_connect(app_database), app_connect(app_database)
    slow.execute("BEGIN")
    slow.execute("INSERT INTO others (name) VALUES ('slow')")
    threading.Timer(2.0, lambda: slow.execute("COMMIT")).start()
    gaps: list[float] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            start = time.monotonic()
            fast.execute(f"INSERT INTO {table} (name) VALUES ('fast')")
            gaps.append(time.monotonic() - start)
            time.sleep(0.01)

    thread = threading.Thread(target=write)
    thread.start()
    with frozen(connect, connect_to_database, databases=[app_database], holder="locker", **SHORT):
        pass
    stop.set()
    thread.join(5)
    assert len(gaps) > 5
    assert max(gaps) < 1.5


def test_at_the_drain_timeout_it_gives_up_or_ends_whoever_is_in_the_way(
    connect, connect_to_database, app_connect, app_database, table
):
    slow = app_connect(app_database, application_name="in the way")
    slow.execute("BEGIN")
    slow.execute("INSERT INTO others (name) VALUES ('slow')")
    options = {"lease": timedelta(seconds=30), "drain_timeout": timedelta(seconds=1), "databases": [app_database]}
    with (
        pytest.raises(DrainTimeout, match="in the way") as caught,
        frozen(connect, connect_to_database, holder="locker", on_drain_timeout="abort", **options),
    ):
        raise AssertionError("must not be entered")
    assert [backend.application for backend in caught.value.backends] == ["in the way"]
    slow.execute("SELECT 1")
    with frozen(connect, connect_to_database, holder="locker", on_drain_timeout="terminate", **options):
        with pytest.raises(psycopg.OperationalError):
            slow.execute("SELECT 1")


def test_a_holder_that_dies_releases_everything_and_the_journal_is_closed(
    connect, connect_to_database, server, app_connect, app_database, table
):
    sessions: list[psycopg.Connection[Any]] = []

    def remembered(name: str) -> psycopg.Connection[Any]:
        sessions.append(connect_to_database(name))
        return sessions[-1]

    with (
        pytest.raises(LeaseLost),
        frozen(connect, remembered, databases=[app_database], holder="locker", **SHORT),
    ):
        for session in (one for one in sessions if not one.closed):
            server.execute(f"SELECT pg_terminate_backend({session.info.backend_pid})")
        app_connect(app_database).execute(f"INSERT INTO {table} (name) VALUES ('early')")
    # The next one does not wait for anything.
    with frozen(connect, connect_to_database, databases=[app_database], holder="another", **SHORT):
        pass


def test_the_server_ends_the_locks_when_the_lease_ends(connect, connect_to_database, app_connect, app_database, table):
    with (
        pytest.raises(LeaseLost),
        frozen(
            connect,
            connect_to_database,
            databases=[app_database],
            holder="locker",
            lease=timedelta(seconds=1),
            drain_timeout=timedelta(milliseconds=500),
        ),
    ):
        app_connect(app_database).execute(f"INSERT INTO {table} (name) VALUES ('after the lease')")


def test_others_are_refused_and_a_resume_releases_the_locks(
    connect, connect_to_database, app_connect, app_database, table
):
    with (
        pytest.raises(LeaseLost),
        frozen(connect, connect_to_database, databases=[app_database], holder="locker", **SHORT),
    ):
        with pytest.raises(FreezeRefused, match="held by 'locker'"):
            pause(connect, databases=[app_database], holder="another")
        with (
            pytest.raises(FreezeRefused, match="held by 'locker'"),
            frozen(connect, connect_to_database, databases=[app_database], holder="another", **SHORT),
        ):
            raise AssertionError("must not be entered")
        resume(connect, databases=[app_database], holder="locker")
        app_connect(app_database).execute(f"INSERT INTO {table} (name) VALUES ('resumed')")


def test_partitions_odd_names_and_many_tables_are_covered(connect, connect_to_database, app_connect, app_database):
    app = app_connect(app_database)
    app.execute("CREATE TABLE parts (id integer) PARTITION BY RANGE (id)")
    app.execute("CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10)")
    app.execute('CREATE TABLE "%s ünïcode ""quoted""" (id integer)')
    app.execute("CREATE UNLOGGED TABLE unlogged (id integer)")
    with frozen(connect, connect_to_database, databases=[app_database], holder="locker", **SHORT):
        for table in ("parts", "parts_1", '"%s ünïcode ""quoted"""', "unlogged"):
            writer = app_connect(app_database)
            writer.execute("SET lock_timeout = '100ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                writer.execute(f"INSERT INTO {table} VALUES (1)")


def test_the_application_is_never_the_victim_of_a_deadlock(
    connect, connect_to_database, app_connect, app_database, table
):
    """Clients lock two tables in both orders, so that any lock held while another is waited for would deadlock."""
    stop = threading.Event()
    errors: list[Exception] = []
    committed = [0]

    def client(first: str, second: str) -> None:
        conn = app_connect(app_database)
        while not stop.is_set():
            try:
                with conn.transaction():
                    conn.execute(f"INSERT INTO {first} (name) VALUES ('a')")
                    time.sleep(0.005)
                    conn.execute(f"INSERT INTO {second} (name) VALUES ('b')")
                committed[0] += 1
                time.sleep(0.05)
            except psycopg.Error as error:
                errors.append(error)
                return

    threads = [
        threading.Thread(target=client, args=order) for order in [("things", "others"), ("others", "things")] * 4
    ]
    for thread in threads:
        thread.start()
    for _ in range(5):
        with frozen(
            connect,
            connect_to_database,
            databases=[app_database],
            holder="locker",
            drain_timeout=timedelta(seconds=60),
            on_drain_timeout="abort",
        ):
            time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert errors == []
    assert committed[0] > 10
