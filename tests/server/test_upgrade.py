"""The journal can be upgraded: explicitly, also while databases are frozen, and never backwards."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, LiteralString

import psycopg
import pytest
from psycopg import sql

import pg_freeze as core
from devtools.asking import frozen, pause
from devtools.pgserver import Server
from devtools.rights import checkpointer
from pg_freeze.control import control
from pg_freeze.journal.definition import Definition
from pg_freeze.journal.install import install
from tests.server import newer
from tests.server.clients import background, dead_men, settings_of, wait_until

#: All that makes a journal what it is.
_FINGERPRINT: Final[LiteralString] = """
    SELECT obj_description(n.oid, 'pg_namespace'),
           (SELECT string_agg(concat(c.relname, a.attname, a.atttypid, c.relacl), ' ' ORDER BY c.relname, a.attnum)
              FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid WHERE c.relnamespace = n.oid),
           (SELECT string_agg(concat(p.oid::regprocedure, p.prosrc, p.proacl), ' ' ORDER BY p.oid::regprocedure::text)
              FROM pg_proc p WHERE p.pronamespace = n.oid)
      FROM pg_namespace n WHERE n.nspname = 'pgfreeze'"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return newer.program(tmp_path)


@pytest.fixture
def second(package: Path) -> Definition:
    return Definition.read(package, "0.2.0")


@pytest.fixture
def site(own_server: Server, new_database) -> tuple[Server, str]:
    """A server whose journal is a superuser's, and a database; the role that freezes may read its tables."""
    name = new_database(own_server)
    own_server.execute("GRANT app TO freezer")
    with own_server.connect_factory("app", name)() as app:
        app.execute("CREATE TABLE things (i int)")
    core.install(own_server.control, grant=["freezer"])
    return own_server, name


def upgrade(server: Server, wanted: Definition, *, user: str = "postgres", database: str = "postgres") -> bool:
    with control(server.connect_factory(user, database), "install") as conn:
        return install(conn, wanted=wanted)


def seen_by(server: Server, database: str = "postgres") -> list[str | None]:
    return [who for (who,) in server.execute("SELECT seen_by FROM pgfreeze.freezes ORDER BY requested_at", database)]


def writable(server: Server, name: str) -> bool:
    with server.connect_factory("app", name)() as app:
        try:
            app.execute("SET statement_timeout = '1s'")
            app.execute("INSERT INTO things VALUES (1)")
        except (
            psycopg.errors.ReadOnlySqlTransaction,
            psycopg.errors.InsufficientPrivilege,
            psycopg.errors.QueryCanceled,
        ):
            return False
    return True


@contextmanager
def frozen_by(strategy: str, server: Server, name: str, lease: float) -> Iterator[str]:
    """Freeze a database; return the database that has the journal."""
    limits: dict[str, Any] = {"lease": timedelta(seconds=lease), "drain_timeout": timedelta(seconds=1)}
    user = checkpointer(server.version)
    to = partial(server.connect_factory, user)
    if strategy == "lock":
        with (
            suppress(core.LeaseLost),
            frozen(to(), lambda where: to(where)(), databases=[name], holder="test", **limits),
        ):
            yield "postgres"
        return
    where = name if strategy == "privileges" else "postgres"
    pause(to(), connect_to=lambda where: to(where)(), databases=[name], holder="test", strategy=strategy, **limits)
    yield where


@pytest.mark.every_version
@pytest.mark.parametrize("strategy", ["read-only", "lock", "privileges"])
def test_a_freeze_of_the_version_before_thaws_itself_in_the_new_one_when_its_lease_ends(site, second, strategy):
    server, name = site
    before = settings_of(server)
    user = checkpointer(server.version) if strategy == "privileges" else "postgres"

    with frozen_by(strategy, server, name, 10) as where:
        (switch,) = dead_men(server)
        assert upgrade(server, second, user=user, database=where)
        assert dead_men(server) == [switch]
        assert not writable(server, name)
        wait_until(lambda: not dead_men(server), within=40)

    assert seen_by(server, where) == ["version 2"]
    assert server.execute("SELECT state, thawed_by FROM pgfreeze.freezes", where)[0] in [
        ("thawed", "lease ended"),
        ("thawed", "lock session ended"),
    ]
    assert settings_of(server) == before
    assert writable(server, name)


@pytest.mark.every_version
@pytest.mark.parametrize("strategy", ["read-only", "lock", "privileges"])
@pytest.mark.parametrize("program", ["older", "newer"])
def test_a_freeze_of_the_version_before_is_resumed_by_either_program(site, second, package, strategy, program):
    server, name = site
    before = settings_of(server)
    user = checkpointer(server.version)

    with frozen_by(strategy, server, name, 60) as where:
        upgrade(server, second, user=user if strategy == "privileges" else "postgres", database=where)
        if program == "newer":
            words = ("resume", "--database", name, "--holder", "test")
            code, said = newer.run(package, server.dsn("postgres", user), *words)
            assert code == 0, said
        else:
            to = partial(server.connect_factory, user)
            done = core.resume(to(), databases=[name], holder="test", connect_to=lambda to_: to(to_)())
            assert [one.state for one in done.thawed] == ["thawed"]

    assert seen_by(server, where) == ["version 2"]
    assert settings_of(server) == before
    assert writable(server, name)
    wait_until(lambda: not dead_men(server))


