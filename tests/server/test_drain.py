"""Draining: who is ended, when, and who is not."""

import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

import psycopg
import pytest
from psycopg import sql

from devtools.asking import pause
from pg_freeze import DrainTimeout, Fate, LeaseLost, lingering_of, resume, status
from tests.server.clients import SECONDS, background, is_alive, is_read_only, ms, wait_until

pytestmark = pytest.mark.every_version


def test_idle_sessions_are_ended_at_once(connect, app_database, app_connect):
    idle = [app_connect(app_database) for _ in range(20)]

    frozen = pause(connect, databases=[app_database], holder="test")

    assert dict(frozen.terminated) == {"idle": 20}
    assert not any(map(is_alive, idle))


def test_a_client_that_never_idles_is_drained_when_its_open_transaction_ends(connect, app_database, busy_client):
    with busy_client(app_database, transaction=SECONDS[1]) as client:
        frozen = pause(connect, databases=[app_database], holder="test", drain_timeout=SECONDS[30])
        wait_until(lambda: client.refused)

    assert frozen.drained_at - frozen.barrier_at < SECONDS[3]
    assert "drain-timeout" not in frozen.terminated
    assert client.commits_after(frozen.barrier_at) >= 1, "the transaction that was open at the barrier committed"
    assert client.commits_after(frozen.drained_at) == 0


def test_a_client_with_short_transactions_and_no_pause_between_is_drained_at_once(connect, app_database, busy_client):
    with busy_client(app_database, transaction=ms(5)) as client:
        frozen = pause(connect, databases=[app_database], holder="test")
        wait_until(lambda: client.refused)

    assert frozen.drained_at - frozen.barrier_at < SECONDS[2]
    assert client.commits_after(frozen.drained_at) == 0


def test_nothing_that_a_transaction_wrote_before_the_barrier_is_lost_when_it_ends_in_time(
    connect, app_database, app_connect
):
    writer = app_connect(app_database)
    writer.execute("CREATE TABLE t (i int)")
    writer.execute("BEGIN; INSERT INTO t VALUES (1)")

    def end_after_a_while(progress):
        if progress.elapsed > ms(300) and not writer.closed and writer.info.transaction_status.name == "INTRANS":
            writer.execute("INSERT INTO t VALUES (2); COMMIT")

    frozen = pause(connect, databases=[app_database], holder="test", progress=end_after_a_while)

    assert dict(frozen.terminated) == {"idle": 1}
    assert app_connect(app_database).execute("SELECT i FROM t ORDER BY i").fetchall() == [(1,), (2,)]


def test_progress_tells_who_is_left_and_how_much_time(connect, app_database, app_connect):
    writer = app_connect(app_database)
    writer.execute("BEGIN")
    told = []

    pause(connect, databases=[app_database], holder="test", drain_timeout=ms(500), progress=told.append)

    assert [backend.pid for backend in told[0].lingering] == [writer.info.backend_pid]
    assert told[-1].lingering == ()
    assert told[0].remaining > told[-1].remaining == timedelta(0)


def test_an_aborted_transaction_is_ended_at_once(connect, app_database, app_connect):
    aborted = app_connect(app_database)
    aborted.execute("BEGIN")
    with pytest.raises(psycopg.errors.DivisionByZero):
        aborted.execute("SELECT 1/0")

    frozen = pause(connect, databases=[app_database], holder="test")

    assert dict(frozen.terminated) == {"idle": 1}
    assert frozen.drained_at - frozen.barrier_at < SECONDS[2]


def test_a_session_without_activity_tracking_is_ended_when_idle_and_awaited_when_in_a_transaction(
    connect, server, app_database, app_connect
):
    sessions = [app_connect(app_database), app_connect(app_database)]
    server.execute("ALTER ROLE app SET track_activities = off")
    try:
        hidden = [app_connect(app_database), app_connect(app_database)]
    finally:
        server.execute("ALTER ROLE app RESET track_activities")
    hidden[0].execute("CREATE TABLE t ()")
    hidden[1].execute("BEGIN; INSERT INTO t DEFAULT VALUES")
    seen = []

    def look(progress):
        seen.append({backend.pid: backend.state for backend in progress.lingering})
        if progress.elapsed > ms(500) and hidden[1].info.transaction_status.name == "INTRANS":
            hidden[1].execute("COMMIT")

    pid = hidden[1].info.backend_pid
    frozen = pause(connect, databases=[app_database], holder="test", progress=look)

    assert frozen.drained_at - frozen.barrier_at >= ms(500)
    assert {pid: "disabled"} in seen
    assert not any(map(is_alive, sessions + hidden))
    assert app_connect(app_database).execute("SELECT count(*) FROM t").fetchone() == (1,)


