"""Nobody's code but ours runs with our rights: what the owner of a database, or of a journal, may try."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from itertools import pairwise

import psycopg
import pytest
from psycopg import sql

from devtools.environment import without
from devtools.pgserver import Server
from tests.server.names import LOCK, MARK, PRIVILEGES, READ_ONLY, SCHEMA

#: Makes app what it is not, if somebody runs it who can.
ESCALATE = (
    "IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = session_user) THEN ALTER ROLE app SUPERUSER; END IF;"
)
# An operator, function or cast of each signature that pg_catalog has, but with code of the owner's.
_OPERATORS = """
    SELECT o.oid, o.oprname, NULLIF(o.oprleft, 0)::regtype::text, o.oprright::regtype::text, o.oprresult::regtype::text
      FROM pg_operator o JOIN pg_namespace n ON n.oid = o.oprnamespace
     WHERE n.nspname = 'pg_catalog' AND o.oprcode <> 0 AND o.oprname <> '=>'
       AND 'p' <> ALL (SELECT t.typtype FROM pg_type t WHERE t.oid IN (o.oprleft, o.oprright, o.oprresult))"""
_FUNCTIONS = """
    SELECT DISTINCT ON (p.proname, pg_get_function_identity_arguments(p.oid)) p.proname, oidvectortypes(p.proargtypes),
           p.prorettype::regtype::text, p.proretset
      FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
     WHERE n.nspname = 'pg_catalog' AND p.prokind = 'f' AND p.provariadic = 0
       AND p.proname = ANY (%s)
       AND 'p' <> ALL (SELECT t.typtype FROM pg_type t WHERE t.oid = ANY (p.proargtypes) OR t.oid = p.prorettype)"""
_NAMES = re.findall(
    r"\w+",
    "lower count format now clock_timestamp concat split_part starts_with obj_description has_schema_privilege "
    "pg_sleep pg_has_role has_database_privilege current_setting set_config quote_literal pg_backend_pid "
    "pg_is_in_recovery pg_terminate_backend cardinality substr length to_regnamespace pg_current_wal_lsn "
    "hashtextextended regexp_replace",
)
_TYPES = ("text", "uuid", "timestamptz", "jsonb", "record", "name", "oid", "interval")


def plant(owner: psycopg.Connection, body: str = "ALTER ROLE app SUPERUSER;") -> None:
    """Make a schema ``evil`` of everything that a statement could find by its name."""
    owner.execute("CREATE SCHEMA evil")
    owner.execute("GRANT USAGE ON SCHEMA evil TO PUBLIC")
    code = sql.SQL("LANGUAGE plpgsql AS {}").format(sql.Literal(f"BEGIN {body} RETURN NULL; END"))
    table = sql.SQL("LANGUAGE plpgsql AS {}").format(sql.Literal(f"BEGIN {body} END"))
    statements = []
    for number, (_, name, left, right, result) in enumerate(owner.execute(_OPERATORS).fetchall()):
        arguments = ", ".join(kind for kind in (left, right) if kind)
        sides = ", ".join(f"{side} = {kind}" for side, kind in (("LEFTARG", left), ("RIGHTARG", right)) if kind)
        statements += [
            sql.SQL(f"CREATE FUNCTION evil.o{number}({arguments}) RETURNS {result} ") + code,
            sql.SQL(f"CREATE OPERATOR evil.{name} ({sides}, FUNCTION = evil.o{number})"),
        ]
    for name, arguments, result, many in owner.execute(_FUNCTIONS, (_NAMES,)).fetchall():
        returns = f"SETOF {result} " if many else f"{result} "
        statements.append(
            sql.SQL(f"CREATE FUNCTION evil.{name}({arguments}) RETURNS {returns}") + (table if many else code)
        )
    statements.append(sql.SQL("CREATE FUNCTION evil.never() RETURNS boolean ") + code)
    statements += [sql.SQL(f"CREATE DOMAIN evil.{name} AS pg_catalog.int4 CHECK (evil.never())") for name in _TYPES]
    statements.append(sql.SQL("CREATE AGGREGATE evil.bool_or(boolean) (SFUNC = evil.agg, STYPE = boolean)"))
    owner.execute(sql.SQL("CREATE FUNCTION evil.agg(boolean, boolean) RETURNS boolean ") + code)
    owner.execute(sql.SQL("; ").join(statements))


def app_is_super(server: Server) -> bool:
    return server.execute("SELECT rolsuper FROM pg_roles WHERE rolname = 'app'") == [(True,)]


def cli(server: Server, *words: str, user: str | None = None, database: str = "postgres") -> tuple[int, str]:
    """Run the command line as a superuser, or as *user*."""
    environment = without("PG")
    environment["PG_FREEZE_DSN"] = server.dsn(database) if user is None else server.dsn(database, user)
    command = [sys.executable, "-m", "pg_freeze", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def owned(own_server: Server, new_database) -> str:
    """A database that the application itself owns."""
    name: str = new_database(own_server)
    own_server.execute("GRANT app TO freezer")
    own_server.execute(sql.SQL("ALTER DATABASE {} OWNER TO app").format(sql.Identifier(name)))
    return name


@pytest.fixture
def marked(own_server: Server, owned: str) -> str:
    """The same, and it looks as if it were frozen from inside: status and guard look into it."""
    with own_server.connect_factory("app", owned)() as app:
        app.execute(f"ALTER ROLE app IN DATABASE {owned} SET application_name = '{MARK}'")
    return owned


def set_here(server: Server, database: str, *settings: str) -> None:
    with server.connect_factory("app", database)() as app:
        for setting in settings:
            app.execute(f'ALTER DATABASE "{database}" SET {setting}')


def test_nothing_planted_in_a_database_runs_for_whoever_looks_into_it(own_server, owned):
    with own_server.connect_factory("app", owned)() as app:
        plant(app)
    set_here(own_server, owned, "search_path = evil, pg_catalog")
    mark = f"ALTER ROLE app IN DATABASE {owned} SET application_name = '{MARK}'"

    for words in (
        ("status",),
        ("guard",),
        ("preflight", "-d", owned),
        ("run", "-d", owned, "--strategy", LOCK, "--require", "none", "--", "true"),
        ("run", "-d", owned, "--strategy", PRIVILEGES, "--require", "none", "--", "true"),
        ("run", "-d", owned, "--strategy", READ_ONLY, "--require", "none", "--", "true"),
        ("resume", "-d", owned, "--holder", "h"),
    ):
        code, said = cli(own_server, *words)
        assert (code, app_is_super(own_server)) == (0, False), (words, said)
    own_server.execute(mark)
    # By a role whose code we do not run: nobody says that all is well.
    for words, code in ((("status",), 0), (("guard",), 1), (("resume", "-d", owned, "--holder", "h"), 8)):
        assert (cli(own_server, *words)[0], app_is_super(own_server)) == (code, False), words
    cli(own_server, "status", database=owned)
    cli(own_server, "history", "--maintenance-database", owned)
    assert not app_is_super(own_server)


def test_every_routine_has_a_search_path_of_its_own_or_is_a_procedure_that_sets_it_after_each_commit(server):
    query = "SELECT prosrc FROM pg_proc WHERE pronamespace = 'pgfreeze'::regnamespace AND proconfig IS NULL"
    harmless = ("PERFORM pg_catalog.set_config('search_path'", "PERFORM pgfreeze.", "PERFORM pg_catalog.pg_sleep(")
    harmless += ("RETURN", "END", "EXIT WHEN pg_catalog.jsonb_extract_path(so_far, '")
    bodies = [re.sub("--.*", "", body) for (body,) in server.execute(query)]
    assert bodies
    for body in bodies:
        statements = [" ".join(one.split()) for one in body.split(";")]
        assert any(re.search(r"COMMIT$|CALL pgfreeze\.", one) for one in statements), body  # or it could have SET
        for one, following in pairwise(statements):
            if re.search(r"(^|\W)(COMMIT|CALL pgfreeze\.\w+\(.*\))$", one):
                assert following.startswith(harmless), (one, following)


@pytest.mark.parametrize(
    "settings",
    [
        ["search_path = evil, pg_catalog"],
        ["statement_timeout = '1ms'"],
        [
            "default_transaction_isolation = serializable",
            "default_transaction_deferrable = on",
            "default_transaction_read_only = on",
        ],
    ],
    ids=lambda settings: settings[0].partition(" ")[0],
)
def test_a_database_whose_settings_hold_sessions_up_does_not_hold_up_the_guard(own_server, marked, settings):
    owned = marked
    with own_server.connect_factory("app", owned)() as app:
        app.execute("CREATE SCHEMA evil")
        app.execute("CREATE FUNCTION evil.lower(text) RETURNS text LANGUAGE sql AS 'SELECT pg_sleep(60)::text'")
        app.execute("CREATE TABLE t ()")
        app.execute("BEGIN ISOLATION LEVEL SERIALIZABLE; INSERT INTO t DEFAULT VALUES")
        set_here(own_server, owned, *settings)

        began = time.monotonic()
        code, said = cli(own_server, "guard")
        assert (code, "not known" in said, time.monotonic() - began < 30) == (1, True, True), said


@pytest.mark.parametrize("setting", ["role = app", "session_authorization = app"])
def test_a_database_that_makes_us_somebody_else_makes_us_trust_nobody_else(own_server, marked, setting):
    owned = marked
    with own_server.connect_factory("app", owned)() as app:
        journal_with_a_trap(app, "RESET ROLE; RESET SESSION AUTHORIZATION; ALTER ROLE app SUPERUSER;")
        try:
            app.execute(f'ALTER DATABASE "{owned}" SET {setting}')
        except psycopg.Error:
            own_server.execute(f'ALTER DATABASE "{owned}" SET {setting}')

    for words in (("status",), ("guard",), ("history", "--maintenance-database", owned)):
        cli(own_server, *words)
    assert not app_is_super(own_server)


@pytest.mark.pg(">=17")
def test_a_login_trigger_does_not_run_for_whoever_looks(own_server, owned):
    own_server.execute("CREATE FUNCTION f() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'", owned)
    own_server.execute("CREATE EVENT TRIGGER t ON login EXECUTE FUNCTION f()", owned)
    own_server.execute("ALTER FUNCTION f() OWNER TO app", owned)
    with own_server.connect_factory("app", owned)() as app:
        app.execute(
            f"CREATE OR REPLACE FUNCTION f() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN {ESCALATE} END $$"
        )

    code, said = cli(own_server, "run", "-d", owned, "--strategy", LOCK, "--", "true")
    assert (code, "event trigger on login" in said) == (3, True), said
    own_server.execute(f"ALTER ROLE app IN DATABASE {owned} SET application_name = '{MARK}'")
    assert cli(own_server, "guard")[0] == 1
    assert not app_is_super(own_server)


def journal_with_a_trap(app: psycopg.Connection, body: str) -> None:
    """Make a schema of our journal's name whose routines and views run *body*."""
    app.execute(f"CREATE SCHEMA {SCHEMA}")
    app.execute(f"CREATE FUNCTION {SCHEMA}.trap() RETURNS text LANGUAGE plpgsql AS $$ BEGIN {body} RETURN 'x'; END $$")
    for name in ("freezes", "tickets", "attestations"):
        app.execute(f"CREATE VIEW {SCHEMA}.{name} AS SELECT {SCHEMA}.trap() AS state")
    for name in ("thaw_all", "thaw_expired"):
        app.execute(f"CREATE PROCEDURE {SCHEMA}.{name}() LANGUAGE plpgsql AS $$ BEGIN {body} END $$")
    app.execute(f"GRANT ALL ON SCHEMA {SCHEMA} TO PUBLIC")
    app.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA {SCHEMA} TO PUBLIC")


