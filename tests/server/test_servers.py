"""The servers that all other tests stand on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from devtools.binaries import CHECKOUT
from devtools.pgserver import Server, password
from tests.server.clients import heed_signals


def test_the_server_has_the_version_asked_for(server, pg_version):
    assert server.execute("SELECT current_setting('server_version_num')::int / 10000") == [(pg_version,)]


def test_a_restarted_server_keeps_its_port_and_its_data(own_server):
    own_server.execute("CREATE TABLE kept ()")
    port, pid = own_server.port, own_server.pid

    own_server.restart()

    assert (own_server.port, own_server.execute("SELECT count(*) FROM kept")) == (port, [(0,)])
    assert own_server.pid != pid


def test_a_killed_server_takes_its_sessions_along_and_recovers_when_started_again(own_server):
    own_server.execute("CREATE TABLE kept ()")
    session = own_server.control()

    own_server.kill()

    assert not own_server.running
    with pytest.raises(psycopg.OperationalError):
        session.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError):
        own_server.control()
    own_server.start()
    assert own_server.execute("SELECT count(*) FROM kept") == [(0,)]


def test_a_server_killed_in_the_middle_of_a_statement_can_be_started_at_once(own_server):
    session = own_server.connect_factory("app")()
    session.pgconn.send_query(b"SELECT pg_sleep(600)")

    own_server.kill()
    own_server.start()

    assert own_server.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'") == [(0,)]


def test_a_password_is_needed_and_checked(server):
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(server.dsn(user="app", password="guessed"))
    with server.connect_factory("app")() as conn:
        assert conn.execute("SELECT current_user").fetchone() == ("app",)
    with psycopg.connect(server.dsn(user="app", host=str(server.socket_dir), password=password("app"))) as conn:
        assert conn.execute("SELECT inet_server_addr()").fetchone() == (None,)


def test_lines_for_pg_hba_come_before_the_usual_ones(server_factory):
    server = server_factory(hba=["host all app 127.0.0.1/32 reject"])

    with pytest.raises(psycopg.OperationalError, match="rejects connection"):
        server.connect_factory("app")()
    with server.connect_factory("freezer")() as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_settings_hold_and_can_be_changed_afterwards(server_factory):
    server = server_factory(settings={"work_mem": "3MB", "log_connections": True, "cluster_name": "it's"})

    assert server.execute("SELECT current_setting('work_mem'), current_setting('cluster_name')") == [("3MB", "it's")]
    server.execute("ALTER SYSTEM SET work_mem = '5MB'")
    server.restart()
    assert server.execute("SHOW work_mem") == [("5MB",)]


def test_a_copy_of_a_cluster_is_a_server_with_the_same_data(own_server, tmp_path):
    own_server.execute("CREATE TABLE kept ()")
    own_server.execute("CHECKPOINT")
    where = own_server.directory / "copy"
    subprocess.run(["cp", "-a", str(own_server.data), str(where)], check=True)

    with Server(own_server.version, data=where) as copy:
        assert copy.execute("SELECT count(*) FROM kept") == [(0,)]
        assert own_server.running
    assert where.exists()


def test_nothing_of_a_server_is_left_behind(pg_version):
    with Server(pg_version) as server:
        pid = server.pid
    assert not server.directory.exists()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_server_dies_with_the_process_that_started_it(pg_version, fate):
    script = (
        "import sys, time; from devtools.pgserver import Server; server = Server(int(sys.argv[1])); server.start();"
        "print(server.pid, server.directory, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(pg_version)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=heed_signals,  # noqa: PLW1509 - no thread forks here
    ) as owner:
        assert owner.stdout is not None
        pid, directory = owner.stdout.readline().decode().split(maxsplit=1)
        os.kill(int(pid), 0)
        owner.send_signal(fate)

    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() or Path(directory.strip()).exists():
        assert time.monotonic() < deadline, "the server outlived its owner"
        time.sleep(0.05)


def test_a_test_database_goes_whatever_holds_on_to_it(server, new_database):
    name = new_database()
    session = server.control(name)
    session.execute("CREATE TABLE t ()")
    session.execute("SELECT pg_create_logical_replication_slot(current_database()::text, 'test_decoding')")
    session.execute("BEGIN")
    session.execute("CREATE TABLE u ()")
    session.execute("PREPARE TRANSACTION 'held'")
    server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    server.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    # The fixture's own clean-up drops it again, so there has to be one.
    server.drop_database(name)
    assert server.execute(f"SELECT count(*) FROM pg_database WHERE datname = '{name}'") == [(0,)]
    server.create_database(name)


def test_the_freezer_is_no_superuser_but_may_alter_the_applications_databases(connect, app_database, app_connect):
    with connect() as conn:
        assert conn.execute(
            "SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user"
        ).fetchone() == (False,)
        conn.execute(f"ALTER DATABASE {app_database} SET default_transaction_read_only = on")
        conn.execute("CREATE SCHEMA probe")
        conn.execute("DROP SCHEMA probe")
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        app_connect(app_database).execute("CREATE TABLE t ()")


@pytest.mark.pg(">=15")
def test_the_freezer_may_checkpoint_since_15(connect):
    with connect() as conn:
        conn.execute("CHECKPOINT")


def test_the_application_may_create_tables(app_database, app_connect):
    app_connect(app_database).execute("CREATE TABLE t ()")


def test_a_mark_deselects_on_other_versions(request):
    for item in request.session.items:
        if item.name.startswith("test_only_on_"):
            assert item.name.startswith(f"test_only_on_{item.callspec.params['pg_version']}")


@pytest.mark.pg("==14")
def test_only_on_14(pg_version):
    assert pg_version == 14


@pytest.mark.pg("==15")
def test_only_on_15(pg_version):
    assert pg_version == 15


@pytest.mark.pg("==16")
def test_only_on_16(pg_version):
    assert pg_version == 16


@pytest.mark.pg("==17")
def test_only_on_17(pg_version):
    assert pg_version == 17


@pytest.mark.pg("==18")
def test_only_on_18(pg_version):
    assert pg_version == 18
