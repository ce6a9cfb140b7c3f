"""The dead-man switch: what thaws when nobody is left to resume."""

import os
import signal
import subprocess
import sys
import time

import psycopg
import pytest
from psycopg import sql

from devtools.asking import pause
from devtools.binaries import CHECKOUT
from pg_freeze import FreezeError, State, history, resume, status
from tests.server.clients import (
    SECONDS,
    alter,
    background,
    dead_men,
    is_alive,
    is_read_only,
    ms,
    settings_of,
    wait_until,
)

pytestmark = pytest.mark.every_version


def is_thawed(connect):
    (last,) = history(connect, limit=1)
    return last if last.state is State.THAWED else None


def test_it_thaws_on_time_after_its_client_was_killed(server, connect, app_database, app_connect):
    before = settings_of(server)
    script = (
        "import sys, time; from datetime import timedelta; import psycopg; from devtools.asking import pause\n"
        "connect = lambda: psycopg.connect(sys.argv[1], autocommit=True)\n"
        "pause(connect, databases=[sys.argv[2]], holder='doomed', lease=timedelta(seconds=4),"
        " drain_timeout=timedelta(seconds=3)); print('frozen', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, server.dsn(user="freezer"), app_database], cwd=CHECKOUT, stdout=subprocess.PIPE
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"frozen\n"
        client.send_signal(signal.SIGKILL)
    assert is_read_only(reader := app_connect(app_database))

    thawed = wait_until(lambda: is_thawed(connect))

    assert ms(0) <= thawed.restored_at - thawed.lease_until < SECONDS[2]
    assert thawed.thawed_by == "lease ended"
    assert settings_of(server) == before
    assert not is_alive(reader)
    app_connect(app_database).execute("CREATE TABLE t ()")


def test_it_honours_an_extended_lease(connect, app_database, app_connect):
    pause(connect, databases=[app_database], holder="test", lease=SECONDS[2], drain_timeout=SECONDS[1])
    extended = pause(connect, databases=[app_database], holder="test", lease=SECONDS[4], drain_timeout=SECONDS[1])
    time.sleep(2.2)
    assert is_read_only(app_connect(app_database))

    thawed = wait_until(lambda: is_thawed(connect))

    assert thawed.lease_until == extended.lease_until
    assert thawed.restored_at >= extended.lease_until


def test_it_thaws_a_database_that_is_closed_to_everybody(connect, app_database, app_connect):
    pause(connect, databases=[app_database], holder="test", admit="nobody", lease=SECONDS[1], drain_timeout=ms(500))

    wait_until(lambda: is_thawed(connect))

    app_connect(app_database).execute("CREATE TABLE t ()")


def test_it_ends_with_the_freeze(own_server, connect_to, new_database):
    connect, database = connect_to(own_server), new_database(own_server)
    frozen = pause(connect, databases=[database], holder="test")
    assert dead_men(own_server) == [frozen.dead_man_pid]

    resume(connect, databases=[database], holder="test")

    wait_until(lambda: not dead_men(own_server), within=3)


def test_one_that_waits_for_a_freeze_which_never_comes_voids_its_ticket_and_ends(own_server, connect_to, new_database):
    # The database is renamed just before the freezing transaction: the attempt fails, with its switch already there.
    database, opened = new_database(own_server), []

    def connect():
        opened.append(None)
        if len(opened) == 2:
            alter(own_server, "ALTER DATABASE {} RENAME TO gone", database)
        return connect_to(own_server)()

    with pytest.raises(FreezeError):
        pause(connect, databases=[database], holder="test")

    wait_until(lambda: not dead_men(own_server), within=5)


def test_a_second_pause_does_not_start_a_second_switch(own_server, connect_to, new_database):
    connect, database = connect_to(own_server), new_database(own_server)
    for _ in range(3):
        pause(connect, databases=[database], holder="test")

    assert len(dead_men(own_server)) == 1


def test_without_room_for_its_session_nothing_is_frozen(own_server, connect_to, new_database):
    connect, database = connect_to(own_server), new_database(own_server)
    pause(connect, databases=[database], holder="test")
    resume(connect, databases=[database], holder="test")
    wait_until(lambda: not dead_men(own_server))
    before = settings_of(own_server)
    own_server.execute("ALTER ROLE freezer CONNECTION LIMIT 1")

    with pytest.raises(FreezeError, match=r"dead-man switch.*too many connections"):
        pause(connect, databases=[database], holder="test")

    assert settings_of(own_server) == before
    assert len(history(connect)) == 1


@pytest.mark.parametrize(
    "setting",
    [
        "statement_timeout = '700ms'",
        "idle_in_transaction_session_timeout = '300ms'",
        "idle_session_timeout = '700ms'",
        "default_transaction_read_only = on",
        "default_transaction_isolation = 'serializable'",
        "lock_timeout = '1ms'",
        "client_connection_check_interval = '100ms'",
        "client_min_messages = 'debug1'",
        "synchronous_commit = 'remote_apply'",
        "search_path = 'nowhere'",
        "standard_conforming_strings = off",
        "DateStyle = 'German'",
        "IntervalStyle = 'iso_8601'",
        "TimeZone = 'Asia/Kathmandu'",
        pytest.param("transaction_timeout = '700ms'", marks=pytest.mark.pg(">=17")),
    ],
)
def test_settings_of_the_role_do_not_end_it_early(server, connect, app_database, setting):
    before = settings_of(server)
    server.execute(sql.SQL("ALTER ROLE freezer SET " + setting))
    try:
        pause(connect, databases=[app_database], holder="test", lease=ms(1500), drain_timeout=ms(500))
        thawed = wait_until(lambda: is_thawed(connect), within=10)
    finally:
        server.execute("ALTER ROLE freezer RESET ALL")

    assert thawed.thawed_by == "lease ended"
    assert settings_of(server) == before


def test_a_missing_synchronous_standby_holds_up_neither_freeze_nor_thaw(server_factory, connect_to, new_database):
    server = server_factory()
    connect, database = connect_to(server), new_database(server)
    server.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    server.execute("SELECT pg_reload_conf()")

    with background(lambda: pause(connect, databases=[database], holder="test")) as freezing:
        freezing.result(15)
    with background(lambda: resume(connect, databases=[database], holder="test")) as thawing:
        assert len(thawing.result(15).thawed) == 1
    pause(connect, databases=[database], holder="by hand")
    with background(lambda: server.execute("CALL pgfreeze.thaw_all()")) as thawing:
        thawing.result(15)
    pause(connect, databases=[database], holder="left alone", lease=SECONDS[1], drain_timeout=ms(500))
    wait_until(lambda: is_thawed(connect), within=15)


def test_it_tries_again_until_a_thaw_that_failed_at_first_succeeds(own_server, connect_to, new_database):
    # Its client is gone, so the server would end it over the second warning that it could not send.
    connect, database = connect_to(own_server), new_database(own_server)
    before = settings_of(own_server)
    pause(connect, databases=[database], holder="test", lease=SECONDS[1], drain_timeout=ms(500))
    own_server.execute("REVOKE app_owner FROM freezer")
    time.sleep(2.5)
    assert settings_of(own_server) != before
    assert len(dead_men(own_server)) == 1

    own_server.execute("GRANT app_owner TO freezer")

    wait_until(lambda: settings_of(own_server) == before, within=5)


def test_when_it_was_terminated_status_shows_none_and_thaw_expired_does_its_work(own_server, connect_to, new_database):
    connect, database = connect_to(own_server), new_database(own_server)
    before = settings_of(own_server)
    frozen = pause(connect, databases=[database], holder="test", lease=SECONDS[2], drain_timeout=SECONDS[1])
    own_server.execute(sql.SQL("SELECT pg_terminate_backend({}, 5000)").format(sql.Literal(frozen.dead_man_pid)))

    (shown,) = status(connect).freezes
    assert shown.dead_man_pid is None
    time.sleep(2.2)
    assert settings_of(own_server) != before
    own_server.execute("CALL pgfreeze.thaw_expired()")

    assert settings_of(own_server) == before


def test_a_pause_that_adopts_a_freeze_without_switch_starts_one(own_server, connect_to, new_database):
    connect, database = connect_to(own_server), new_database(own_server)
    first = pause(connect, databases=[database], holder="test")
    own_server.execute(sql.SQL("SELECT pg_terminate_backend({}, 5000)").format(sql.Literal(first.dead_man_pid)))

    second = pause(connect, databases=[database], holder="test")

    assert second.token == first.token
    assert second.dead_man_pid not in (None, first.dead_man_pid)


def test_a_freeze_thawed_just_before_its_adoption_is_begun_anew(own_server, connect_to, new_database, app_connect):
    # Without a switch, adoption starts one: at that moment somebody thaws.
    connect, database, opened = connect_to(own_server), new_database(own_server), []
    first = pause(connect, databases=[database], holder="test", dead_man=False)

    def connect_and_thaw():
        opened.append(None)
        if len(opened) == 2:
            own_server.execute("CALL pgfreeze.thaw_all()")
        return connect()

    second = pause(connect_and_thaw, databases=[database], holder="test")

    assert second.token != first.token
    assert second.state is State.FROZEN
    assert is_read_only(app_connect(database, server=own_server))


def test_another_sessions_application_name_does_not_pass_for_a_switch(
    own_server, connect_to, new_database, app_connect
):
    connect, database = connect_to(own_server), new_database(own_server)
    frozen = pause(connect, databases=[database], holder="test", dead_man=False)
    name = f"pg-freeze dead-man {frozen.token}"
    impostor = app_connect("postgres", server=own_server, application_name=name)
    asks = "SELECT pg_sleep(1.5) -- CALL pgfreeze.dead_man("

    with background(lambda: impostor.execute(asks)):
        time.sleep(0.3)
        assert status(connect).freezes[0].dead_man_pid is None


def test_its_session_belongs_to_nobody_but_the_server(connect, app_database):
    frozen = pause(connect, databases=[app_database], holder="test")

    assert frozen.dead_man_pid is not None
    os.kill(frozen.dead_man_pid, 0)
    with connect() as conn, pytest.raises(psycopg.Error):
        conn.execute("SELECT 1/0 FROM pg_stat_activity WHERE pid = %s AND state = 'active'", [frozen.dead_man_pid])
