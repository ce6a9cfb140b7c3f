"""Pausing: what is committed together, who may do what meanwhile, and what a second pause does."""

from datetime import timedelta

import psycopg
import pytest

from devtools.asking import pause
from pg_freeze import Admit, DrainTimeout, FreezeRefused, State, history, resume, status
from tests.server.clients import SECONDS, alter, background, is_alive, is_read_only, ms, settings_of, wait_until

pytestmark = pytest.mark.every_version


def test_a_paused_database_refuses_writes_and_answers_reads(connect, app_database, app_connect):
    app_connect(app_database).execute("CREATE TABLE t AS SELECT 1 AS i")

    frozen = pause(connect, databases=[app_database], holder="test")

    reader = app_connect(app_database)
    assert reader.execute("SELECT i FROM t").fetchall() == [(1,)]
    for write in ("INSERT INTO t VALUES (2)", "UPDATE t SET i = 3", "DELETE FROM t", "CREATE TABLE u ()", "TRUNCATE t"):
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            reader.execute(write)
    assert (frozen.state, frozen.lingering) == (State.FROZEN, ())
    assert frozen.requested_at <= frozen.barrier_at <= frozen.drained_at <= frozen.frozen_at < frozen.lease_until


def test_several_databases_freeze_and_thaw_as_one(connect, new_database, app_connect):
    names = [new_database(), new_database()]
    sessions = [app_connect(name) for name in names]

    frozen = pause(connect, databases=names, holder="test")

    assert frozen.databases == tuple(names)
    assert not any(map(is_alive, sessions))
    for name in names:
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            app_connect(name).execute("CREATE TABLE t ()")
    resumed = resume(connect, databases=names[:1], holder="test")
    assert [freeze.token for freeze in resumed.thawed] == [frozen.token]
    for name in names:
        app_connect(name).execute("CREATE TABLE t ()")


def test_the_same_database_named_twice_is_frozen_once(connect, app_database):
    assert pause(connect, databases=[app_database, app_database], holder="test").databases == (app_database,)


def test_when_a_roles_override_cannot_be_countered_nothing_at_all_changes(own_server, connect_to, new_database):
    # The superuser's override appears between preflight, which would have refused, and the freezing transaction: just
    # when the dead-man switch is started.
    first, second = new_database(own_server), new_database(own_server)
    opened, connect = [], connect_to(own_server)

    def connect_and_override():
        opened.append(None)
        if len(opened) == 2:
            own_server.execute("ALTER ROLE postgres SET default_transaction_read_only = off")
        return connect()

    before = settings_of(own_server)[0]
    with pytest.raises(FreezeRefused) as refused:
        pause(connect_and_override, databases=[first, second], holder="test")

    assert isinstance(refused.value.__cause__, psycopg.errors.InsufficientPrivilege)
    own_server.execute("ALTER ROLE postgres RESET default_transaction_read_only")
    assert settings_of(own_server) == (before, (None,))
    assert history(connect) == ()


def test_a_freeze_of_a_database_that_was_dropped_and_made_anew_is_not_adopted(
    connect, server, new_database, app_connect
):
    database = new_database()
    stale = pause(connect, databases=[database], holder="test")
    alter(server, "DROP DATABASE {}", database)
    server.create_database(database, "app_owner")

    frozen = pause(connect, databases=[database], holder="test")

    assert frozen.token != stale.token
    with app_connect(database) as conn:
        assert is_read_only(conn)
    resume(connect, databases=[database], holder="test")
    assert not [one for one in status(connect).freezes if database in one.databases and one.holds]


def test_a_database_that_is_dropped_just_before_the_freeze_leaves_the_others_alone(connect, server, new_database):
    names = [new_database(), new_database()]
    opened = []

    def connect_and_drop():
        opened.append(None)
        if len(opened) == 2:
            alter(server, "ALTER DATABASE {} RENAME TO gone", names[1])
        return connect()

    before = settings_of(server)
    with pytest.raises(FreezeRefused, match="dropped or renamed"):
        pause(connect_and_drop, databases=names, holder="test")

    alter(server, "ALTER DATABASE gone RENAME TO {}", names[1])
    assert settings_of(server) == before


