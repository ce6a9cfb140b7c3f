"""What others can do to a freeze, by carelessness or on purpose, and what it must withstand."""

from __future__ import annotations

from datetime import timedelta

import psycopg
import pytest

from devtools.asking import frozen, pause
from devtools.pgserver import Server
from pg_freeze import Connect, FreezeError, attest, resume, status
from tests.server.clients import background, wait_until

pytestmark = pytest.mark.every_version

# Each is a better match than pg_catalog's for operands that are not exactly of its types.
TRAPS = {
    "||": ("name", "name", "text"),
    "||(int[])": ("integer[]", "integer", "integer[]"),
    "->>": ("jsonb", "jsonb", "text"),
    "&&": ("text[]", "text[]", "boolean"),
}


@pytest.fixture
def trapped(own_server: Server) -> Server:
    """A server on which everybody may create objects in ``public``, as before PostgreSQL 15, and somebody did."""
    own_server.execute("GRANT CREATE ON SCHEMA public TO app")
    with own_server.connect_factory("app")() as app:
        app.execute("CREATE TABLE trapped (who name)")
        app.execute("GRANT INSERT ON trapped TO PUBLIC")
        for number, (operator, (left, right, result)) in enumerate(TRAPS.items()):
            app.execute(
                f"CREATE FUNCTION trap{number}({left}, {right}) RETURNS {result} LANGUAGE plpgsql AS "
                "$$ BEGIN INSERT INTO public.trapped VALUES (CURRENT_USER); RETURN NULL; END $$"
            )
            app.execute(
                f"CREATE OPERATOR public.{operator.partition('(')[0]} "
                f"(LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = trap{number})"
            )
    return own_server


@pytest.mark.parametrize("thaw", ["thaw_all()", "thaw('{database}')", "thaw_expired()"])
def test_whoever_thaws_in_psql_runs_nobody_elses_operators(thaw, trapped, connect_to, new_database, app_connect):
    database = new_database(trapped)
    connect = connect_to(trapped)
    reader = app_connect(database, server=trapped)
    pause(connect, databases=[database], holder="test", admit="readers", dead_man=False)
    reader = app_connect(database, server=trapped)
    if "expired" in thaw:
        trapped.execute("UPDATE pgfreeze.freezes SET lease_until = now()")

    trapped.execute(f"CALL pgfreeze.{thaw.format(database=database)}")

    assert trapped.execute("SELECT * FROM public.trapped") == []
    assert status(connect).freezes == ()
    with pytest.raises(psycopg.OperationalError):
        reader.execute("SELECT 1")


def test_an_open_alter_database_does_not_keep_an_overdue_freeze_nor_any_other(own_server, connect_to, new_database):
    connect = connect_to(own_server)
    own_server.create_role("tenant")
    own_server.execute("GRANT app_owner TO tenant")
    first, other = new_database(own_server), new_database(own_server)
    pause(connect, databases=[first], holder="one", lease=timedelta(seconds=3), drain_timeout=timedelta(seconds=1))
    pause(connect, databases=[other], holder="two", lease=timedelta(seconds=5), drain_timeout=timedelta(seconds=1))
    with own_server.connect_factory("tenant")() as tenant:
        tenant.execute("BEGIN")
        tenant.execute(f"ALTER DATABASE {first} SET work_mem = '8MB'")

        wait_until(lambda: not status(connect).freezes, within=20)
        with pytest.raises(psycopg.OperationalError):
            tenant.execute("COMMIT")


def test_a_database_that_was_dropped_is_not_certified(own_server, connect_to, new_database):
    connect, database = connect_to(own_server), new_database(own_server)
    pause(connect, databases=[database], holder="test", admit="nobody")
    attest.before(connect, databases=[database], holder="test")

    own_server.execute(f"DROP DATABASE {database}")

    found = attest.after(connect, databases=[database], holder="test")
    assert (found.level, [one.code for one in found.violations]) == ("crash-only", ["dropped"])


def test_locks_that_were_lost_before_the_freeze_was_recorded_are_noticed(own_server, new_database):
    connect: Connect = own_server.connect_factory("postgres")
    databases = [new_database(own_server), new_database(own_server)]
    resume(connect, databases=databases, holder="test")
    pause(connect, databases=databases, holder="installs the journal")
    resume(connect, databases=databases, holder="installs the journal")
    session = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'pg-freeze lock%' AND state <> 'active'"

    def freeze() -> None:
        with frozen(
            connect,
            lambda name: own_server.connect_factory("postgres", name)(),
            databases=databases,
            holder="test",
            lease=timedelta(days=30),
        ):
            raise AssertionError("must not be entered")

    with own_server.control() as keeper:
        keeper.execute("BEGIN; LOCK TABLE pgfreeze.freezes IN EXCLUSIVE MODE")
        with background(freeze) as frozen_in_vain:
            waits = "SELECT 1 FROM pg_locks WHERE relation = 'pgfreeze.freezes'::regclass AND NOT granted"
            wait_until(lambda: own_server.execute(waits))
            own_server.execute(f"SELECT pg_terminate_backend(({session} LIMIT 1))")
            wait_until(lambda: len(own_server.execute(session)) == 1)
            keeper.execute("ROLLBACK")
            with pytest.raises(FreezeError, match="held the locks"):
                frozen_in_vain.result(timeout=30)
    assert status(connect).freezes == ()
    assert own_server.execute(session) == []


def test_a_dead_man_switch_that_is_ended_while_sessions_drain_is_replaced(own_server, connect_to, new_database):
    connect, database = connect_to(own_server), new_database(own_server)
    ended = []

    switch = "FROM pg_stat_activity WHERE application_name LIKE '%dead-man%'"

    def end_it(_: object) -> None:
        if not ended:
            ended.extend(own_server.execute(f"SELECT pg_terminate_backend(pid), pid {switch}"))
            wait_until(lambda: not own_server.execute(f"SELECT {switch}"))

    freeze = pause(connect, databases=[database], holder="test", progress=end_it)

    assert len(ended) == 1
    assert freeze.dead_man_pid not in {None, ended[0][1]}


def test_a_role_that_cannot_enter_the_database_does_not_keep_it_from_being_frozen(own_server, connect_to, new_database):
    connect, database = connect_to(own_server), new_database(own_server)
    own_server.create_role("stranger")
    own_server.execute("ALTER ROLE stranger SET default_transaction_read_only = off")
    own_server.execute(f"REVOKE CONNECT ON DATABASE {database} FROM PUBLIC")

    assert pause(connect, databases=[database], holder="test").holds
