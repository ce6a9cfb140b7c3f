"""The lease holds: who is in the way of a thaw is ended, and nobody else; what is left over keeps nothing else back."""

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psycopg
import pytest
from psycopg import sql

from devtools.asking import pause
from pg_freeze import FreezeRefused, State, ThawFailed, history, install, resume, status
from tests.server.clients import SECONDS, alter, background, is_alive, is_read_only, settings_of, wait_until


@pytest.fixture
def tenant(server):
    """A role of the application that owns its databases."""
    if not server.execute("SELECT 1 FROM pg_roles WHERE rolname = 'tenant'"):
        server.create_role("tenant")
        server.execute("GRANT app_owner TO tenant")
    return "tenant"


def overdue(server, freeze):
    """Let the lease end now."""
    server.execute(f"UPDATE pgfreeze.freezes SET lease_until = clock_timestamp() WHERE token = '{freeze.token}'")


def changing(conn, database):
    conn.execute("BEGIN READ WRITE")
    conn.execute(sql.SQL("ALTER DATABASE {} SET work_mem = '8MB'").format(sql.Identifier(database)))


def thawed(connect):
    (last,) = history(connect, limit=1)
    return last if last.state is State.THAWED else None


@pytest.mark.parametrize("active", [True, False], ids=["active", "idle"])
def test_who_has_changed_settings_and_goes_on_is_ended_when_the_lease_is_over_and_the_history_names_it(
    connect, server, new_database, app_connect, tenant, active
):
    database, other = new_database(), new_database()
    freeze = pause(connect, databases=[database], holder="test", admit="readers")
    blocker, bystander = app_connect(database, tenant), app_connect(other, tenant)
    bystander.execute("BEGIN")
    bystander.execute(sql.SQL("ALTER DATABASE {} SET work_mem = '4MB'").format(sql.Identifier(other)))
    pid = blocker.info.backend_pid
    changing(blocker, database)
    with background(lambda: suppress_lost(blocker, "SELECT pg_sleep(20)") if active else None):
        overdue(server, freeze)

        done = wait_until(lambda: thawed(connect), within=15)

    assert [(one["pid"], one["role"], one["ended"]) for one in done.in_the_way] == [(pid, "tenant", True)]
    bystander.execute("COMMIT")
    app_connect(database).execute("CREATE TABLE t ()")


def suppress_lost(conn, statement):
    with suppress(psycopg.OperationalError):
        conn.execute(statement)


@pytest.mark.parametrize("dead_man", [True, False])
def test_a_resume_ends_who_is_in_its_way_although_the_lease_is_not_over(
    connect, server, app_database, app_connect, tenant, dead_man
):
    pause(connect, databases=[app_database], holder="test", admit="readers", dead_man=dead_man)
    blocker = app_connect(app_database, tenant)
    pid = blocker.info.backend_pid
    changing(blocker, app_database)

    with background(lambda: suppress_lost(blocker, "SELECT pg_sleep(20)")):
        (freeze,) = resume(connect, databases=[app_database], holder="test").thawed

    assert freeze.state is State.THAWED
    assert [one["pid"] for one in freeze.in_the_way if one["ended"]] == [pid]
    wait_until(lambda: not watches(server, freeze))


def watches(server, freeze):
    return server.execute(f"SELECT pid FROM pg_stat_activity WHERE application_name = 'pg-freeze watch {freeze.token}'")


def test_who_only_queues_for_what_somebody_holds_is_not_ended(connect, server, app_database):
    pause(connect, databases=[app_database], holder="test", admit="readers")
    holds, queues = connect(), connect()
    pid = holds.info.backend_pid
    lock = "LOCK TABLE pgfreeze.freezes IN SHARE ROW EXCLUSIVE MODE"
    holds.execute("BEGIN")
    holds.execute(lock)

    with background(lambda: queues.execute(f"BEGIN; {lock}; COMMIT")) as queued:
        wait_until(lambda: server.execute("SELECT 1 FROM pg_locks WHERE NOT granted"))
        (freeze,) = resume(connect, databases=[app_database], holder="test").thawed
        queued.result(30)

    assert [one["pid"] for one in freeze.in_the_way] == [pid]
    assert is_alive(queues)


