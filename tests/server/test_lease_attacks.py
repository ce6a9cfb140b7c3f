"""What roles with documented rights try against the lease: cancels, turns, posing as a thaw, locks on what it needs."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg import sql

from devtools.asking import pause
from devtools.pgserver import Server
from pg_freeze import FreezeError, State, ThawFailed, history, resume, status
from tests.server.clients import SECONDS, alter, is_alive, settings_of, wait_until
from tests.server.names import SCHEMA

OVERDUE = f"UPDATE {SCHEMA}.freezes SET lease_until = clock_timestamp() WHERE state <> 'thawed'"


def thawed(connect):
    (last,) = history(connect, limit=1)
    return last if last.state is State.THAWED else None


def ours(server: Server, token: Any) -> list[tuple[Any, ...]]:
    """The dead-man switch of a freeze and its watch."""
    return server.execute(
        sql.SQL(
            "SELECT pid, application_name FROM pg_stat_activity "
            "WHERE application_name IN ('pg-freeze dead-man ' || {0}, 'pg-freeze watch ' || {0}) ORDER BY 2"
        ).format(sql.Literal(str(token)))
    )


@pytest.mark.every_version
def test_a_cancel_ends_neither_the_dead_man_switch_nor_its_watch(own_server, connect_to, new_database, app_connect):
    server, connect, database = own_server, connect_to(own_server), new_database(own_server)
    before = settings_of(server)
    server.create_role("janitor")
    server.execute("GRANT pg_signal_backend TO janitor")
    janitor = app_connect("postgres", "janitor", server=server)
    freeze = pause(connect, databases=[database], holder="test", admit="readers")
    there = ours(server, freeze.token)
    assert len(there) == 2

    for _ in range(20):
        for pid, _ in there:
            assert janitor.execute("SELECT pg_cancel_backend(%s)", (pid,)).fetchone() == (True,)
        time.sleep(0.05)

    assert ours(server, freeze.token) == there
    server.execute(OVERDUE)
    assert wait_until(lambda: thawed(connect)).thawed_by == "lease ended"
    assert settings_of(server) == before
    wait_until(lambda: not ours(server, freeze.token))


def test_a_watch_that_is_cancelled_while_somebody_is_in_the_way_ends_him_all_the_same(
    own_server, connect_to, new_database, super_connect
):
    server, connect, database = own_server, connect_to(own_server), new_database(own_server)
    freeze = pause(connect, databases=[database], holder="test", admit="readers")
    there = ours(server, freeze.token)
    server.execute("GRANT app_owner TO app")
    with server.connect_factory("app", database)() as blocker:
        changing(blocker, database)
        server.execute(OVERDUE)
        for _ in range(8):
            for pid, _ in there:
                server.execute(f"SELECT pg_cancel_backend({pid})")
            time.sleep(0.1)
        wait_until(lambda: thawed(connect), within=20)
        assert not is_alive(blocker)


def test_once_its_switch_was_terminated_status_says_that_none_watches(own_server, connect_to, new_database):
    connect, database = connect_to(own_server), new_database(own_server)
    freeze = pause(connect, databases=[database], holder="test")
    own_server.execute(f"SELECT pg_terminate_backend({freeze.dead_man_pid}, 5000)")

    (seen,) = status(connect).freezes
    assert seen.dead_man_pid is None
    # Nobody has to keep its way clear any more.
    wait_until(lambda: not ours(own_server, freeze.token))


def changing(conn, database):
    conn.execute("BEGIN READ WRITE")
    conn.execute(sql.SQL("ALTER DATABASE {} SET work_mem = '8MB'").format(sql.Identifier(database)))


class Relay:
    """Sessions that change a setting of a database in turn, and hold each change for less than two seconds."""

    def __init__(self, connect: Any, database: str, hold: float = 1.2) -> None:
        self._connect, self._database, self._hold = connect, database, hold
        self._stop = threading.Event()
        self.turns = 0
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(3)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while not self._stop.is_set():
            with suppress(psycopg.OperationalError), self._connect() as conn:
                while not self._stop.is_set():
                    with suppress(psycopg.errors.InternalError_):  # another one came first
                        changing(conn, self._database)
                        self.turns += 1
                        conn.execute("SELECT pg_sleep(%s)", (self._hold,))
                    conn.execute("COMMIT")

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


def test_sessions_that_are_in_the_way_in_turn_are_ended_once_the_thaw_has_waited(own_server, connect_to, new_database):
    server, connect, database = own_server, connect_to(own_server), new_database(own_server)
    server.execute("GRANT app_owner TO app")
    pause(connect, databases=[database], holder="test", admit="readers")
    relay = Relay(server.connect_factory("app"), database)
    try:
        wait_until(lambda: relay.turns >= 3)
        server.execute(OVERDUE)
        done = wait_until(lambda: thawed(connect), within=30)
    finally:
        relay.stop()

    assert [one for one in done.in_the_way if one["ended"]]


@pytest.fixture
def poser(own_server, app_connect):
    """A role that uses the journal, and so may write it, and no more."""

    def pose(connect):
        own_server.create_role("poser")
        own_server.execute(
            f"GRANT USAGE ON SCHEMA {SCHEMA} TO poser;"
            f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA {SCHEMA} TO poser;"
            f"GRANT EXECUTE ON ALL ROUTINES IN SCHEMA {SCHEMA} TO poser"
        )
        return app_connect("postgres", "poser", server=own_server)

    return pose


def in_background(conn: psycopg.Connection[Any], statement: str) -> None:
    """Send a statement, and do not wait for its end."""
    conn.pgconn.send_query(statement.encode())
    while conn.pgconn.flush():
        time.sleep(0.001)


def test_who_poses_as_a_thaw_does_not_keep_a_thaw_waiting_for_ever(own_server, connect_to, new_database, poser):
    server, connect, database = own_server, connect_to(own_server), new_database(own_server)
    pause(connect, databases=[database], holder="test", admit="readers")
    posing = poser(connect)
    posing.execute(f"BEGIN; LOCK TABLE {SCHEMA}.freezes IN ROW EXCLUSIVE MODE")
    # A call of ours, by its text; what it does is to sleep while its argument is computed.
    in_background(posing, f"CALL {SCHEMA}.thaw(pg_sleep(600)::text)")
    server.execute(OVERDUE)

    done = wait_until(lambda: thawed(connect), within=60)

    assert ("poser", True) in [(one["role"], one["ended"]) for one in done.in_the_way]


def test_who_poses_as_a_thaw_has_nobody_ended_whom_he_may_not_end(
    own_server, connect_to, new_database, poser, app_connect
):
    server, connect, database = own_server, connect_to(own_server), new_database(own_server)
    pause(connect, databases=[database], holder="test", admit="readers")
    victim, posing = app_connect("postgres", server=server), poser(connect)
    victim.execute("SELECT pg_advisory_lock(7)")
    posing.execute(f"BEGIN; LOCK TABLE {SCHEMA}.freezes IN ROW EXCLUSIVE MODE")
    in_background(posing, f"CALL {SCHEMA}.thaw(pg_advisory_lock(7)::text)")
    server.execute(OVERDUE)

    wait_until(lambda: thawed(connect), within=60)

    assert is_alive(victim)


@pytest.mark.every_version
def test_a_database_whose_drop_was_interrupted_is_gone_and_keeps_nothing_frozen(
    own_server, connect_to, new_database, app_connect
):
    server, connect = own_server, connect_to(own_server)
    half, other = new_database(server), new_database(server)
    freeze = pause(connect, databases=[half, other], holder="test", admit="readers")
    # As PostgreSQL leaves it when a DROP DATABASE is interrupted.
    server.execute(sql.SQL("UPDATE pg_database SET datconnlimit = -2 WHERE datname = {}").format(sql.Literal(half)))

    (seen,) = [one for one in status(connect).freezes if one.token == freeze.token]
    assert seen.dropped == (half,)
    server.execute(OVERDUE)
    done = wait_until(lambda: thawed(connect), within=15)

    assert done.left_over == ()
    app_connect(other, server=server).execute("CREATE TABLE t ()")


def test_what_to_type_is_never_taken_from_a_row_that_somebody_has_written(own_server, connect_to, new_database, poser):
    server, connect, database = own_server, connect_to(own_server), new_database(own_server)
    freeze = pause(connect, databases=[database], holder="test", lease=SECONDS[60])
    posing = poser(connect)
    forged = "x'; DROP TABLE accounts; --\x1b[2J"
    posing.execute(
        f"INSERT INTO {SCHEMA}.blockers (token, pid, backend_start, database, role, application, state, ended) "
        "VALUES (%s, 0, now(), %s, 'r', %s, 'prepared', false), (%s, 1, now(), %s, 'r', 'a', 's', false)".encode(),
        (freeze.token, forged, forged, freeze.token, forged),
    )

    (seen,) = status(connect).freezes

    assert len(seen.in_the_way) == 2
    for one in seen.in_the_way:
        assert "gone" in one["why_not"]
        assert "DROP" not in one["why_not"]
    columns = server.execute(
        f"SELECT attname::text FROM pg_attribute WHERE attrelid = '{SCHEMA}.blockers'::regclass AND attnum > 0"
    )
    assert ("why_not",) not in columns


@pytest.mark.parametrize("by", ["former", "present"])
@pytest.mark.parametrize("how", ["resume", "CALL"])
def test_a_database_renamed_while_frozen_is_thawed_by_either_name_although_another_one_has_the_former(
    own_server, connect_to, new_database, by, how
):
    server, connect, database = own_server, connect_to(own_server), new_database(own_server)
    freeze = pause(connect, databases=[database], holder="test", admit="readers")
    alter(server, "ALTER DATABASE {} RENAME TO renamed", database)
    server.create_database(database, "app_owner")
    name = database if by == "former" else "renamed"

    if how == "resume":
        assert [one.token for one in resume(connect, databases=[name], holder="test").thawed] == [freeze.token]
    else:
        server.execute(sql.SQL("CALL pgfreeze.thaw({})").format(sql.Literal(name)))

    assert thawed(connect)
    assert server.execute("SELECT FROM pg_db_role_setting") == []


def test_of_two_frozen_databases_that_had_one_name_each_is_thawed_by_its_own_and_the_other_is_named(
    own_server, connect_to, new_database
):
    server, connect, database = own_server, connect_to(own_server), new_database(own_server)
    first = pause(connect, databases=[database], holder="test", admit="readers")
    alter(server, "ALTER DATABASE {} RENAME TO renamed", database)
    server.create_database(database, "app_owner")
    second = pause(connect, databases=[database], holder="another", admit="readers")
    assert second.token != first.token
    said: list[str] = []

    with connect() as conn:
        conn.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
        conn.execute("SET client_min_messages = warning")
        conn.execute(sql.SQL("CALL pgfreeze.thaw({})").format(sql.Literal(database)))

    assert [one.token for one in status(connect).freezes] == [first.token]
    assert any("CALL pgfreeze.thaw('renamed')" in one for one in said)
    assert len(resume(connect, databases=["renamed"], holder="test").thawed) == 1


JOURNAL = ["freezes", "tickets", "frozen_databases", "prior_settings", "blockers"]


@pytest.mark.parametrize("table", JOURNAL)
def test_a_resume_ends_who_has_locked_the_journal_before_it_could_read_it(
    own_server, connect_to, new_database, poser, table
):
    server, connect, database = own_server, connect_to(own_server), new_database(own_server)
    before = settings_of(server)
    pause(connect, databases=[database], holder="test", lease=SECONDS[60], dead_man=table != "freezes")
    locking = poser(connect)
    locking.execute(f"BEGIN; LOCK TABLE {SCHEMA}.{table} IN ACCESS EXCLUSIVE MODE")

    (freeze,) = resume(connect, databases=[database], holder="test").thawed

    assert freeze.state is State.THAWED
    assert not is_alive(locking)
    assert settings_of(server) == before


@pytest.mark.timeout(300)  # each statement of a resume waits 10 s for the lock, twice
def test_a_prepared_transaction_that_has_locked_the_whole_journal_is_named_with_what_to_type(
    server_factory, connect_to, new_database, poser
):
    server = server_factory(settings={"max_prepared_transactions": "5"})
    connect, database = connect_to(server), new_database(server)
    pause(connect, databases=[database], holder="test", lease=SECONDS[60])
    with server.control() as locking:
        locking.execute(f"BEGIN; LOCK TABLE {', '.join(f'{SCHEMA}.{table}' for table in JOURNAL)}")
        locking.execute("PREPARE TRANSACTION 'nobody''s own'")
    named = r"in postgres, ROLLBACK PREPARED 'nobody''s own'"
    try:
        with pytest.raises(FreezeError, match=named):
            status(connect)
        with pytest.raises(ThawFailed, match=named):
            resume(connect, databases=[database], holder="test")
    finally:
        server.execute("ROLLBACK PREPARED 'nobody''s own'")
    assert len(resume(connect, databases=[database], holder="test").thawed) == 1


@pytest.mark.pg(">=17")
@pytest.mark.parametrize(
    "catalogs", ["pg_db_role_setting", "pg_database", "pg_authid, pg_database, pg_auth_members, pg_db_role_setting"]
)
def test_who_has_locked_the_servers_own_catalogs_is_ended_when_the_lease_is_over(
    own_server, connect_to, new_database, app_connect, catalogs
):
    server, connect, database = own_server, connect_to(own_server), new_database(own_server)
    server.create_role("cron")
    server.execute("GRANT pg_maintain TO cron")
    cron = app_connect("postgres", "cron", server=server)
    pause(connect, databases=[database], holder="test")
    time.sleep(1)
    server.execute(f"UPDATE {SCHEMA}.freezes SET lease_until = clock_timestamp() + interval '2 s'")
    cron.execute(f"BEGIN; LOCK TABLE {catalogs}".encode())

    # Nobody can connect now, to look: so its own connection is looked at.
    def is_ended() -> bool:
        try:
            cron.pgconn.consume_input()
        except psycopg.OperationalError:
            return True
        return False

    wait_until(is_ended, within=30)
    assert not is_alive(cron)
    wait_until(lambda: thawed(connect), within=30)
