"""What the owner of a database, or a stranger in it, tries against whoever enters it: by names, settings and locks."""

from __future__ import annotations

import logging
import time
from contextlib import closing, suppress
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg import sql

from devtools.asking import frozen, pause, preflight
from devtools.pgserver import Server
from pg_freeze import FreezeError, FreezeRefused, connector, status, thaw_expired
from pg_freeze.attestation import Method
from tests.server.clients import background, wait_until
from tests.server.names import LOCK, MARK, PRIVILEGES, SCHEMA

pytestmark = pytest.mark.every_version


def ways(server: Server, user: str = "freezer") -> tuple[Any, Any]:
    """Return the two ways to connect that the command line and the hook have."""
    return connector(server.dsn("postgres", user)), lambda name: connector(server.dsn(name, user))()


@pytest.fixture
def owned(own_server: Server, new_database) -> str:
    """A database that the application itself owns, with a table, which freezer may freeze by privileges."""
    name: str = new_database(own_server)
    own_server.execute("GRANT app TO freezer")
    own_server.execute(sql.SQL("ALTER DATABASE {} OWNER TO app").format(sql.Identifier(name)))
    own_server.execute(sql.SQL("GRANT CREATE ON DATABASE {} TO freezer").format(sql.Identifier(name)))
    if own_server.version < 15:
        own_server.execute("ALTER SCHEMA public OWNER TO app", name)
    with own_server.connect_factory("app", name)() as app:
        app.execute("CREATE TABLE t (i int)")
    return name


@pytest.mark.pg(">=15")
def test_pg_walinspect_is_not_called_in_a_schema_that_the_owner_of_the_database_could_swap(own_server, owned):
    own_server.execute("CREATE EXTENSION pg_walinspect SCHEMA public", owned)
    own_server.execute("GRANT EXECUTE ON FUNCTION pg_get_wal_records_info TO freezer", owned)
    own_server.execute("GRANT CONNECT ON DATABASE postgres TO freezer")
    connect, connect_to = ways(own_server)
    proof = partial(preflight, partial(connect_to, owned), databases=["postgres"], holder="h")
    freeze = partial(frozen, connect, connect_to, databases=[owned], holder="h", strategy=PRIVILEGES, checkpoint=False)

    advice = proof().proof.advice
    with freeze() as hold:
        pass
    assert hold.attestation.method is not Method.WAL
    assert "ALTER EXTENSION pg_walinspect SET SCHEMA pg_catalog;" in advice

    own_server.execute("ALTER EXTENSION pg_walinspect SET SCHEMA pg_catalog", owned)
    assert proof().proof.method is Method.WAL
    with freeze() as hold:
        pass
    assert hold.attestation.method is Method.WAL


@pytest.mark.parametrize(
    "power", ["postgres", "pg_execute_server_program", pytest.param("deputy", marks=pytest.mark.pg("<16"))]
)
def test_nobody_is_told_to_grant_a_role_that_can_become_a_superuser(own_server, new_database, power):
    own_server.create_role("dba")
    own_server.execute("CREATE ROLE deputy CREATEROLE")
    own_server.execute(sql.SQL("GRANT {} TO dba").format(sql.Identifier(power)))
    own_server.execute("ALTER ROLE dba SET default_transaction_read_only = off")
    database = new_database(own_server)
    own_server.execute(sql.SQL("ALTER DATABASE {} OWNER TO dba").format(sql.Identifier(database)))
    own_server.execute(sql.SQL("GRANT CREATE ON DATABASE {} TO freezer").format(sql.Identifier(database)))
    with own_server.connect_factory("dba", database)() as dba:
        dba.execute("CREATE TABLE t (i int)") if own_server.version < 15 else dba.execute(
            "CREATE SCHEMA s CREATE TABLE t (i int)"
        )
    connect, connect_to = ways(own_server)

    found = preflight(connect, databases=[database], holder="h").findings
    with (
        pytest.raises(FreezeRefused) as refused,
        frozen(connect, connect_to, databases=[database], holder="h", strategy=PRIVILEGES, checkpoint=False),
    ):
        pytest.fail("it was frozen")

    assert {"not-owner", "role-override"} <= {one.code for one in found}
    for said in (str(refused.value), *(one.remedy for one in found)):
        assert "GRANT dba" not in said
        assert "GRANT postgres" not in said


@pytest.mark.pg(">=15")
def test_a_view_that_takes_the_place_of_a_table_does_not_make_us_lock_what_the_server_works_with(own_server, owned):
    connect, connect_to = ways(own_server, "postgres")
    app = own_server.connect_factory("app", owned)
    with app() as holding, app() as swapping:
        swapping.execute("CREATE TABLE t2 (i int)")
        holding.execute("BEGIN; LOCK TABLE t IN SHARE MODE")

        def freeze() -> None:
            with frozen(connect, connect_to, databases=[owned], holder="h", strategy=LOCK, checkpoint=False):
                pytest.fail("it was frozen")

        with background(freeze) as attempt:
            waiting = "SELECT 1 FROM pg_locks WHERE relation = 't'::regclass AND NOT granted"
            wait_until(lambda: swapping.execute(waiting).fetchone())
            swapping.execute(
                "BEGIN; ALTER TABLE t2 RENAME TO aside; "
                "CREATE VIEW t2 WITH (security_invoker = true) AS SELECT FROM pg_catalog.pg_db_role_setting; "
                "GRANT ALL ON t2 TO PUBLIC; COMMIT"
            )
            holding.execute("ROLLBACK")
            with pytest.raises(FreezeRefused, match="pg_db_role_setting"):
                attempt.result(timeout=60)
    assert own_server.execute("SELECT FROM pg_locks WHERE mode = 'ExclusiveLock' AND locktype = 'relation'") == []
    assert status(connect).freezes == ()