def test_a_session_that_is_still_starting_at_the_barrier_cannot_write_once_frozen(connect, server, app_database):
    # post_auth_delay: it has read that it may write, and is not in pg_stat_activity yet.
    dsn = server.dsn(app_database, "app", options="-c post_auth_delay=2")

    with background(lambda: psycopg.connect(dsn, autocommit=True)) as starting:
        time.sleep(0.7)
        pause(connect, databases=[app_database], holder="test")
        # It may as well be refused, or ended before it has begun.
        with suppress(psycopg.OperationalError), starting.result(10) as conn:
            assert not is_alive(conn) or is_read_only(conn)


@contextmanager
def starting_for_long(server, database, user):
    """A client that takes 60 s to start, as every client may choose to; yields what becomes of it."""
    dsn = server.dsn(database, user, options="-c post_auth_delay=60")
    with background(lambda: psycopg.connect(dsn, autocommit=True)) as client:
        (pid,) = wait_until(lambda: [pid for (pid,) in server.execute("SELECT pid FROM pgfreeze.starting")])
        try:
            yield pid, client
        finally:
            server.execute(f"SELECT pg_terminate_backend({pid})".encode())
            with suppress(psycopg.OperationalError):
                client.result(30).close()


def test_a_session_that_takes_its_time_to_start_is_ended_at_once_and_keeps_no_drain_waiting(
    connect, server, app_database
):
    with starting_for_long(server, app_database, "app") as (_, client):
        frozen = pause(connect, databases=[app_database], holder="test", drain_timeout=SECONDS[50])
        assert frozen.drained_at - frozen.barrier_at < SECONDS[40]
        assert frozen.terminated == {"idle": 1}
        with suppress(psycopg.OperationalError):  # it may hear of it only when it has started
            assert not is_alive(client.result(30))


def test_one_that_may_not_be_ended_is_named_by_status_and_in_the_error(connect, server, app_database):
    with starting_for_long(server, app_database, "postgres") as (pid, _):
        seen = []
        with pytest.raises(
            DrainTimeout, match=f"pid {pid} of '{app_database}' .* has not finished starting"
        ) as timeout:
            pause(
                connect,
                databases=[app_database],
                holder="test",
                drain_timeout=ms(500),
                on_drain_timeout="abort",
                progress=lambda _: seen.append([one.pid for one in status(connect).backends]),
            )
    assert [backend.pid for backend in timeout.value.backends] == [pid]
    assert seen[0] == [pid]


