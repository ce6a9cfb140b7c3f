"""Losing the server, or never having had the right one: standbys, kills, and a full house."""

import socket
import struct
import subprocess
import threading
import time

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from devtools.asking import pause
from devtools.binaries import client, server_account
from devtools.pgserver import Server
from pg_freeze import (
    FreezeError,
    FreezeRefused,
    InvalidRequest,
    ServerLost,
    State,
    ThawFailed,
    connector,
    history,
    resume,
    status,
)
from tests.server.acts import ACTS
from tests.server.clients import SECONDS, background, is_read_only, ms, settings_of, wait_until


@pytest.fixture
def standby(own_server):
    """A streaming standby of the server."""
    own_server.create_role("copy", "LOGIN REPLICATION")
    data = own_server.directory / "standby"
    subprocess.run(
        [
            client("pg_basebackup", own_server.version),
            "-D",
            data,
            "-R",
            "-c",
            "fast",
            "-d",
            own_server.dsn(user="copy"),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    # What -R wrote may hold options that only the newer libpq of pg_basebackup knows.
    conninfo = own_server.dsn(user="copy").replace("\\", "\\\\").replace("'", "''")
    with (data / "postgresql.auto.conf").open("a") as conf:
        conf.write(f"primary_conninfo = '{conninfo}'\n")
    account = server_account()
    if account is not None:
        subprocess.run(["chown", "-R", f"{account.pw_uid}:{account.pw_gid}", str(data)], check=True)
    data.chmod(0o700)
    with Server(own_server.version, data=data) as standby:
        yield standby


def test_a_standby_is_refused_and_a_freeze_reaches_it_from_the_primary(
    standby, own_server, connect_to, new_database, app_connect
):
    database = new_database(own_server)
    for act in ACTS:
        with pytest.raises(FreezeRefused, match="standby"):
            act(connect_to(standby), database)

    frozen = pause(connect_to(own_server), databases=[database], holder="test", admit="nobody")

    assert frozen.lingering == ()
    wait_until(lambda: is_closed(standby, database))
    resume(connect_to(own_server), databases=[database], holder="test")
    wait_until(lambda: not is_closed(standby, database))


def is_closed(server, database):
    try:
        psycopg.connect(server.dsn(database, "app")).close()
    except psycopg.OperationalError:
        return True
    return False


def test_a_server_that_cannot_be_reached_is_an_error_that_says_so(own_server, connect_to):
    own_server.stop("immediate")

    for act in ACTS:
        with pytest.raises(ServerLost, match=r"[Cc]onnection refused"):
            act(connect_to(own_server), "app")


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"password": "guessed"}, "password"),
        ({"user": "nobody_of_this_name"}, "nobody_of_this_name"),
        ({"dbname": "no such database"}, "no such database"),
    ],
    ids=["password", "user", "database"],
)
def test_a_server_that_refuses_a_connection_was_reached(server, where, says):
    """libpq has no SQLSTATE for that, and the words are in the server's language."""
    dsn = make_conninfo(server.dsn(user="freezer"), **where)
    with pytest.raises(FreezeRefused, match=f"the server refused: .*{says}"):
        status(connector(dsn))


def refusing(code):
    """Return the port of a server that refuses every connection with this SQLSTATE, and in German."""
    told = b"SFATAL\0VFATAL\0C" + code.encode() + b"\0Mnichts da\0\0"
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            with listening.accept()[0] as client:
                # What is asked first is whether to encrypt: no.
                while struct.unpack("!ii", client.recv(4096)[:8])[1] in (80877103, 80877104):
                    client.sendall(b"N")
                client.sendall(b"E" + struct.pack("!i", len(told) + 4) + told)

    threading.Thread(target=serve, daemon=True).start()
    return listening.getsockname()[1]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("28000", FreezeRefused),
        ("28P01", FreezeRefused),
        ("3D000", FreezeRefused),
        ("53300", ServerLost),
        ("57P03", ServerLost),
    ],
)
def test_a_refusal_is_told_by_its_sqlstate_whatever_the_language(code, kind):
    with pytest.raises(kind, match="nichts da"):
        status(connector(f"host=127.0.0.1 port={refusing(code)} user=me"))


def test_a_server_that_has_no_room_for_a_connection_now_is_worth_a_retry(own_server):
    own_server.create_role("crowded", "LOGIN CONNECTION LIMIT 0")
    with pytest.raises(ServerLost, match=r"no connection to the server: .*too many connections"):
        status(connector(own_server.dsn(user="crowded")))


def test_a_wrong_password_is_an_error_that_says_so(server, app_database):
    with pytest.raises(FreezeError, match="password authentication failed"):
        pause(server.connect_factory(password="guessed"), databases=[app_database], holder="test")


def test_a_maintenance_database_that_does_not_exist_is_an_error_that_says_so(server, app_database):
    with pytest.raises(FreezeError, match='"nowhere" does not exist'):
        pause(server.connect_factory(dbname="nowhere"), databases=[app_database], holder="test")


def test_a_connection_string_that_cannot_be_parsed_does_not_appear_in_the_error():
    with pytest.raises(InvalidRequest) as refused:
        connector("postgresql://me:se cret@host:port:port/db?x")

    assert "cret" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