def test_two_thaws_at_once_do_not_end_each_other_but_who_is_in_the_way_of_either(
    connect, server, app_database, app_connect, tenant
):
    pause(connect, databases=[app_database], holder="test", admit="readers", dead_man=False)
    blocker = app_connect(app_database, tenant)
    pid = blocker.info.backend_pid
    changing(blocker, app_database)
    other = connect()
    call = sql.SQL("CALL pgfreeze.thaw({})").format(sql.Literal(app_database))

    with background(lambda: other.execute(call)) as called:
        wait_until(lambda: server.execute("SELECT 1 FROM pg_locks WHERE NOT granted"))
        resume(connect, databases=[app_database], holder="test")
        called.result(30)

    assert [one["pid"] for one in thawed(connect).in_the_way] == [pid]


def test_a_thaw_that_gets_no_second_session_waits_for_who_is_in_its_way(own_server, connect_to, new_database):
    connect, database = connect_to(own_server), new_database(own_server)
    pause(connect, databases=[database], holder="test", dead_man=False)
    wait_until(lambda: not own_server.execute("SELECT 1 FROM pg_stat_activity WHERE usename = 'freezer'"))
    own_server.execute("ALTER ROLE freezer CONNECTION LIMIT 1")
    with own_server.control() as blocker:
        changing(blocker, database)
        later = threading.Timer(3, lambda: blocker.execute("ROLLBACK"))
        later.start()

        (freeze,) = resume(connect, databases=[database], holder="test").thawed

        later.join()
    assert freeze.state is State.THAWED


def test_who_has_locked_the_journal_is_ended_when_the_lease_is_over(connect, server, app_database, app_connect):
    frozen = pause(connect, databases=[app_database], holder="test", lease=SECONDS[3], drain_timeout=SECONDS[1])
    careless = connect()
    careless.execute("BEGIN; LOCK TABLE pgfreeze.freezes IN ACCESS EXCLUSIVE MODE")

    # It is not asked whether it lives: that would be a statement of its transaction.
    wait_until(
        lambda: not server.execute(f"SELECT 1 FROM pg_stat_activity WHERE pid = {careless.info.backend_pid}"), 20
    )

    assert wait_until(lambda: thawed(connect), within=10).token == frozen.token


def test_before_the_lease_is_over_nobody_is_ended_by_the_watch(connect, server, app_database, app_connect, tenant):
    pause(connect, databases=[app_database], holder="test", admit="readers")
    busy = app_connect(app_database, tenant)
    changing(busy, app_database)
    locked = connect()
    locked.execute("BEGIN; LOCK TABLE pgfreeze.freezes IN ACCESS EXCLUSIVE MODE")

    time.sleep(4)

    locked.execute("COMMIT")
    busy.execute("ROLLBACK")


def test_a_superuser_in_the_way_is_named_with_what_to_type_and_keeps_only_that_database(
    connect, server, new_database, super_connect, app_connect
):
    kept, other = new_database(), new_database()
    before = settings_of(server)
    pause(connect, databases=[kept, other], holder="test")
    server.execute("UPDATE pgfreeze.freezes SET lease_until = clock_timestamp() WHERE state <> 'thawed'")
    blocker = super_connect()
    changing(blocker, kept)

    wait_until(lambda: any(one.in_the_way for one in status(connect).freezes), within=20)
    (freeze,) = status(connect, databases=[kept]).freezes
    wait_until(lambda: not is_read_only(app_connect(other)), within=10)

    (way,) = freeze.in_the_way
    assert (way["pid"], way["ended"]) == (blocker.info.backend_pid, False)
    assert f"pg_terminate_backend({blocker.info.backend_pid})" in way["why_not"]
    assert freeze.state is State.THAWING
    assert kept in str(freeze.left_over)
    assert other not in str(freeze.left_over)
    assert is_alive(blocker)
    shown = shown_by_status(server, kept)
    assert f"left over 1 DATABASE {kept}: default_transaction_read_only" in shown
    assert f"SELECT pg_catalog.pg_terminate_backend({blocker.info.backend_pid})" in shown
    server.execute(way["why_not"].partition("as a superuser, ")[2])
    wait_until(lambda: thawed(connect), within=15)
    assert settings_of(server) == before


