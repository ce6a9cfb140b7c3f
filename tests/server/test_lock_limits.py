"""The strategy lock where it is hard: many tables, too few locks, a holder that hangs, and whatever is in the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from devtools.asking import frozen
from devtools.pgserver import Server
from devtools.rights import checkpointer
from devtools.wire import PLAIN, Proxy
from pg_freeze import Connect, ConnectTo, DrainTimeout, FreezeError, FreezeRefused, history, status
from tests.server.clients import wait_until

PROGRAM = Path(sys.executable).with_name("pg-freeze")
OPTIONS: dict[str, Any] = {
    "holder": "locker",
    "lease": timedelta(seconds=90),
    "drain_timeout": timedelta(seconds=30),
    "on_drain_timeout": "abort",
}
MANY = 5000


def opener(server: Server, user: str = "freezer", **options: Any) -> ConnectTo:
    return lambda name: psycopg.connect(server.dsn(name, user, **options), autocommit=True)


def freezer(server: Server) -> Connect:
    return server.connect_factory(checkpointer(server.version))


@pytest.fixture
def connect(server: Server) -> Connect:
    return freezer(server)


@pytest.fixture
def application(server, app_database, app_connect) -> psycopg.Connection[Any]:
    """A session of the application that owns a table, and gives up at once where it would have to wait."""
    server.execute("GRANT app TO freezer")
    client = app_connect(app_database)
    client.execute("CREATE TABLE things (name text)")
    client.execute("SET lock_timeout = '200ms'")
    return client


def waits(client: psycopg.Connection[Any], statement: str) -> bool:
    try:
        client.execute(statement.encode())
    except psycopg.errors.LockNotAvailable:
        return True
    return False


@pytest.mark.timeout(300)
def test_five_thousand_tables_are_locked_once_the_server_has_the_locks_that_the_refusal_names(
    server_factory, new_database, app_connect
):
    server = server_factory(settings={"max_connections": 40, "max_prepared_transactions": 0})
    database = new_database(server)
    server.execute("GRANT app TO freezer")
    with app_connect(database, server=server) as app:
        for first in range(0, MANY, 500):  # a transaction needs a lock for each table that it creates
            create = f"FOR i IN {first + 1}..{first + 500} LOOP EXECUTE 'CREATE TABLE t' || i || ' ()'; END LOOP"
            app.execute(f"DO $$ BEGIN {create}; END $$")
    connect, connect_to = freezer(server), opener(server)

    with (
        pytest.raises(FreezeRefused, match=r"max_locks_per_transaction = \d+; and restart") as caught,
        frozen(connect, connect_to, databases=[database], **OPTIONS),
    ):
        raise AssertionError("must not be entered")
    assert {one.code for one in caught.value.findings} == {"too-few-locks"}
    (setting,) = re.findall(r"max_locks_per_transaction = (\d+)", str(caught.value))
    server.execute(sql.SQL("ALTER SYSTEM SET max_locks_per_transaction = {}").format(sql.Literal(int(setting))))
    server.restart()

    began = time.monotonic()
    with frozen(connect, connect_to, databases=[database], **OPTIONS) as hold:
        took = time.monotonic() - began
        held = server.execute("SELECT count(DISTINCT relation) FROM pg_locks WHERE mode = 'ExclusiveLock' AND granted")
    print(f"{MANY} tables locked in {took:.2f} s, with max_locks_per_transaction = {setting}")
    assert held == [(MANY,)]
    assert hold.attestation is not None
    assert hold.attestation.certified


def test_a_holder_that_is_stopped_loses_its_locks_when_the_lease_ends(server, connect, app_database, application):
    environment = {**os.environ, "PG_FREEZE_DSN": server.dsn("postgres", checkpointer(server.version))}
    command = [str(PROGRAM), "run", "-d", app_database, "--lease", "6", "--drain-timeout", "5", "--", "sleep", "3"]
    # Stopped while the command sleeps, so that it can neither thaw nor say anything.
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: [f for f in status(connect, databases=[app_database]).freezes if f.frozen_at], within=60)
        process.send_signal(signal.SIGSTOP)
        application.execute("SET lock_timeout = '30s'")
        application.execute("INSERT INTO things VALUES ('waited')")
        wait_until(lambda: not status(connect, databases=[app_database]).freezes, within=10)
    finally:
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=60)
    (freeze,) = [one for one in history(connect) if app_database in one.databases]
    assert freeze.state == "thawed"
    # It had its last word before it was stopped, or it must not claim a freeze that was gone.
    assert process.returncode == 1 or freeze.thawed_by == "end of the block", said


def test_a_holder_that_is_cut_off_loses_its_locks_when_the_lease_ends(server, connect, app_database, application):
    """The network swallows everything, and closes nothing: neither side hears that the other is gone."""
    with Proxy(server.port) as proxy:
        reach = opener(server, checkpointer(server.version), port=proxy.port, **PLAIN)
        with (
            pytest.raises(FreezeError),
            frozen(
                lambda: reach("postgres"),
                reach,
                databases=[app_database],
                holder="locker",
                lease=timedelta(seconds=4),
                drain_timeout=timedelta(seconds=3),
            ) as hold,
        ):
            proxy.black_hole()
            assert waits(application, "INSERT INTO things VALUES ('early')")
            application.execute("SET lock_timeout = '30s'")
            application.execute("INSERT INTO things VALUES ('after the lease')")
            wait_until(lambda: not status(connect, databases=[app_database]).freezes)
            (freeze,) = [one for one in history(connect) if app_database in one.databases]
            assert freeze.restored_at is not None
            assert freeze.restored_at - hold.freeze.lease_until < timedelta(seconds=5)
            proxy.mend()


def test_autovacuum_gives_way(server_factory, new_database, app_connect):
    server = server_factory(settings={"autovacuum_naptime": "1s"})
    database = new_database(server)
    server.execute("GRANT app TO freezer")
    # Closed, for a session may keep to itself what it did last: autovacuum would not hear of it.
    with app_connect(database, server=server) as app:
        app.execute(
            "CREATE TABLE things (name text) WITH (autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0,"
            " autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1)"
        )
        app.execute("INSERT INTO things SELECT repeat('x', 500) FROM generate_series(1, 20000)")
        app.execute("DELETE FROM things")
    vacuums = "SELECT pid FROM pg_stat_progress_vacuum WHERE relid = 'things'::regclass"
    wait_until(lambda: server.execute(vacuums, database), within=60)

    with frozen(freezer(server), opener(server), databases=[database], **OPTIONS):
        assert not server.execute(vacuums, database)


def test_a_prepared_transaction_in_the_way_is_named(connect, server, app_database, application):
    application.execute("BEGIN; INSERT INTO things VALUES ('prepared'); PREPARE TRANSACTION 'order 66'")
    options = {**OPTIONS, "drain_timeout": timedelta(seconds=1), "on_drain_timeout": "terminate"}

    with (
        pytest.raises(DrainTimeout, match="order 66"),
        frozen(connect, opener(server), databases=[app_database], **options),
    ):
        raise AssertionError("must not be entered")
    application.execute("INSERT INTO things VALUES ('nobody is in the way of others')")


@pytest.mark.parametrize("user", ["freezer", "postgres"])
def test_only_a_superusers_locks_stop_new_tables_too(user, server, app_database, application):
    with frozen(server.connect_factory(user), opener(server, user), databases=[app_database], **OPTIONS):
        assert waits(application, "CREATE TABLE new (id integer)") is (user == "postgres")
        assert waits(application, "INSERT INTO things VALUES ('written')")
        assert not waits(application, "SELECT count(*) FROM things")


def test_a_database_whose_writers_wait_is_certified_by_transaction_ids_and_a_table_made_meanwhile_breaks_that(
    connect, server, app_database, app_connect, application
):
    app_connect(app_database).execute("INSERT INTO things SELECT 'reported late' FROM generate_series(1, 100)")
    with frozen(connect, opener(server), databases=[app_database], **OPTIONS) as hold:
        application.execute("SELECT count(*) FROM things")
    assert hold.attestation is not None
    assert (hold.attestation.method, hold.attestation.certified) == ("transaction-ids", True)

    with frozen(connect, opener(server), databases=[app_database], **OPTIONS) as hold:
        application.execute("CREATE TABLE new AS SELECT 1 AS id")
    assert ("new-table", "public.new") in [(one.code, one.what.split()[0]) for one in hold.attestation.violations]
    assert not hold.attestation.certified


def test_several_databases_are_locked_together(
    connect, server, new_database: Callable[..., str], app_connect: Callable[..., psycopg.Connection[Any]]
):
    server.execute("GRANT app TO freezer")
    databases = [new_database(), new_database()]
    clients = [app_connect(name) for name in databases]
    for client in clients:
        client.execute("CREATE TABLE things (name text)")
        client.execute("SET lock_timeout = '200ms'")

    with frozen(connect, opener(server), databases=databases, **OPTIONS) as hold:
        assert all(waits(client, "INSERT INTO things VALUES ('written')") for client in clients)
    assert not any(waits(client, "INSERT INTO things VALUES ('written')") for client in clients)
    assert hold.freeze.databases == tuple(databases)


def test_temporary_tables_are_left_alone(connect, server, app_database, application):
    application.execute("CREATE TEMPORARY TABLE mine (id integer)")

    with frozen(connect, opener(server), databases=[app_database], **OPTIONS) as hold:
        assert not waits(application, "INSERT INTO mine VALUES (1)")
    assert hold.attestation is not None
    # It took a transaction id, and without the WAL nobody knows what for.
    assert {one.code for one in hold.attestation.violations} == {"not-proved"}