@pytest.mark.parametrize("tables", [["t"], []], ids=["tables", "no table"])
def test_a_session_that_only_calls_itself_one_of_ours_keeps_nobody_from_freezing(own_server, owned, tables):
    connect, connect_to = ways(own_server)
    own_server.create_role("stranger")
    if not tables:
        own_server.execute("DROP TABLE t", owned)
    # As every idle transaction with a lock it may be ended at the drain timeout.
    with closing(own_server.connect_factory("stranger", owned)()) as stranger:
        stranger.execute("SET application_name = 'pg-freeze lock x'")
        stranger.execute("CREATE TEMP TABLE mine (i int)")
        stranger.execute("BEGIN; LOCK TABLE mine IN EXCLUSIVE MODE")

        with frozen(
            connect, connect_to, databases=[owned], holder="h", strategy=PRIVILEGES, checkpoint=False, drain_timeout=2
        ) as hold:
            assert hold.freeze.holds


@pytest.mark.pg(">=17")
def test_a_lock_on_the_catalogs_that_the_server_itself_needs_holds_up_a_thaw_no_longer_than_it_is_held(
    own_server, new_database
):
    database = new_database(own_server)
    own_server.create_role("cron")
    own_server.execute("GRANT pg_maintain TO cron")
    connect, _ = ways(own_server)
    with own_server.connect_factory("cron")() as cron:
        pause(connect, databases=[database], holder="h")
        own_server.execute(f"UPDATE {SCHEMA}.freezes SET lease_until = now() + interval '1 s'")
        cron.execute("BEGIN; LOCK TABLE pg_catalog.pg_authid, pg_catalog.pg_database, pg_catalog.pg_db_role_setting")
        time.sleep(3)

        # It may have been ended meanwhile: not who has locked all that tells who he is.
        with suppress(psycopg.OperationalError):
            cron.execute("ROLLBACK")

        wait_until(lambda: not status(connect).freezes, within=30)


# Not to be had by all: a server of UTF8 cannot tell Python what it means in the others.
KEEPING_OUT = ["client_encoding = 'EUC_TW'", "restrict_nonsystem_relation_kind = 'view'"]


def test_no_setting_of_a_database_keeps_a_thaw_out(own_server, owned):
    connect, connect_to = ways(own_server)
    pause(connect, connect_to=connect_to, databases=[owned], holder="h", strategy=PRIVILEGES, dead_man=False)
    own_server.execute(f"UPDATE {SCHEMA}.freezes SET lease_until = now()", owned)
    with own_server.connect_factory("app", owned)() as app:
        limits = app.execute("SELECT name FROM pg_settings WHERE context = 'user' AND unit IN ('ms', 's')").fetchall()
        for setting in (*(f"{name} = 1" for (name,) in limits), *KEEPING_OUT):
            with suppress(psycopg.errors.UndefinedObject, psycopg.errors.InvalidParameterValue):
                app.execute(f"ALTER DATABASE {owned} SET {setting}".encode())
    assert len(limits) > 5

    thawed = thaw_expired(connect, connect_to)

    assert [one.holder for one in thawed] == ["h"]


def test_an_attestation_is_not_written_through_a_link_that_others_have_put_there(server, app_database, tmp_path):
    connect, connect_to = ways(server)
    with frozen(connect, connect_to, databases=[app_database], holder="h", strategy=LOCK, checkpoint=False) as hold:
        pass
    precious, file = tmp_path / "precious", tmp_path / "shared" / "attestation.json"
    precious.write_text("as it was")
    file.parent.mkdir()
    for link in (file, file.with_name(f".{file.name}.{hold.freeze.token}")):
        link.symlink_to(precious)

    hold.attestation.write(file)

    assert precious.read_text() == "as it was"
    assert not file.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(list(file.parent.iterdir())) == 2


def test_a_name_cannot_make_a_line_of_its_own_in_a_log(own_server, owned, caplog):
    connect, connect_to = ways(own_server)
    with own_server.connect_factory("app", owned)() as app:
        app.execute(f"CREATE SCHEMA {SCHEMA}")
        app.execute(f'CREATE TABLE {SCHEMA}."x\n2026-01-01 CRITICAL \x1b[2J: forged" ()')
        app.execute(f"GRANT USAGE ON SCHEMA {SCHEMA} TO PUBLIC")
    own_server.execute(f"ALTER ROLE freezer IN DATABASE {owned} SET application_name = '{MARK}'")
    own_server.execute(f"ALTER SCHEMA {SCHEMA} OWNER TO freezer", owned)
    caplog.set_level(logging.DEBUG)

    said = ""
    try:
        status(connect, connect_to=connect_to)
    except FreezeError as error:
        said = str(error)

    said = "".join([said, *(record.getMessage() for record in caplog.records)])
    assert "forged" in said
    assert said.isprintable()