def shown_by_status(server, database):
    program = [sys.executable, "-m", "pg_freeze", "status", "-d", database]
    environment = {**os.environ, "PG_FREEZE_DSN": server.dsn("postgres", "freezer"), "COLUMNS": "300"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=100, check=True)
    return " ".join(done.stdout.split())


def test_a_prepared_transaction_in_the_way_is_named(connect, server, app_database, super_connect):
    pause(connect, databases=[app_database], holder="test")
    admin = super_connect()
    changing(admin, app_database)
    admin.execute("PREPARE TRANSACTION 'left behind'")
    try:
        with pytest.raises(ThawFailed, match=r"in the way was a transaction.*ROLLBACK PREPARED 'left behind'"):
            resume(connect, databases=[app_database], holder="test")
        (freeze,) = status(connect, databases=[app_database]).freezes
        assert "ROLLBACK PREPARED 'left behind'" in freeze.in_the_way[0]["why_not"]
    finally:
        admin.execute("ROLLBACK PREPARED 'left behind'")
    wait_until(lambda: thawed(connect), within=15)


def test_a_database_whose_owner_was_changed_keeps_no_other_frozen_and_is_named(
    connect, server, new_database, app_connect
):
    lost, others = new_database(), [new_database(), new_database()]
    before = settings_of(server)
    pause(connect, databases=[lost, *others], holder="test", admit="nobody")
    alter(server, "ALTER DATABASE {} OWNER TO postgres", lost)

    with pytest.raises(ThawFailed, match=lost):
        resume(connect, databases=[lost], holder="test")

    for name in others:
        app_connect(name).execute("CREATE TABLE t ()")
    (freeze,) = status(connect, databases=[lost]).freezes
    assert freeze.state is State.THAWING
    assert {lost in one["what"] for one in freeze.left_over} == {True}
    # Those that are thawed can be frozen again by somebody else.
    pause(connect, databases=others, holder="somebody else")
    resume(connect, databases=others, holder="somebody else")
    alter(server, "ALTER DATABASE {} OWNER TO app_owner", lost)
    resume(connect, databases=[lost], holder="test")
    assert settings_of(server) == before
    assert status(connect, databases=[lost, *others]).freezes == ()


def test_a_role_that_became_a_superuser_keeps_nothing_but_its_own_override(
    own_server, connect_to, new_database, app_connect
):
    server, connect, database = own_server, connect_to(own_server), new_database(own_server)
    server.execute("ALTER ROLE freezer CREATEROLE")
    server.create_role("batch")
    if server.version >= 16:
        server.execute("GRANT batch TO freezer WITH ADMIN OPTION")
    server.execute("ALTER ROLE batch SET default_transaction_read_only = off")
    before = settings_of(server)
    pause(connect, databases=[database], holder="test")
    reader = app_connect(database, server=server)
    server.execute("ALTER ROLE batch SUPERUSER")

    with pytest.raises(ThawFailed, match="ROLE batch IN DATABASE"):
        resume(connect, databases=[database], holder="test")

    app_connect(database, server=server).execute("CREATE TABLE t ()")
    assert not is_alive(reader)
    (freeze,) = status(connect).freezes
    assert [one["what"] for one in freeze.left_over] == [
        f"ROLE batch IN DATABASE {database}: default_transaction_read_only"
    ]
    with pytest.raises(FreezeRefused, match="held by"):
        pause(connect, databases=[database], holder="somebody else")
    server.execute("ALTER ROLE batch NOSUPERUSER")
    wait_until(lambda: settings_of(server) == before, within=15)