def test_clients_that_connect_over_and_over_after_the_barrier_keep_no_drain_waiting(connect, server, app_database):
    dsn = server.dsn(app_database, "app", options="-c post_auth_delay=2")
    over = threading.Event()

    def come_and_go():
        while not over.is_set():
            with suppress(psycopg.OperationalError):
                psycopg.connect(dsn).close()

    clients = [threading.Thread(target=come_and_go, daemon=True) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        wait_until(lambda: server.execute("SELECT pid FROM pgfreeze.starting"))
        frozen = pause(connect, databases=[app_database], holder="test", admit="readers", drain_timeout=SECONDS[50])
    finally:
        over.set()
        for client in clients:
            client.join(30)
    assert frozen.drained_at - frozen.barrier_at < SECONDS[40]


def test_a_session_that_does_not_go_although_terminated_makes_the_pause_fail_and_thaw(
    connect, server, app_database, app_connect
):
    stopped = app_connect(app_database)
    os.kill(stopped.info.backend_pid, signal.SIGSTOP)
    try:
        with pytest.raises(DrainTimeout) as timeout:
            pause(connect, databases=[app_database], holder="test", drain_timeout=ms(100))
    finally:
        os.kill(stopped.info.backend_pid, signal.SIGCONT)

    assert [backend.pid for backend in timeout.value.backends] == [stopped.info.backend_pid]
    app_connect(app_database).execute("CREATE TABLE t ()")


def test_a_streaming_walsender_survives(connect, server, app_database, super_connect):
    with logical_slot(server, app_database) as slot, replication(server, app_database) as walsender:
        pid = walsender.info.backend_pid
        start_streaming(walsender, slot)
        wait_until(lambda: streaming(server, pid))

        frozen = pause(connect, databases=[app_database], holder="test")

        assert (frozen.lingering, dict(frozen.terminated)) == ((), {})
        assert streaming(server, pid)
        resume(connect, databases=[app_database], holder="test")
        assert streaming(server, pid)


def test_a_replication_connection_that_runs_plain_sql_does_not_survive(connect, server, app_database):
    with replication(server, app_database) as conn:
        conn.execute("CREATE TABLE t ()")

        frozen = pause(connect, databases=[app_database], holder="test")

        assert not is_alive(conn)
        assert dict(frozen.terminated) == {"idle": 1}


class logical_slot:  # noqa: N801 - reads as a context
    def __init__(self, server, database):
        self.server, self.database, self.name = server, database, f"slot_of_{database}"

    def __enter__(self):
        self.server.execute(
            sql.SQL("SELECT pg_create_logical_replication_slot({}, 'test_decoding')").format(sql.Literal(self.name)),
            self.database,
        )
        return self.name

    def __exit__(self, *error):
        """The slot goes with its database."""


class replication:  # noqa: N801 - reads as a context
    """A connection of role app that speaks the replication protocol, and so SQL too."""

    def __init__(self, server, database):
        self.server = server
        server.execute("ALTER ROLE app REPLICATION")
        self.conn = psycopg.connect(server.dsn(database, "app", replication="database"), autocommit=True)

    def __enter__(self):
        return self.conn

    def __exit__(self, *error):
        self.conn.close()
        self.server.execute("ALTER ROLE app NOREPLICATION")


def start_streaming(conn, slot):
    conn.pgconn.send_query(f'START_REPLICATION SLOT "{slot}" LOGICAL 0/0'.encode())
    while conn.pgconn.flush():
        time.sleep(0.001)


def streaming(server, pid):
    return server.execute(
        sql.SQL("SELECT true FROM pg_stat_replication WHERE pid = {} AND state IN ('streaming', 'catchup')").format(
            sql.Literal(pid)
        )
    )


def test_when_sessions_states_are_hidden_everybody_counts_as_lingering(
    own_server, connect_to, new_database, app_connect
):
    database = new_database(own_server)
    connect = connect_to(own_server)
    pause(connect, databases=[database], holder="test")
    reader = app_connect(database, server=own_server)
    assert lingering_of(connect, databases=[database], holder="test") == ()

    own_server.execute("REVOKE pg_read_all_stats FROM freezer")

    (hidden,) = lingering_of(connect, databases=[database], holder="test")
    assert (hidden.pid, hidden.state, hidden.backend_type, hidden.backend_start) == (
        reader.info.backend_pid,
        None,
        None,
        None,
    )
    assert hidden.fate is Fate.WAITS
    assert status(connect, databases=[database]).backends == (hidden,)


def test_parallel_workers_belong_to_their_leader(connect, server, app_database, app_connect):
    leader = app_connect(app_database)
    leader.execute("CREATE TABLE t AS SELECT g AS i FROM generate_series(1, 3000) g")
    leader.execute("ALTER TABLE t SET (parallel_workers = 2)")
    for setting in ("parallel_setup_cost = 0", "parallel_tuple_cost = 0", "min_parallel_table_scan_size = 0"):
        leader.execute(sql.SQL("SET " + setting))
    workers = sql.SQL("SELECT count(*) FROM pg_stat_activity WHERE datname = {} AND backend_type = 'parallel worker'")
    polls = []

    slow = "SELECT count(*) FROM t WHERE pg_sleep(0.0005 * (i % 2)) IS NOT NULL"
    with background(lambda: leader.execute(slow).fetchone()) as answer:
        wait_until(lambda: server.execute(workers.format(sql.Literal(app_database)))[0][0])
        frozen = pause(connect, databases=[app_database], holder="test", progress=polls.append)
        assert answer.result(10) == (3000,)

    assert {backend.backend_type for poll in polls for backend in poll.lingering} == {"client backend"}
    assert dict(frozen.terminated) == {"idle": 1}


def test_an_autovacuum_worker_neither_hinders_the_drain_nor_is_ended_by_it(
    server_factory, connect_to, new_database, app_connect
):
    server = server_factory(settings={"autovacuum_naptime": 1})
    database = new_database(server)
    # Closed, for a session may keep to itself what it did last: autovacuum would not hear of it.
    with app_connect(database, server=server) as owner:
        owner.execute(
            "CREATE TABLE t WITH (autovacuum_vacuum_threshold = 1, autovacuum_vacuum_cost_delay = 50,"
            " autovacuum_vacuum_cost_limit = 1) AS SELECT g AS i FROM generate_series(1, 50000) g"
        )
        owner.execute("UPDATE t SET i = 0")
    running = sql.SQL(
        "SELECT pid FROM pg_stat_activity"
        " WHERE datname = {} AND backend_type = 'autovacuum worker' AND query LIKE '%.t'"
    ).format(sql.Literal(database))
    wait_until(lambda: server.execute(running), within=60)

    frozen = pause(connect_to(server), databases=[database], holder="test")

    assert frozen.drained_at - frozen.barrier_at < SECONDS[3]
    assert frozen.lingering == ()
    assert server.execute(running)


def test_nobody_is_ended_after_somebody_thawed_during_the_drain(connect, app_database, app_connect, server):
    writer = app_connect(app_database)
    writer.execute("BEGIN; CREATE TABLE t ()")
    newcomers = []

    def thaw_then_connect(progress):
        if not newcomers:
            server.execute(sql.SQL("CALL pgfreeze.thaw({})").format(sql.Literal(app_database)))
            newcomers.append(app_connect(app_database))

    with pytest.raises(LeaseLost):
        pause(connect, databases=[app_database], holder="test", progress=thaw_then_connect, drain_timeout=SECONDS[5])

    assert is_alive(newcomers[0])
    writer.execute("COMMIT")
    assert app_connect(app_database).execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_a_drain_stops_when_the_lease_ends_before_it(connect, app_database, app_connect):
    # The dead-man switch thaws; a client that sleeps that long between two polls must notice.
    writer = app_connect(app_database)
    writer.execute("BEGIN; CREATE TABLE t ()")
    slept = []

    def dawdle(progress):
        if not slept:
            slept.append(time.sleep(2.2))

    with pytest.raises(LeaseLost):
        pause(
            connect,
            databases=[app_database],
            holder="test",
            lease=SECONDS[2],
            drain_timeout=SECONDS[1],
            progress=dawdle,
        )

    writer.execute("COMMIT")


def test_a_superusers_idle_session_is_not_waited_for(connect, app_database, super_connect):
    admin = super_connect(app_database)

    frozen = pause(connect, databases=[app_database], holder="test", drain_timeout=SECONDS[20])

    assert frozen.drained_at - frozen.barrier_at < SECONDS[2]
    (left,) = frozen.lingering
    assert (left["pid"], left["fate"]) == (admin.info.backend_pid, "superuser")
    assert "superuser-session" in {warning["code"] for warning in frozen.warnings}
    assert is_alive(admin)
    resume(connect, databases=[app_database], holder="test")
    assert is_alive(admin)


def test_a_superusers_open_transaction_is_awaited_until_it_ends(connect, app_database, super_connect):
    admin = super_connect(app_database)
    admin.execute("BEGIN; CREATE TABLE t ()")

    def commit(progress):
        if progress.elapsed > ms(400) and admin.info.transaction_status.name == "INTRANS":
            admin.execute("COMMIT")

    frozen = pause(connect, databases=[app_database], holder="test", progress=commit)

    assert ms(400) < frozen.drained_at - frozen.barrier_at < SECONDS[3]


def test_a_superusers_open_transaction_is_awaited_to_the_timeout_and_then_reported(
    connect, app_database, super_connect
):
    admin = super_connect(app_database)
    admin.execute("BEGIN; CREATE TABLE t ()")

    frozen = pause(connect, databases=[app_database], holder="test", drain_timeout=ms(500))

    assert frozen.drained_at - frozen.barrier_at >= ms(500)
    assert [left["pid"] for left in frozen.lingering] == [admin.info.backend_pid]


def test_with_abort_a_superusers_open_transaction_undoes_the_freeze(connect, app_database, app_connect, super_connect):
    admin = super_connect(app_database)
    admin.execute("BEGIN; CREATE TABLE t ()")

    with pytest.raises(DrainTimeout) as timeout:
        pause(connect, databases=[app_database], holder="test", drain_timeout=ms(300), on_drain_timeout="abort")

    assert [backend.pid for backend in timeout.value.backends] == [admin.info.backend_pid]
    app_connect(app_database).execute("CREATE TABLE u ()")


def test_a_superuser_who_freezes_ends_superusers_sessions_too(server, app_database, super_connect):
    admin = super_connect(app_database)

    frozen = pause(server.connect_factory("postgres"), databases=[app_database], holder="test")

    assert dict(frozen.terminated) == {"idle": 1}
    assert frozen.lingering == ()
    assert not is_alive(admin)


def test_many_idle_sessions_are_drained_within_moments(connect, app_database, app_connect):
    sessions = [app_connect(app_database) for _ in range(150)]

    frozen = pause(connect, databases=[app_database], holder="test")

    assert dict(frozen.terminated) == {"idle": len(sessions)}
    assert frozen.drained_at - frozen.barrier_at < SECONDS[5]