def test_a_journal_that_somebody_else_made_is_neither_read_nor_installed_into(own_server, owned):
    with own_server.connect_factory("app", owned)() as app:
        journal_with_a_trap(app, "ALTER ROLE app SUPERUSER;")

    for words in (
        ("history",),
        ("status",),
        ("guard",),
        ("install",),
        ("pause", "-d", "postgres"),
        ("resume", "-d", "postgres"),
    ):
        code, said = cli(own_server, *words, "--maintenance-database", owned)
        assert (code in (1, 3), "role 'app'" in said) == (True, True), (words, said)
    assert not app_is_super(own_server)


_F = (
    "CREATE FUNCTION public.f() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 1'; "
    "ALTER FUNCTION public.f() OWNER TO app; "
)
# What one role of many can do to a journal that is sound but for that.
INTRUSIONS = {
    "a routine": f"ALTER FUNCTION {SCHEMA}.inside(text[]) OWNER TO app",
    "a table": f"ALTER TABLE {SCHEMA}.revoked OWNER TO app",
    "an overload": f"CREATE FUNCTION {SCHEMA}.thaw_expired(text) RETURNS text LANGUAGE sql AS 'SELECT $1'; "
    f"ALTER FUNCTION {SCHEMA}.thaw_expired(text) OWNER TO app",
    "a trigger": "CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; "
    f"CREATE TRIGGER t AFTER UPDATE ON {SCHEMA}.freezes EXECUTE FUNCTION public.f(); "
    "ALTER FUNCTION public.f() OWNER TO app",
    "a rule": "CREATE FUNCTION public.f() RETURNS int LANGUAGE sql AS 'SELECT 1'; "
    f"CREATE RULE r AS ON UPDATE TO {SCHEMA}.tickets DO ALSO SELECT public.f(); ALTER FUNCTION public.f() OWNER TO app",
    "a check": f"{_F} ALTER TABLE {SCHEMA}.freezes ADD CHECK (public.f() = 1)",
    "a default": f"{_F} ALTER TABLE {SCHEMA}.blockers ALTER pid SET DEFAULT public.f()",
    "an index": f"{_F} CREATE INDEX ON {SCHEMA}.freezes ((public.f()))",
    "a policy": f"{_F} CREATE POLICY p ON {SCHEMA}.freezes USING (public.f() = 1)",
    "a condition of a trigger": f"{_F} CREATE TRIGGER t BEFORE UPDATE ON {SCHEMA}.freezes FOR EACH ROW "
    f"WHEN (public.f() = 1) EXECUTE FUNCTION {SCHEMA}.check_freeze()",
    "an operator in a rule": "CREATE OPERATOR public.=== (LEFTARG = int, RIGHTARG = int, FUNCTION = int4eq); "
    "ALTER OPERATOR public.=== (int, int) OWNER TO app; "
    f"CREATE RULE r AS ON UPDATE TO {SCHEMA}.tickets DO ALSO SELECT 1 OPERATOR(public.===) 1",
    "a type from elsewhere": "CREATE TYPE public.t AS ENUM (); ALTER TYPE public.t OWNER TO app; "
    f"ALTER TABLE {SCHEMA}.freezes ADD COLUMN c public.t",
    "a view from elsewhere": "CREATE VIEW public.v AS SELECT 1 AS one; ALTER VIEW public.v OWNER TO app; "
    f"CREATE RULE r AS ON UPDATE TO {SCHEMA}.tickets DO ALSO SELECT * FROM public.v",
    "what a view from elsewhere rests on": f"{_F} CREATE VIEW public.v AS SELECT public.f() AS one; "
    f"CREATE RULE r AS ON UPDATE TO {SCHEMA}.tickets DO ALSO SELECT * FROM public.v",
    "an heir": f"CREATE TABLE public.heir () INHERITS ({SCHEMA}.freezes); ALTER TABLE public.heir OWNER TO app",
    "the right to create": f"GRANT CREATE ON SCHEMA {SCHEMA} TO app",
    "the right to put triggers": f"GRANT TRIGGER ON {SCHEMA}.freezes TO app",
    "a type": f"CREATE TYPE {SCHEMA}.t AS ENUM (); ALTER TYPE {SCHEMA}.t OWNER TO app",
}


