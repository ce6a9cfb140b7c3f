"""The facts about PostgreSQL that the code rests on, one by one: if one fails, a protocol step has to change."""

import time

import psycopg
import pytest
from psycopg import errors, sql

from tests.server.clients import alter, background, is_alive, is_read_only, wait_until

pytestmark = pytest.mark.every_version

READ_ONLY = "ALTER DATABASE {} SET default_transaction_read_only = on"


def starting_in(server, database):
    return server.execute(
        sql.SQL(
            "SELECT l.pid FROM pg_locks l JOIN pg_database d ON d.oid = l.objid"
            " WHERE l.classid = 'pg_database'::regclass AND l.locktype = 'object' AND l.mode = 'RowExclusiveLock'"
            " AND l.granted AND d.datname = {}"
        ).format(sql.Literal(database))
    )


def test_both_alters_of_a_database_commit_or_vanish_together_with_rows(server, connect, app_database, app_connect):
    with connect() as conn:
        conn.execute("CREATE TEMP TABLE journal (i int)")
        for end in ("ROLLBACK", "COMMIT"):
            conn.execute("BEGIN")
            conn.execute("INSERT INTO journal VALUES (1)")
            conn.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(app_database)))
            conn.execute(sql.SQL(READ_ONLY).format(sql.Identifier(app_database)))
            conn.execute(end)
            changed = conn.execute(
                "SELECT (SELECT count(*) FROM journal), NOT datallowconn, EXISTS (SELECT FROM pg_db_role_setting s"
                " WHERE s.setdatabase = d.oid) FROM pg_database d WHERE datname = %s",
                [app_database],
            ).fetchone()
            assert changed == ((1, True, True) if end == "COMMIT" else (0, False, False))


def test_a_closed_database_refuses_superusers_too(server, app_database, super_connect):
    alter(server, "ALTER DATABASE {} ALLOW_CONNECTIONS false", app_database)

    with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
        super_connect(app_database)


def test_a_database_cannot_be_closed_from_inside(app_database, super_connect):
    with pytest.raises(errors.InvalidParameterValue, match="current database"):
        super_connect(app_database).execute(
            sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(app_database))
        )


def test_a_read_only_session_cannot_reset_the_setting_that_made_it_so(server, app_database, super_connect):
    alter(server, READ_ONLY, app_database)

    with pytest.raises(errors.ReadOnlySqlTransaction):
        super_connect(app_database).execute(
            sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(sql.Identifier(app_database))
        )


def test_a_session_that_began_before_the_settings_is_not_affected(server, app_database, app_connect):
    session = app_connect(app_database)
    alter(server, READ_ONLY, app_database)
    alter(server, "ALTER DATABASE {} ALLOW_CONNECTIONS false", app_database)

    session.execute("CREATE TABLE t ()")


def test_a_role_in_a_database_goes_before_the_role_and_that_before_the_database(server, app_database):
    server.create_role("precedent")
    try:
        for statement, read_only in (
            (READ_ONLY, True),
            ("ALTER ROLE precedent SET default_transaction_read_only = off", False),
            ("ALTER ROLE precedent IN DATABASE {} SET default_transaction_read_only = on", True),
        ):
            server.execute(sql.SQL(statement).format(sql.Identifier(app_database)))
            with psycopg.connect(server.dsn(app_database, "precedent")) as conn:
                assert is_read_only(conn) is read_only
    finally:
        alter(server, "ALTER ROLE precedent IN DATABASE {} RESET ALL", app_database)
        server.execute("DROP ROLE precedent")


def test_a_setting_for_all_roles_in_a_database_is_the_databases_own(server, app_database):
    alter(server, "ALTER ROLE ALL IN DATABASE {} SET default_transaction_read_only = on", app_database)
    alter(server, "ALTER DATABASE {} SET default_transaction_read_only = off", app_database)

    rows = server.execute(
        sql.SQL(
            "SELECT setrole, setconfig FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase"
            " WHERE datname = {}"
        ).format(sql.Literal(app_database))
    )
    assert rows == [(0, ["default_transaction_read_only=off"])]


def test_a_setting_for_all_roles_everywhere_does_not_go_before_the_databases(own_server, new_database, app_connect):
    database = new_database(own_server)
    own_server.execute("ALTER ROLE ALL SET default_transaction_read_only = off")
    alter(own_server, READ_ONLY, database)

    assert is_read_only(app_connect(database, server=own_server))


def test_the_name_of_a_setting_is_kept_in_its_usual_case_however_it_was_written(server, app_database):
    alter(server, 'ALTER DATABASE {} SET "Default_Transaction_READ_only" = off', app_database)

    assert server.execute("SELECT setconfig FROM pg_db_role_setting ORDER BY setdatabase DESC LIMIT 1") == [
        (["default_transaction_read_only=off"],)
    ]