def test_a_connector_needs_no_more_than_host_and_user(server, app_database):
    connect = connector(server.dsn(app_database, "freezer"))
    with connect() as conn:
        assert (conn.info.dbname, conn.autocommit) == (app_database, True)


def test_a_server_without_room_is_an_error_that_says_so(server_factory, connect_to, new_database):
    # From 16 on reserved_connections are kept back as well; none by default.
    server = server_factory(settings={"max_connections": 10, "superuser_reserved_connections": 3, "max_wal_senders": 0})
    database, connect = new_database(server), connect_to(server)
    occupied = [server.connect_factory("app")() for _ in range(7)]
    before = settings_of(server)
    try:
        with pytest.raises(FreezeError, match=r"remaining connection slots|too many clients"):
            pause(connect, databases=[database], holder="test")
        occupied.pop().close()

        def refused_for_want_of_a_dead_man_switch():
            # A session keeps its slot until after it has gone from pg_stat_activity.
            with pytest.raises(
                FreezeError, match=r"remaining connection slots|too many clients|dead-man switch"
            ) as told:
                pause(connect, databases=[database], holder="test")
            return "dead-man switch" in str(told.value)

        wait_until(refused_for_want_of_a_dead_man_switch)
        assert settings_of(server) == before
    finally:
        for conn in occupied:
            conn.close()


def test_a_server_killed_during_the_drain_stays_frozen_until_somebody_thaws_it(
    own_server, connect_to, new_database, app_connect
):
    connect, database = connect_to(own_server), new_database(own_server)
    before = settings_of(own_server)
    app_connect(database, server=own_server).execute("BEGIN")
    killed = []

    def kill(progress):
        if not killed:
            killed.append(own_server.kill())

    with pytest.raises(ThawFailed, match="CALL pgfreeze") as failed:
        pause(connect, databases=[database], holder="test", progress=kill)

    assert isinstance(failed.value.__cause__, ServerLost)
    own_server.start()
    (frozen,) = status(connect).freezes
    assert (frozen.state, frozen.dead_man_pid) == (State.DRAINING, None)
    with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
        app_connect(database, server=own_server)
    assert len(resume(connect, databases=[database], holder="test").thawed) == 1
    assert settings_of(own_server) == before
    app_connect(database, server=own_server).execute("CREATE TABLE t ()")


def test_a_server_that_restarts_during_the_drain_is_thawed_when_it_is_back(
    own_server, connect_to, new_database, app_connect
):
    connect, database = connect_to(own_server), new_database(own_server)
    before = settings_of(own_server)
    app_connect(database, server=own_server).execute("BEGIN")
    restarted = []

    def restart(progress):
        if not restarted:
            restarted.append(own_server.restart("immediate"))

    with pytest.raises(ServerLost, match="undone"):
        pause(connect, databases=[database], holder="test", progress=restart)

    assert settings_of(own_server) == before
    assert history(connect)[0].thawed_by == "undone: ServerLost"


def test_a_frozen_database_that_went_through_a_restart_is_adopted_and_watched_again(
    own_server, connect_to, new_database, app_connect
):
    connect, database = connect_to(own_server), new_database(own_server)
    first = pause(connect, databases=[database], holder="test")
    own_server.kill()
    own_server.start()
    assert is_read_only(app_connect(database, server=own_server))

    second = pause(connect, databases=[database], holder="test")

    assert (second.token, second.barrier_at) == (first.token, first.barrier_at)
    assert second.dead_man_pid is not None


def test_a_resume_waits_for_a_server_that_is_restarting(own_server, connect_to, new_database, app_connect):
    connect, database = connect_to(own_server), new_database(own_server)
    pause(connect, databases=[database], holder="test")
    own_server.kill()

    with background(lambda: resume(connect, databases=[database], holder="test")) as resuming:
        time.sleep(0.5)
        own_server.start()
        assert len(resuming.result(20).thawed) == 1


def test_a_terminated_control_session_undoes_the_freeze(own_server, connect_to, new_database, app_connect):
    connect, database = connect_to(own_server), new_database(own_server)
    before = settings_of(own_server)
    app_connect(database, server=own_server).execute("BEGIN")
    ended = []

    def end(progress):
        if not ended:
            ended.append(
                own_server.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'pg-freeze'"
                )
            )

    with pytest.raises(ServerLost):
        pause(connect, databases=[database], holder="test", progress=end, drain_timeout=SECONDS[5])

    assert settings_of(own_server) == before


def test_a_lease_that_ended_while_the_server_was_down_is_enforced_by_the_next_call(
    own_server, connect_to, new_database
):
    connect, database = connect_to(own_server), new_database(own_server)
    before = settings_of(own_server)
    pause(connect, databases=[database], holder="test", lease=SECONDS[1], drain_timeout=ms(500))
    own_server.kill()
    time.sleep(1)
    own_server.start()
    assert settings_of(own_server) != before

    own_server.execute("CALL pgfreeze.thaw_expired()")

    assert settings_of(own_server) == before
