"""Resuming: what it thaws, what it leaves alone, and what becomes of the sessions that were read-only."""

import threading
import time
from contextlib import suppress
from datetime import timedelta

import psycopg
import pytest
from psycopg import sql

from devtools.asking import pause
from pg_freeze import FreezeRefused, State, history, resume, status
from tests.server.clients import SECONDS, background, is_alive, is_read_only, ms, settings_of, wait_until


def test_a_resume_makes_writes_possible_and_says_what_it_ended(connect, app_database, app_connect):
    frozen = pause(connect, databases=[app_database], holder="test")
    reader = app_connect(app_database)

    resumed = resume(connect, databases=[app_database], holder="test")

    (thawed,) = resumed.thawed
    assert (thawed.token, thawed.state, thawed.thawed_by) == (frozen.token, State.THAWED, "resume by test")
    assert (thawed.readers_ended, resumed.others) == (1, ())
    assert frozen.frozen_at < thawed.restored_at <= thawed.thawed_at
    assert not is_alive(reader)
    app_connect(app_database).execute("CREATE TABLE t ()")


def test_resuming_what_is_not_frozen_succeeds_and_says_so(connect, app_database):
    assert resume(connect, databases=[app_database], holder="test").thawed == ()
    pause(connect, databases=[app_database], holder="test")
    assert len(resume(connect, databases=[app_database], holder="test").thawed) == 1

    again = resume(connect, databases=[app_database], holder="test")

    assert (again.thawed, again.others) == ((), ())


def test_resuming_where_nothing_was_ever_installed_succeeds(own_server, connect_to, new_database):
    database = new_database(own_server)

    assert resume(connect_to(own_server), databases=[database], holder="test").thawed == ()
    assert own_server.execute("SELECT count(*) FROM pg_namespace WHERE nspname = 'pgfreeze'") == [(0,)]


def test_resuming_a_database_that_does_not_exist_is_refused(connect, app_database):
    pause(connect, databases=[app_database], holder="test")

    with pytest.raises(FreezeRefused, match="'misspelt'"):
        resume(connect, databases=["misspelt"], holder="test")


def test_a_strangers_resume_leaves_the_freeze_alone_and_names_its_holder(connect, server, app_database, app_connect):
    mine = pause(connect, databases=[app_database], holder="test")
    reader = app_connect(app_database)
    before = settings_of(server)

    resumed = resume(connect, databases=[app_database], holder="stranger")

    assert resumed.thawed == ()
    assert resumed.others == (mine,)
    assert settings_of(server) == before
    assert is_alive(reader)


def test_force_thaws_somebody_elses_freeze(connect, app_database, app_connect):
    pause(connect, databases=[app_database], holder="test")

    resumed = resume(connect, databases=[app_database], holder="on call", force=True)

    (thawed,) = resumed.thawed
    assert (thawed.holder, thawed.thawed_by) == ("test", "resume by on call")
    app_connect(app_database).execute("CREATE TABLE t ()")


def test_a_resume_thaws_its_own_freeze_and_reports_the_others(connect, new_database, app_connect):
    mine, theirs = new_database(), new_database()
    pause(connect, databases=[mine], holder="test")
    pause(connect, databases=[theirs], holder="other")

    resumed = resume(connect, databases=[mine, theirs], holder="test")

    assert [freeze.databases for freeze in resumed.thawed] == [(mine,)]
    assert [freeze.databases for freeze in resumed.others] == [(theirs,)]
    app_connect(mine).execute("CREATE TABLE t ()")
    assert is_read_only(app_connect(theirs))


@pytest.mark.parametrize("user", ["postgres", "freezer"])
def test_a_person_with_psql_can_thaw(connect, server, app_database, app_connect, user):
    before = settings_of(server)
    pause(connect, databases=[app_database], holder="test")

    with psycopg.connect(server.dsn(user=user), autocommit=True) as conn:
        conn.execute(sql.SQL("CALL pgfreeze.thaw({})").format(sql.Literal(app_database)))

    assert settings_of(server) == before
    app_connect(app_database).execute("CREATE TABLE t ()")
    (thawed,) = history(connect, limit=1)
    assert (thawed.state, thawed.thawed_by) == (State.THAWED, f"thaw by {user}")