@pytest.mark.parametrize("how", ["SET default_transaction_read_only = off", "BEGIN READ WRITE", "PGOPTIONS"])
def test_read_only_is_a_default_that_a_client_can_override(server, app_database, app_connect, how):
    alter(server, READ_ONLY, app_database)
    if how == "PGOPTIONS":
        session = app_connect(app_database, options="-c default_transaction_read_only=off")
    else:
        session = app_connect(app_database)
        session.execute(sql.SQL(how))

    session.execute("CREATE TABLE t ()")


@pytest.mark.parametrize(
    "statement",
    [
        "VACUUM t",
        "ANALYZE t",
        "REINDEX TABLE t",
        "NOTIFY n",
        "SELECT pg_advisory_lock(1)",
        "SELECT pg_logical_emit_message(false, 'a', 'b')",
    ],
)
def test_some_statements_are_allowed_in_a_read_only_session(server, app_database, app_connect, statement):
    app_connect(app_database).execute("CREATE TABLE t ()")
    alter(server, READ_ONLY, app_database)
    session = app_connect(app_database)

    assert is_read_only(session)
    session.execute(sql.SQL(statement))


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT nextval('s')",
        "CREATE TEMP TABLE u ()",
        "SELECT FROM t FOR UPDATE",
        "TRUNCATE t",
        pytest.param("SELECT lo_create(0)", marks=pytest.mark.pg(">=16")),
    ],
)
def test_most_statements_are_refused_in_a_read_only_session(server, app_database, app_connect, statement):
    app_connect(app_database).execute("CREATE TABLE t (); CREATE SEQUENCE s")
    alter(server, READ_ONLY, app_database)

    with pytest.raises(errors.ReadOnlySqlTransaction):
        app_connect(app_database).execute(sql.SQL(statement))


def test_commit_prepared_changes_visible_data_from_a_read_only_session(server, app_database, app_connect):
    writer = app_connect(app_database)
    writer.execute("CREATE TABLE t (i int)")
    writer.execute("BEGIN; INSERT INTO t VALUES (1)")
    writer.execute("PREPARE TRANSACTION 'fact'")
    alter(server, READ_ONLY, app_database)
    reader = app_connect(app_database)
    assert reader.execute("SELECT * FROM t").fetchall() == []

    reader.execute("COMMIT PREPARED 'fact'")

    assert reader.execute("SELECT * FROM t").fetchall() == [(1,)]


def test_a_session_that_starts_holds_a_lock_on_its_database_until_it_can_be_seen(server, app_database):
    # post_auth_delay comes after the settings were read, and before pg_stat_activity names the database.
    dsn = server.dsn(app_database, "app", options="-c post_auth_delay=1")
    seen = sql.SQL("SELECT pid FROM pg_stat_activity WHERE datname = {}").format(sql.Literal(app_database))

    with background(lambda: psycopg.connect(dsn)) as starting:
        pids = wait_until(lambda: starting_in(server, app_database))
        assert server.execute(seen) == []
        with starting.result(10) as conn:
            assert [(conn.info.backend_pid,)] == pids == server.execute(seen)
            assert starting_in(server, app_database) == []


def test_nothing_else_holds_that_lock_in_that_mode(server, app_database, super_connect):
    for statement in (
        "ALTER DATABASE {} ALLOW_CONNECTIONS true",
        "ALTER DATABASE {} SET work_mem = '4MB'",
        "ALTER DATABASE {} OWNER TO app_owner",
        "GRANT CONNECT ON DATABASE {} TO app",
        "COMMENT ON DATABASE {} IS 'x'",
    ):
        conn = super_connect()
        conn.execute("BEGIN")
        conn.execute(sql.SQL(statement).format(sql.Identifier(app_database)))
        assert starting_in(server, app_database) == [], statement
        conn.execute("COMMIT")


def test_pg_stat_activity_stands_still_within_a_transaction_and_not_in_autocommit(
    server, connect, app_database, app_connect
):
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
    with connect() as conn:
        assert conn.execute(count, [app_database]).fetchone() == (0,)
        conn.execute("BEGIN")
        assert conn.execute(count, [app_database]).fetchone() == (0,)
        app_connect(app_database)
        assert conn.execute(count, [app_database]).fetchone() == (0,)
        conn.execute("COMMIT")
        assert conn.execute(count, [app_database]).fetchone() == (1,)


def test_without_pg_read_all_stats_others_states_are_null_but_not_their_pid_and_database(
    own_server, connect_to, new_database, app_connect
):
    database = new_database(own_server)
    session = app_connect(database, server=own_server)
    own_server.execute("REVOKE pg_read_all_stats FROM freezer")

    with connect_to(own_server)() as conn:
        row = conn.execute(
            "SELECT pid, usename, state, xact_start, backend_start, backend_type FROM pg_stat_activity"
            " WHERE datname = %s",
            [database],
        ).fetchone()

    assert row == (session.info.backend_pid, "app", None, None, None, None)