@pytest.mark.parametrize("intrusion", INTRUSIONS)
def test_a_journal_of_which_one_thing_is_somebody_elses_is_not_used(own_server, new_database, intrusion):
    own_server.execute("GRANT CREATE ON SCHEMA public TO app")
    assert cli(own_server, "install")[0] == 0
    own_server.execute(f"GRANT CREATE ON SCHEMA {SCHEMA} TO app")
    own_server.execute(INTRUSIONS[intrusion])
    if "create" not in intrusion:
        own_server.execute(f"REVOKE CREATE ON SCHEMA {SCHEMA} FROM app")

    for words in (("status",), ("pause", "-d", new_database(own_server)), ("guard",), ("history",)):
        code, said = cli(own_server, *words)
        assert (code in (1, 3), "role 'app'" in said) == (True, True), (words, said)


def test_a_superuser_does_not_run_the_journal_of_the_role_that_freezes_but_both_run_a_superusers(
    own_server, new_database
):
    database = new_database(own_server)
    assert cli(own_server, "pause", "-d", database, "--holder", "h", user="freezer")[0] == 0
    code, said = cli(own_server, "status")
    assert (code, "pg-freeze install --grant" in said) == (3, True), said
    assert cli(own_server, "resume", "-d", database, "--holder", "h", user="freezer")[0] == 0

    own_server.execute(f"DROP SCHEMA {SCHEMA} CASCADE")
    assert cli(own_server, "install", "--grant", "freezer")[0] == 0
    assert cli(own_server, "pause", "-d", database, "--holder", "h", user="freezer")[0] == 0
    assert cli(own_server, "resume", "-d", database, "--holder", "h", user="freezer")[0] == 0
    assert cli(own_server, "status")[0] == 0
    with own_server.connect_factory("freezer")() as freezer, pytest.raises(psycopg.errors.InsufficientPrivilege):
        freezer.execute(f"CREATE OR REPLACE PROCEDURE {SCHEMA}.thaw_all() LANGUAGE sql AS ''")