@pytest.mark.parametrize("admit", Admit)
def test_who_may_connect_while_it_drains_and_after(connect, server, app_database, app_connect, admit):
    writer = app_connect(app_database)
    writer.execute("CREATE TABLE t ()")
    writer.execute("BEGIN; INSERT INTO t DEFAULT VALUES")
    while_draining = []

    def look(progress):
        if progress.lingering and not while_draining:
            while_draining.append(may_read(server, app_database))
            writer.execute("COMMIT")

    frozen = pause(connect, databases=[app_database], holder="test", admit=admit, progress=look)

    assert while_draining == [admit is Admit.READERS]
    assert may_read(server, app_database) is (admit is not Admit.NOBODY)
    assert frozen.admit is admit
    resume(connect, databases=[app_database], holder="test")
    assert app_connect(app_database).execute("SELECT count(*) FROM t").fetchone() == (1,)
    assert not is_read_only(app_connect(app_database))


def may_read(server, database):
    try:
        conn = psycopg.connect(server.dsn(database, "app"))
    except psycopg.OperationalError as error:
        if "not currently accepting connections" not in str(error):
            raise
        return False
    with conn:
        assert is_read_only(conn)
        conn.execute("SELECT count(*) FROM t")
    return True


def test_with_admit_readers_no_connection_is_refused_from_beginning_to_end(connect, server, app_database):
    refused, answers, stop = [], [], []

    def connect_again_and_again():
        while not stop:
            try:
                with psycopg.connect(server.dsn(app_database, "app")) as conn:
                    answers.append(conn.execute("SHOW transaction_read_only").fetchone()[0])
            except psycopg.OperationalError as error:
                # Others were ended after they were let in: drained, or read-only when the thaw came.
                if "not currently accepting connections" in str(error):
                    refused.append(error)

    with background(connect_again_and_again) as reader:
        try:
            for _ in range(5):
                pause(connect, databases=[app_database], holder="test", admit="readers")
                seen = len(answers)
                wait_until(lambda seen=seen: len(answers) > seen + 5)
                resume(connect, databases=[app_database], holder="test")
        finally:
            stop.append(True)
        reader.result(10)

    assert refused == []
    assert {"on", "off"} == set(answers)


def test_at_the_drain_timeout_what_is_left_is_terminated(connect, app_database, app_connect):
    writer = app_connect(app_database)
    writer.execute("BEGIN; CREATE TABLE t ()")

    frozen = pause(connect, databases=[app_database], holder="test", drain_timeout=ms(500))

    assert dict(frozen.terminated) == {"drain-timeout": 1}
    assert ms(500) <= frozen.drained_at - frozen.barrier_at < SECONDS[3]
    assert not is_alive(writer)
    assert app_connect(app_database).execute("SELECT to_regclass('t')").fetchone() == (None,)


def test_at_the_drain_timeout_abort_undoes_everything_and_names_who_is_left(connect, server, app_database, app_connect):
    before = settings_of(server)
    writer = app_connect(app_database, application_name="nightly import")
    writer.execute("BEGIN; CREATE TABLE t ()")

    with pytest.raises(DrainTimeout, match="nightly import") as timeout:
        pause(connect, databases=[app_database], holder="test", drain_timeout=ms(300), on_drain_timeout="abort")

    (left,) = timeout.value.backends
    assert (left.pid, left.role, left.application) == (writer.info.backend_pid, "app", "nightly import")
    assert left.transaction_age > ms(300)
    assert settings_of(server) == before
    writer.execute("COMMIT")
    app_connect(app_database).execute("INSERT INTO t DEFAULT VALUES")
    (undone,) = history(connect, limit=1)
    assert (undone.state, undone.thawed_by) == (State.THAWED, "undone: DrainTimeout")


def test_the_same_holder_adopts_its_freeze_and_extends_the_lease(connect, server, app_database):
    before = settings_of(server)
    first = pause(connect, databases=[app_database], holder="test", lease=SECONDS[40])

    second = pause(connect, databases=[app_database], holder="test", lease=SECONDS[60])
    third = pause(connect, databases=[app_database], holder="test", lease=SECONDS[30])

    assert first.token == second.token == third.token
    assert first.barrier_at == second.barrier_at == third.barrier_at
    assert first.ticket < second.ticket < third.ticket
    assert second.lease_until - first.lease_until > SECONDS[19]
    assert third.lease_until == second.lease_until
    assert third.dead_man_pid == first.dead_man_pid is not None
    rows = server.execute("SELECT count(*) FROM pgfreeze.prior_settings WHERE token = '" + str(first.token) + "'")
    assert rows == [(1,)]
    resume(connect, databases=[app_database], holder="test")
    assert settings_of(server) == before