def test_an_ordinary_role_may_not_end_a_superusers_session(connect, app_database, super_connect):
    admin = super_connect(app_database)

    with connect() as conn, pytest.raises(errors.InsufficientPrivilege):
        conn.execute("SELECT pg_terminate_backend(%s)", [admin.info.backend_pid])


def test_a_session_in_a_transaction_holds_its_virtual_transaction_id(server, app_database, app_connect):
    session = app_connect(app_database)
    holds = sql.SQL("SELECT count(*) FROM pg_locks WHERE locktype = 'virtualxid' AND pid = {}").format(
        sql.Literal(session.info.backend_pid)
    )

    counts = [server.execute(holds)]
    session.execute("BEGIN")
    session.execute("SELECT 1")
    counts.append(server.execute(holds))
    session.execute("COMMIT")
    counts.append(server.execute(holds))

    assert counts == [[(0,)], [(1,)], [(0,)]]


def test_a_statement_outlives_its_client_as_long_as_it_sends_nothing(server, connect):
    # Settings and a closed socket as those of a dead-man switch.
    session = connect()
    session.execute("SET client_connection_check_interval = 0; SET client_min_messages = error")
    pid = session.info.backend_pid
    session.pgconn.send_query(
        b"DO $$BEGIN FOR i IN 1..15 LOOP RAISE WARNING 'x'; PERFORM pg_sleep(0.1); END LOOP; END$$"
    )
    while session.pgconn.flush():
        time.sleep(0.001)
    session.close()

    alive = sql.SQL("SELECT pid FROM pg_stat_activity WHERE pid = {}").format(sql.Literal(pid))
    time.sleep(1)
    assert server.execute(alive) == [(pid,)]
    wait_until(lambda: not server.execute(alive))


def test_a_statement_that_sends_warnings_to_a_client_that_is_gone_is_ended(server, connect):
    session = connect()
    pid = session.info.backend_pid
    session.pgconn.send_query(
        b"DO $$BEGIN FOR i IN 1..600 LOOP RAISE WARNING 'x'; PERFORM pg_sleep(0.1); END LOOP; END$$"
    )
    while session.pgconn.flush():
        time.sleep(0.001)
    session.close()

    alive = sql.SQL("SELECT pid FROM pg_stat_activity WHERE pid = {}").format(sql.Literal(pid))
    wait_until(lambda: not server.execute(alive), within=5)


def test_a_procedure_can_commit_in_a_loop_but_not_inside_a_block_with_an_exception_handler(connect):
    with connect() as conn:
        conn.execute("DO $$BEGIN FOR i IN 1..3 LOOP COMMIT; END LOOP; END$$")
        with pytest.raises(errors.InvalidTransactionTermination):
            conn.execute("DO $$BEGIN BEGIN COMMIT; EXCEPTION WHEN division_by_zero THEN NULL; END; END$$")


def test_two_writers_of_one_databases_settings_collide_with_xx000(server, app_database, super_connect):
    alter(server, READ_ONLY, app_database)
    first, second = super_connect(), super_connect()
    change = sql.SQL("ALTER DATABASE {} SET work_mem = '5MB'").format(sql.Identifier(app_database))
    first.execute("BEGIN")
    first.execute(change)

    with background(lambda: second.execute(change)) as waiting:
        time.sleep(0.3)
        first.execute("COMMIT")
        with pytest.raises(errors.InternalError_) as collided:
            waiting.result(10)

    assert collided.value.sqlstate == "XX000"


def test_psycopg_has_no_sqlstate_for_a_connection_that_failed(server):
    # Hence a wrong password cannot be told from a server that is away, other than by text.
    with pytest.raises(psycopg.OperationalError) as failed:
        psycopg.connect(server.dsn(user="app", password="wrong"))

    assert failed.value.sqlstate is None


def test_a_session_ended_in_a_transaction_leaves_nothing_of_it(server, app_database, app_connect):
    session = app_connect(app_database)
    session.execute("BEGIN; CREATE TABLE t ()")
    server.execute(sql.SQL("SELECT pg_terminate_backend({}, 5000)").format(sql.Literal(session.info.backend_pid)))

    assert not is_alive(session)
    assert app_connect(app_database).execute("SELECT to_regclass('t')").fetchone() == (None,)


def test_a_database_name_is_cut_to_63_bytes_when_created_but_not_when_compared(server):
    with server.database("z" * 63):
        assert server.execute(
            sql.SQL("SELECT count(*) FROM pg_database WHERE datname::text = {}").format(sql.Literal("z" * 64))
        ) == [(0,)]


def test_a_schema_name_may_not_begin_with_pg(server):
    with pytest.raises(errors.ReservedName):
        server.execute("CREATE SCHEMA pg_freeze")
