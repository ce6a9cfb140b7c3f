"""Least privilege: what an ordinary role may not do, and that nothing needs a superuser."""

import psycopg
import pytest
from psycopg import sql

from devtools.asking import pause
from pg_freeze import FreezeRefused, history, resume, status
from tests.server.clients import ms

pytestmark = pytest.mark.every_version

TABLES = ("tickets", "freezes", "frozen_databases", "prior_settings", "sessions", "starting", "overrides")


def test_an_ordinary_role_can_read_nothing_of_the_journal(connect, server, app_database, app_connect):
    pause(connect, databases=[app_database], holder="test")
    ordinary = app_connect("postgres")
    tables = [
        name
        for (name,) in server.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'pgfreeze'::regnamespace AND relkind IN ('r', 'v', 'S')"
        )
    ]
    assert set(TABLES) <= set(tables)

    for table in tables:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ordinary.execute(sql.SQL("SELECT * FROM pgfreeze.{}").format(sql.Identifier(table)))


def test_an_ordinary_role_can_call_nothing_of_the_journal(connect, server, app_database, app_connect):
    pause(connect, databases=[app_database], holder="test")
    routines = server.execute(
        "SELECT p.oid::regprocedure::text, p.prosecdef FROM pg_proc p"
        " WHERE pronamespace = 'pgfreeze'::regnamespace"
        " AND (has_function_privilege('app', p.oid, 'EXECUTE') OR p.prosecdef)"
    )
    assert routines == []
    ordinary = app_connect("postgres")
    for statement in (
        sql.SQL("CALL pgfreeze.thaw({})").format(sql.Literal(app_database)),
        sql.SQL("CALL pgfreeze.thaw_all()"),
        sql.SQL("CALL pgfreeze.thaw_expired()"),
        sql.SQL("SELECT pgfreeze.draw_ticket('resume', 'test', '{}', '0')"),
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ordinary.execute(statement)
    assert len(status(connect, databases=[app_database]).freezes) == 1


def test_an_ordinary_role_can_neither_thaw_nor_end_the_dead_man_switch(connect, app_database, app_connect):
    frozen = pause(connect, databases=[app_database], holder="test")
    ordinary = app_connect("postgres")

    for statement in (
        sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(sql.Identifier(app_database)),
        sql.SQL("SELECT pg_terminate_backend({})").format(sql.Literal(frozen.dead_man_pid)),
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ordinary.execute(statement)


def test_an_ordinary_role_that_uses_the_product_is_refused_by_everything(server, connect, app_database):
    pause(connect, databases=[app_database], holder="test")
    ordinary = server.connect_factory("app")

    for act in (
        lambda: pause(ordinary, databases=[app_database], holder="test"),
        lambda: resume(ordinary, databases=[app_database], holder="test"),
        lambda: status(ordinary),
        lambda: history(ordinary),
    ):
        with pytest.raises(FreezeRefused):
            act()


def test_the_journal_cannot_be_prepared_by_somebody_who_comes_first(own_server, connect_to, new_database):
    # A schema of that name with a trap in it: ours is refused, not built upon.
    own_server.execute("GRANT CREATE ON DATABASE postgres TO app")
    with own_server.connect_factory("app")() as trap:
        trap.execute("CREATE SCHEMA pgfreeze")
        trap.execute("GRANT ALL ON SCHEMA pgfreeze TO PUBLIC")

    with pytest.raises(FreezeRefused, match="journal"):
        pause(connect_to(own_server), databases=[new_database(own_server)], holder="test")


def test_no_query_of_any_session_is_kept(connect, server, app_database, app_connect):
    writer = app_connect(app_database)
    writer.execute("BEGIN")
    writer.execute("SELECT 'a secret in a query'")
    told = []
    pause(connect, databases=[app_database], holder="test", progress=told.append, drain_timeout=ms(300))

    assert "secret" not in repr(told)
    for table in TABLES[:4]:
        rows = server.execute(sql.SQL("SELECT t::text FROM pgfreeze.{} t").format(sql.Identifier(table)))
        assert "a secret" not in repr(rows)


def test_the_whole_life_of_a_freeze_needs_no_superuser(own_server, connect_to, new_database):
    connect, database = connect_to(own_server), new_database(own_server)

    pause(connect, databases=[database], holder="test")
    status(connect)
    resume(connect, databases=[database], holder="test")

    assert own_server.execute("SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = 'freezer'") == [(False,)]
    assert own_server.execute(
        "SELECT DISTINCT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'pgfreeze'"
    ) == [("freezer",)]
    assert len(history(connect)) == 1