def test_a_new_database_under_the_name_of_a_dropped_one_is_not_frozen_and_can_be(
    connect, server, app_database, app_connect
):
    pause(connect, databases=[app_database], holder="test")
    alter(server, "DROP DATABASE {}", app_database)
    server.create_database(app_database, "app_owner")

    assert status(connect, databases=[app_database]).freezes == ()
    (stale,) = [one for one in status(connect).freezes if app_database in one.databases]
    assert (stale.holds, stale.dropped) == (False, (app_database,))
    server.execute(sql.SQL("CALL pgfreeze.thaw({})").format(sql.Literal(app_database)))
    assert pause(connect, databases=[app_database], holder="other").holds
    resume(connect, databases=[app_database], holder="other")
    server.execute("CALL pgfreeze.thaw_all()")
    assert [one for one in status(connect).freezes if app_database in one.databases] == []


@pytest.mark.parametrize("admit", ["readers-once-drained", "nobody"])
def test_a_login_role_cannot_hold_up_a_freeze_by_an_override_of_its_own(
    connect, server, app_database, app_connect, admit
):
    nosy = app_connect(app_database)
    nosy.execute("ALTER ROLE app SET default_transaction_read_only = off")
    before = settings_of(server)
    try:
        freeze = pause(connect, databases=[app_database], holder="test", admit=admit)
        assert freeze.holds
        assert ("role-override" in {one["code"] for one in freeze.warnings}) == (admit != "nobody")
        resume(connect, databases=[app_database], holder="test")
        assert settings_of(server) == before
    finally:
        server.execute("ALTER ROLE app RESET ALL")


def test_a_login_role_cannot_hold_up_a_freeze_by_an_advisory_lock(own_server, connect_to, new_database, app_connect):
    nosy = app_connect("postgres", server=own_server)
    for key in ("pgfreeze", "airflow_pg_freeze", "airflow-pg-freeze"):
        nosy.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0)), pg_advisory_lock(hashtext(%s))", (key, key))

    freeze = pause(connect_to(own_server), databases=[new_database(own_server)], holder="test")

    assert freeze.holds


def test_two_first_pauses_at_once_install_one_journal(own_server, connect_to):
    connect = connect_to(own_server)

    with background(lambda: install(connect)) as one, background(lambda: install(connect)) as two:
        assert sorted([one.result(30), two.result(30)]) == [False, True]


@pytest.mark.pg(">=15")
def test_a_subscription_that_an_error_would_disable_for_good_is_not_frozen_by_privileges(server, app_database):
    with server.control(app_database) as conn:
        conn.execute(
            "CREATE SUBSCRIPTION fragile CONNECTION 'host=/nowhere' PUBLICATION p "
            "WITH (connect = false, disable_on_error = true)"
        )
        conn.execute("ALTER SUBSCRIPTION fragile SET (slot_name = 's')")
        conn.execute("ALTER SUBSCRIPTION fragile ENABLE")
    connect = server.connect_factory("postgres", app_database)
    try:
        with pytest.raises(FreezeRefused, match=r"fragile.*disable_on_error"):
            pause(connect, databases=[app_database], holder="test", strategy="privileges")
        server.execute("ALTER SUBSCRIPTION fragile SET (disable_on_error = false)", app_database)
        assert pause(connect, databases=[app_database], holder="test", strategy="privileges").holds
        resume(connect, databases=[app_database], holder="test")
    finally:
        with server.control(app_database) as conn:
            conn.execute("ALTER SUBSCRIPTION fragile DISABLE")
            conn.execute("ALTER SUBSCRIPTION fragile SET (slot_name = NONE)")
            conn.execute("DROP SUBSCRIPTION fragile")