def test_no_switch_dies_of_upgrades_that_come_all_the_time(site, new_database, second):
    server, first = site
    names = [first, *(new_database(server) for _ in range(5))]
    connect = server.connect_factory()
    for number, name in enumerate(names):
        limits = {"lease": timedelta(seconds=6 + number / 3), "drain_timeout": timedelta(seconds=1)}
        pause(connect, databases=[name], holder=name, **limits)
    stop = threading.Event()

    def hammer() -> int:
        for number in itertools.count(second.version.routines):
            if stop.is_set():
                return number
            with suppress(core.FreezeError):
                upgrade(server, replace(second, version=second.version._replace(routines=number)))
        raise AssertionError

    with background(hammer) as upgrades:
        try:
            wait_until(lambda: not dead_men(server), within=60)
        finally:
            stop.set()
        assert upgrades.result(60) > second.version.routines + 3

    assert server.execute("SELECT DISTINCT state, thawed_by FROM pgfreeze.freezes") == [("thawed", "lease ended")]
    assert "deadlock detected" not in server.tail(5000)


def test_an_upgrade_that_is_killed_at_any_statement_leaves_the_journal_as_it_was(site, second):
    server, name = site
    pause(server.connect_factory(), databases=[name], holder="test")
    server.execute(
        "CREATE SEQUENCE public.statements; CREATE TABLE public.fatal (n bigint); INSERT INTO public.fatal VALUES (0);"
        "CREATE FUNCTION public.die() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('public.statements') = (SELECT n FROM public.fatal)"
        " THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; END $$;"
        "CREATE EVENT TRIGGER die ON ddl_command_end WHEN TAG IN ('ALTER TABLE', 'CREATE TABLE', 'CREATE INDEX',"
        " 'CREATE VIEW', 'DROP VIEW', 'CREATE FUNCTION', 'CREATE PROCEDURE', 'CREATE TRIGGER', 'COMMENT', 'GRANT',"
        " 'REVOKE') EXECUTE FUNCTION public.die()"
    )
    first = server.execute(_FINGERPRINT)
    for number in itertools.count(1):
        server.execute(
            sql.SQL("UPDATE public.fatal SET n = {}; ALTER SEQUENCE public.statements RESTART").format(
                sql.Literal(number)
            )
        )
        try:
            upgrade(server, second)
        except core.ServerLost:
            assert server.execute(_FINGERPRINT) == first
            continue
        break

    assert number > len(dead_men(server)) + 50
    assert server.execute("SELECT pgfreeze.newly_made()") == [(2,)]
    assert len(core.resume(server.connect_factory(), databases=[name], holder="test").thawed) == 1


def test_an_upgrade_waits_for_whoever_uses_the_journal_and_then_says_who_that_is(site, second, monkeypatch):
    server, name = site
    monkeypatch.setattr("pg_freeze.journal.install.PATIENCE", timedelta(seconds=1))
    first = server.execute(_FINGERPRINT)
    with server.connect_factory()() as reader:
        reader.execute("SET application_name = 'a report'; BEGIN; SELECT 1 FROM pgfreeze.freezes")
        with pytest.raises(core.FreezeError, match=r"in use .* \(freezer, a report\): nothing was changed"):
            upgrade(server, second)
        assert server.execute(_FINGERPRINT) == first
        # Nobody waits for the upgrade either.
        pause(server.connect_factory(), databases=[name], holder="test")
    assert upgrade(server, second)


def test_grants_and_owners_survive_an_upgrade_by_another_superuser(site, second):
    server, _ = site
    server.create_role("monitor")
    server.create_role("other", "LOGIN SUPERUSER")
    server.execute(
        "GRANT USAGE ON SCHEMA pgfreeze TO monitor; GRANT SELECT ON pgfreeze.sessions, pgfreeze.freezes TO monitor;"
        "GRANT EXECUTE ON FUNCTION pgfreeze.open_freezes(text[], boolean) TO monitor"
    )

    upgrade(server, second, user="other")

    assert server.execute(
        "SELECT DISTINCT relowner::regrole::text FROM pg_class WHERE relnamespace = 'pgfreeze'::regnamespace"
        " UNION SELECT proowner::regrole::text FROM pg_proc WHERE pronamespace = 'pgfreeze'::regnamespace"
    ) == [("postgres",)]
    may: LiteralString = "SELECT has_table_privilege({}, 'pgfreeze.' || relname, {}) FROM unnest({}::text[]) relname"
    asked = [
        ("freezer", "SELECT, INSERT, UPDATE", ["notes", "freezes", "sessions"], [True, True, True]),
        ("monitor", "SELECT", ["sessions", "freezes", "starting", "notes"], [True, True, False, False]),
    ]
    for role, right, names, expected in asked:
        got = server.execute(sql.SQL(may).format(role, right, names))
        assert [one for (one,) in got] == expected
    assert server.execute(
        "SELECT has_function_privilege('monitor', 'pgfreeze.open_freezes(text[], boolean)', 'EXECUTE'),"
        " has_function_privilege('freezer', 'pgfreeze.newly_made()', 'EXECUTE'),"
        " has_function_privilege('app', 'pgfreeze.newly_made()', 'EXECUTE')"
    ) == [(True, True, False)]