def test_thawing_a_database_that_is_not_frozen_says_so(server, connect, app_database):
    pause(connect, databases=[app_database], holder="test")
    resume(connect, databases=[app_database], holder="test")
    said = []

    with server.control() as conn:
        conn.add_notice_handler(lambda notice: said.append(notice.message_primary))
        conn.execute("CALL pgfreeze.thaw('no such database')")

    assert said == ['database "no such database" is not frozen, as far as the journal in "postgres" tells']


def test_thaw_all_thaws_every_freeze_of_every_holder(own_server, connect_to, new_database, app_connect):
    connect = connect_to(own_server)
    names = [new_database(own_server) for _ in range(3)]
    before = settings_of(own_server)
    pause(connect, databases=names[:2], holder="one")
    pause(connect, databases=names[2:], holder="other")

    own_server.execute("CALL pgfreeze.thaw_all()")

    assert settings_of(own_server) == before
    assert {freeze.thawed_by for freeze in history(connect)} == {"thaw_all by postgres"}
    assert status(connect).freezes == ()


def test_thaw_all_thaws_what_it_can_when_one_freeze_fails_and_then_fails(own_server, connect_to, new_database):
    connect = connect_to(own_server)
    stuck, free = new_database(own_server), new_database(own_server)
    pause(connect, databases=[stuck], holder="one")
    pause(connect, databases=[free], holder="other")
    own_server.execute(sql.SQL("ALTER DATABASE {} OWNER TO postgres").format(sql.Identifier(stuck)))

    with connect() as conn, pytest.raises(psycopg.Error) as failed:
        conn.execute("CALL pgfreeze.thaw_all()")

    assert failed.value.sqlstate == "PF005"
    assert [freeze.databases for freeze in status(connect).freezes] == [(stuck,)]


def test_thaw_expired_thaws_only_what_has_outlived_its_lease(own_server, connect_to, new_database, app_connect):
    connect = connect_to(own_server)
    short, long = new_database(own_server), new_database(own_server)
    pause(connect, databases=[short], holder="one", lease=SECONDS[1], drain_timeout=ms(500), dead_man=False)
    pause(connect, databases=[long], holder="other", dead_man=False)

    own_server.execute("CALL pgfreeze.thaw_expired()")
    assert len(status(connect).freezes) == 2
    time.sleep(1)
    own_server.execute("CALL pgfreeze.thaw_expired()")

    assert [freeze.databases for freeze in status(connect).freezes] == [(long,)]
    app_connect(short, server=own_server).execute("CREATE TABLE t ()")


def test_idle_readers_end_at_once_and_a_running_one_may_finish_within_its_grace(connect, app_database, app_connect):
    pause(connect, databases=[app_database], holder="test")
    idle, running = app_connect(app_database), app_connect(app_database)
    answers, wrote = [], []

    def meanwhile():
        wait_until(lambda: not is_alive(idle))
        app_connect(app_database).execute("CREATE TABLE t ()")
        wrote.append(running.broken or answers)

    with background(lambda: answers.append(running.execute("SELECT pg_sleep(1.5)").fetchone())):
        time.sleep(0.3)
        with background(meanwhile):
            started = time.monotonic()
            resume(connect, databases=[app_database], holder="test", reader_grace=SECONDS[20])
            took = time.monotonic() - started

    assert wrote in ([[]], [answers])
    assert answers == [("",)]
    assert took < 5
    assert not is_alive(running)


def test_a_reader_that_outlives_its_grace_is_ended(connect, app_database, app_connect):
    pause(connect, databases=[app_database], holder="test")
    running = app_connect(app_database)

    with background(lambda: running.execute("SELECT pg_sleep(30)")) as query:
        time.sleep(0.2)
        resume(connect, databases=[app_database], holder="test", reader_grace=ms(600))
        with pytest.raises(psycopg.OperationalError):
            query.result(5)