def test_the_order_in_which_databases_are_named_does_not_matter_for_adoption(connect, new_database):
    one, other = new_database(), new_database()

    first = pause(connect, databases=[one, other], holder="test")

    assert pause(connect, databases=[other, one], holder="test").token == first.token


def test_another_holder_is_refused_and_told_who_holds_it_since_when_and_until_when(connect, server, app_database):
    mine = pause(connect, databases=[app_database], holder="nightly/run 1")
    before = settings_of(server)

    with pytest.raises(FreezeRefused) as refused:
        pause(connect, databases=[app_database], holder="somebody else")

    (finding,) = refused.value.findings
    facts = mine.as_dict()
    for fact in (repr(app_database), "'nightly/run 1'", facts["requested_at"], facts["lease_until"]):
        assert fact in str(refused.value)
    assert finding.code == "held"
    assert settings_of(server) == before
    (still,) = status(connect, databases=[app_database]).freezes
    assert still == mine


def test_one_of_several_databases_held_by_another_keeps_all_from_freezing(connect, new_database, app_connect):
    held, free = new_database(), new_database()
    pause(connect, databases=[held], holder="other")

    with pytest.raises(FreezeRefused, match="'other'"):
        pause(connect, databases=[free, held], holder="test")

    app_connect(free).execute("CREATE TABLE t ()")


@pytest.mark.parametrize("change", [{"databases": 2}, {"admit": "nobody"}])
def test_a_pause_for_something_else_than_the_holder_already_has_is_refused(connect, new_database, change):
    names = [new_database(), new_database()]
    pause(connect, databases=names[:1], holder="test")

    with pytest.raises(FreezeRefused, match="another set of databases, strategy, admit or roles"):
        pause(
            connect,
            databases=names[: change.get("databases", 1)],
            holder="test",
            admit=change.get("admit", "readers-once-drained"),
        )


def test_two_holders_that_pause_at_once_do_not_both_get_it(connect, app_database):
    results = []

    def attempt(holder):
        try:
            results.append(pause(connect, databases=[app_database], holder=holder).holder)
        except FreezeRefused:
            results.append(None)

    with background(lambda: attempt("one")), background(lambda: attempt("two")):
        pass

    assert None in results
    (freeze,) = status(connect, databases=[app_database]).freezes
    assert {freeze.holder, None} == set(results)


def test_an_error_in_a_progress_callback_undoes_the_freeze_and_comes_through(connect, server, app_database):
    before = settings_of(server)

    def fail(progress):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        pause(connect, databases=[app_database], holder="test", progress=fail)

    assert settings_of(server) == before
    assert status(connect, databases=[app_database]).freezes == ()


def test_an_interrupt_undoes_the_freeze(connect, server, app_database):
    before = settings_of(server)

    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pause(connect, databases=[app_database], holder="test", progress=interrupt)

    assert settings_of(server) == before


def test_a_freeze_without_dead_man_switch_is_possible_when_asked_for(connect, app_database):
    frozen = pause(connect, databases=[app_database], holder="test", dead_man=False, lease=timedelta(minutes=1))

    assert (frozen.state, frozen.dead_man_pid) == (State.FROZEN, None)


@pytest.mark.pg(">=15")
def test_the_final_checkpoint_can_be_part_of_the_pause(connect, app_database):
    frozen = pause(connect, databases=[app_database], holder="test", checkpoint=True)

    assert frozen.checkpoint_at > frozen.frozen_at
    assert frozen.checkpoint_lsn is not None


def test_the_xcom_form_is_json_with_times_in_utc(connect, app_database):
    import json

    frozen = pause(connect, databases=[app_database], holder="test").as_dict()

    assert json.loads(json.dumps(frozen)) == frozen
    assert frozen["frozen_at"].endswith("Z")
    assert {"token", "holder", "databases", "state", "admit", "requested_at", "barrier_at", "frozen_at"} <= set(frozen)
    assert {"lease_until", "checkpoint_lsn", "terminated", "lingering"} <= set(frozen)
