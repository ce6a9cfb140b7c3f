"""Whose a journal may be, and whose it was: nobody becomes a superuser by giving one away."""

from __future__ import annotations

import threading

import psycopg
import pytest
from psycopg import sql

from devtools.pgserver import Server
from pg_freeze import FreezeRefused, install, status, thaw_expired
from tests.server.clients import wait_until
from tests.server.names import MARK, SCHEMA
from tests.server.test_trust import app_is_super, cli

pytestmark = pytest.mark.pg("!=15,!=16,!=17")
TRAP = (
    "IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = session_user) THEN ALTER ROLE {} SUPERUSER; END IF;"
)


def trapped_journal(conn: psycopg.Connection, role: str) -> None:
    """Make a journal of ours, with a function that makes *role* a superuser if one comes by, and a row for it."""
    conn.execute(
        f"CREATE OR REPLACE FUNCTION {SCHEMA}.locked(sessions jsonb) RETURNS boolean LANGUAGE plpgsql AS "
        f"$$ BEGIN {TRAP.format(role)} RETURN true; END $$"
    )
    conn.execute(
        f"INSERT INTO {SCHEMA}.tickets (act, holder, databases, began_at) VALUES ('pause', 'h', '{{x}}', now())"
    )
    conn.execute(
        f"INSERT INTO {SCHEMA}.freezes (token, ticket, holder, databases, admit, state,"
        " requested_at, changed_at, lease_until)"
        " VALUES (gen_random_uuid(), 1, 'h', '{x}', 'readers', 'frozen', now(), now(), now())"
    )


def give_away(conn: psycopg.Connection, owner: str) -> None:
    """Make all of a journal somebody else's."""
    statements = conn.execute(
        """SELECT format('ALTER SCHEMA pgfreeze OWNER TO %%I', %(owner)s::text)
            UNION ALL SELECT format('ALTER TABLE %%s OWNER TO %%I', c.oid::regclass, %(owner)s::text) FROM pg_class c
            WHERE relnamespace = 'pgfreeze'::regnamespace AND relkind IN ('r', 'v')
            UNION ALL SELECT format('ALTER ROUTINE %%s OWNER TO %%I', p.oid::regprocedure, %(owner)s::text)
             FROM pg_proc p WHERE pronamespace = 'pgfreeze'::regnamespace""",
        {"owner": owner},
    ).fetchall()
    for (statement,) in statements:
        conn.execute(statement)


def test_a_journal_given_to_pg_database_owner_is_not_run(own_server):
    own_server.create_database("owned", "app")
    with own_server.connect_factory("app", "owned")() as app:
        install(own_server.connect_factory("app", "owned"))
        trapped_journal(app, "app")
        app.execute(
            f"GRANT USAGE ON SCHEMA {SCHEMA} TO PUBLIC; GRANT SELECT ON ALL TABLES IN SCHEMA {SCHEMA} TO PUBLIC"
        )
        give_away(app, "pg_database_owner")
        app.execute(f"ALTER ROLE app IN DATABASE owned SET application_name = '{MARK}'")

    for act in (status, thaw_expired):
        act(own_server.control, connect_to=own_server.control)
        with pytest.raises(FreezeRefused, match="'pg_database_owner'"):
            act(lambda: own_server.control("owned"), connect_to=own_server.control)
    assert not app_is_super(own_server)


@pytest.mark.pg(">=16")
def test_a_journal_given_to_a_role_that_nobody_can_become_any_more_is_not_run(own_server):
    own_server.execute("ALTER ROLE freezer CREATEROLE")
    install(own_server.connect_factory("freezer"))
    with own_server.connect_factory("freezer")() as freezer:
        freezer.execute("CREATE ROLE helper LOGIN CREATEROLE")
        own_server.create_role("given", "NOLOGIN")
        own_server.execute("GRANT given TO freezer")
        trapped_journal(freezer, "freezer")
        give_away(freezer, "given")
    own_server.execute("REVOKE given FROM freezer; DROP ROLE helper; ALTER ROLE freezer NOCREATEROLE")

    for act in (status, thaw_expired):
        with pytest.raises(FreezeRefused, match="'given'"):
            act(own_server.control, connect_to=own_server.control)
    assert own_server.execute("SELECT rolsuper FROM pg_roles WHERE rolname = 'freezer'") == [(False,)]