@pytest.mark.parametrize("call", ["thaw('{}')", "thaw_all()", "thaw_expired()"])
def test_no_planted_name_runs_when_a_superuser_thaws_in_psql(own_server, new_database, call):
    database = new_database(own_server)
    assert cli(own_server, "pause", "-d", database, "--admit", "readers")[0] == 0
    if "expired" in call:
        own_server.execute(f"UPDATE {SCHEMA}.freezes SET lease_until = now()")
    own_server.execute("GRANT CREATE ON DATABASE postgres TO app")
    with own_server.connect_factory("app")() as app:
        plant(app)
    with own_server.control() as superuser:
        superuser.execute("SET search_path = evil, pg_catalog")
        superuser.execute(f"CALL {SCHEMA}.{call.format(database)}".encode())

    assert not app_is_super(own_server)
    assert json.loads(cli(own_server, "status", "--json")[1])["freezes"] == []


@pytest.mark.pg(">=16")
def test_functions_with_the_names_of_pg_walinspect_prove_nothing_and_do_not_run(own_server, owned):
    own_server.execute("CREATE EXTENSION pg_walinspect SCHEMA pg_catalog", "template1")
    own_server.execute("GRANT CREATE ON DATABASE postgres TO app")
    with own_server.connect_factory("app")() as app:
        app.execute("CREATE SCHEMA evil")
        app.execute("GRANT USAGE ON SCHEMA evil TO PUBLIC")
        for name, arguments in (("block_info", "pg_lsn, pg_lsn, boolean"), ("records_info", "pg_lsn, pg_lsn")):
            app.execute(
                f"CREATE FUNCTION evil.pg_get_wal_{name}({arguments}) RETURNS SETOF record LANGUAGE plpgsql AS "
                f"$$ BEGIN {ESCALATE} RETURN; END $$"
            )
    code, said = cli(
        own_server, "run", "-d", owned, "--strategy", READ_ONLY, "--require", "none", "--json", "--", "true"
    )
    assert (code, app_is_super(own_server)) == (0, False), said
    assert json.loads(said)["attestation"]["method"] != "wal"