def test_without_grace_a_running_reader_is_ended_at_once(connect, app_database, app_connect):
    pause(connect, databases=[app_database], holder="test")
    running = app_connect(app_database)

    with background(lambda: running.execute("SELECT pg_sleep(30)")) as query:
        time.sleep(0.2)
        resume(connect, databases=[app_database], holder="test")
        with pytest.raises(psycopg.OperationalError):
            query.result(5)


@pytest.mark.parametrize("admit", ["readers-once-drained", "readers"])
def test_no_session_that_connects_around_a_thaw_stays_read_only(connect, server, app_database, admit):
    stop = threading.Event()
    opened: list[psycopg.Connection] = []

    def open_many():
        while not stop.is_set():
            try:
                opened.append(psycopg.connect(server.dsn(app_database, "app"), autocommit=True))
            except psycopg.OperationalError:
                time.sleep(0.001)

    try:
        with background(open_many), background(open_many), background(open_many):
            for _ in range(3):
                pause(connect, databases=[app_database], holder="test", admit=admit)
                seen = len(opened)
                wait_until(lambda seen=seen: len(opened) > seen + 10)
                resume(connect, databases=[app_database], holder="test")
            time.sleep(0.2)
            stop.set()
        alive = [conn for conn in opened if is_alive(conn)]
        assert alive
        assert not any(map(is_read_only, alive))
    finally:
        stop.set()
        for conn in opened:
            conn.close()


# post_auth_delay makes a session wait just after it has read its database's settings, and before others can see it in
# pg_stat_activity. Without it that moment lasts microseconds, or as long as a busy machine makes it.
SLOW_TO_START = "-c post_auth_delay=2"


def test_a_session_that_is_still_starting_during_the_thaw_does_not_stay_read_only(connect, server, app_database):
    pause(connect, databases=[app_database], holder="test")

    with background(
        lambda: psycopg.connect(server.dsn(app_database, "app", options=SLOW_TO_START), autocommit=True)
    ) as starting:
        time.sleep(0.7)
        resume(connect, databases=[app_database], holder="test")
        # It may as well be ended before it has begun.
        with suppress(psycopg.OperationalError), starting.result(10) as conn:
            assert not is_read_only(conn)


def test_a_replication_connection_that_ran_sql_while_frozen_does_not_stay_read_only(
    connect, server, app_database, super_connect
):
    pause(connect, databases=[app_database], holder="test")
    server.execute("ALTER ROLE app REPLICATION")
    try:
        with psycopg.connect(server.dsn(app_database, "app", replication="database"), autocommit=True) as conn:
            assert conn.execute("SHOW transaction_read_only", prepare=False).fetchone() == ("on",)

            resume(connect, databases=[app_database], holder="test")

            assert not is_alive(conn) or not is_read_only(conn)
    finally:
        server.execute("ALTER ROLE app NOREPLICATION")


def test_a_thaw_waits_for_a_setting_that_somebody_else_changes_at_the_same_moment(
    connect, server, app_database, super_connect, app_connect
):
    pause(connect, databases=[app_database], holder="test")
    admin = super_connect()
    admin.execute("BEGIN")
    admin.execute(sql.SQL("ALTER DATABASE {} SET work_mem = '5MB'").format(sql.Identifier(app_database)))

    with background(lambda: resume(connect, databases=[app_database], holder="test")) as resuming:
        time.sleep(0.5)
        admin.execute("COMMIT")
        assert len(resuming.result(15).thawed) == 1

    session = app_connect(app_database)
    assert session.execute("SHOW work_mem").fetchone() == ("5MB",)
    assert not is_read_only(session)


def test_a_reader_grace_must_not_be_negative(connect, app_database):
    with pytest.raises(FreezeRefused, match="must not be negative"):
        resume(connect, databases=[app_database], holder="test", reader_grace=timedelta(seconds=-1))