def test_a_journal_that_comes_while_we_install_ours_is_not_taken_for_ours(own_server: Server):
    failed: list[Exception] = []

    def run() -> None:
        try:
            install(own_server.control, grant=["freezer"])
        except FreezeRefused as error:
            failed.append(error)

    installing = threading.Thread(target=run)
    # Holds it up between its look and CREATE SCHEMA.
    own_server.execute(
        "CREATE FUNCTION hold_up() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN IF session_user = 'postgres' THEN"
        " LOCK TABLE public.gate; END IF; END $$; CREATE TABLE public.gate (); GRANT ALL ON public.gate TO freezer; "
        "CREATE EVENT TRIGGER hold_up ON ddl_command_start WHEN TAG IN ('CREATE SCHEMA') EXECUTE FUNCTION hold_up()"
    )
    with own_server.connect_factory("freezer")() as freezer:
        freezer.execute("BEGIN")
        freezer.execute("LOCK TABLE public.gate")
        installing.start()
        wait_until(lambda: freezer.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchall())
        freezer.execute(f"CREATE SCHEMA {SCHEMA}")
        freezer.execute("COMMIT")
        installing.join(60)
    assert "belongs to role 'freezer'" in str(failed[0])
    assert own_server.execute(f"SELECT count(*) FROM pg_class WHERE relnamespace = '{SCHEMA}'::regnamespace") == [(0,)]


def test_an_upgrade_lets_those_write_who_could_and_those_read_who_could(own_server):
    own_server.create_role("monitor")
    install(own_server.control, grant=["freezer"])
    own_server.execute(
        f"GRANT USAGE ON SCHEMA {SCHEMA} TO monitor; GRANT SELECT ON ALL TABLES IN SCHEMA {SCHEMA} TO monitor"
    )
    rights = sql.SQL(
        "SELECT r, c.relname, array_agg(p ORDER BY p) FROM unnest('{{freezer,monitor}}'::text[]) r,"
        " unnest('{{SELECT,INSERT,UPDATE,DELETE}}'::text[]) p, pg_class c"
        " WHERE c.relnamespace = 'pgfreeze'::regnamespace AND c.relkind IN ('r', 'v')"
        " AND has_table_privilege(r, c.oid, p) GROUP BY 1, 2 ORDER BY 1, 2"
    ).format()
    routines = (
        "SELECT count(*) FILTER (WHERE has_function_privilege('freezer', oid, 'EXECUTE')) = count(*),"
        " count(*) FILTER (WHERE has_function_privilege('monitor', oid, 'EXECUTE'))"
        " FROM pg_proc WHERE pronamespace = 'pgfreeze'::regnamespace"
    )
    before = own_server.execute(rights)
    own_server.execute(f"COMMENT ON SCHEMA {SCHEMA} IS 'last year''s'; DROP FUNCTION {SCHEMA}.read_only_here()")

    assert install(own_server.control)

    assert own_server.execute(rights) == before
    assert own_server.execute(routines) == [(True, 0)]


@pytest.mark.parametrize("verb", ["guard", "status"])
def test_a_mark_of_a_role_that_we_do_not_trust_has_nobody_wait_at_a_locked_door(own_server, verb):
    own_server.execute("GRANT app TO freezer; ALTER ROLE app CREATEDB")
    own_server.create_database("owned", "app")
    with own_server.connect_factory("app")() as app:
        app.execute(f"ALTER ROLE app IN DATABASE owned SET application_name = '{MARK}'")
        app.execute("BEGIN")
        app.execute("ALTER DATABASE owned SET work_mem = '5MB'")
        app.execute("ALTER DATABASE owned RENAME TO held")
        code, said = cli(own_server, verb, user="freezer")
    assert (code, "may be frozen from inside, but by no role" in said) == (int(verb == "guard"), True), said
