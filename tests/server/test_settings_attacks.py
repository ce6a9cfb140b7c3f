"""Settings that the owner of a database, or a role for itself, has made the default of its sessions, and so of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import psycopg
import pytest
from psycopg import sql

from devtools.asking import pause
from devtools.pgserver import Server
from pg_freeze import State, connector, history, install, resume
from pg_freeze.control import control
from tests.server.clients import dead_men, ms, settings_of, wait_until
from tests.server.names import SCHEMA

pytestmark = pytest.mark.every_version

#: What an attacker, or his ignorance, makes of a setting.
_WORST: Final = {
    "least": "CASE vartype WHEN 'bool' THEN 'off' WHEN 'enum' THEN enumvals[1] ELSE min_val END",
    "most": "CASE vartype WHEN 'bool' THEN 'on' WHEN 'enum' THEN enumvals[cardinality(enumvals)] ELSE max_val END",
}
_OTHERS: Final = """
    SELECT name FROM pg_settings
     WHERE source IN ('database', 'user', 'database user') AND context = 'user' AND setting IS DISTINCT FROM boot_val"""
_SHOWN: Final = {"TimeZone", "timezone_abbreviations", "lc_monetary", "lc_numeric", "lc_time"}


def worst(server: Server, extreme: str) -> Iterator[tuple[str, str]]:
    rows = server.execute(
        f"SELECT name, {_WORST[extreme]} FROM pg_settings WHERE context = 'user' AND vartype <> 'string'"
        " AND name !~ '^(debug|transaction)_(?!timeout)'"
    )
    assert len(rows) > 80
    yield from rows
    yield from [
        ("default_tablespace", "nowhere"),
        ("default_table_access_method", "heap"),
        ("search_path", "nowhere"),
        ("DateStyle", "German"),
        ("plpgsql.extra_errors", "all"),
        ("plpgsql.check_asserts", "off"),
    ]


@pytest.fixture
def spoilt(own_server: Server) -> Any:
    """Whatever may be set for the maintenance database, and for the role that freezes, is set to its worst."""

    def spoil(extreme: str, whose: str) -> None:
        own_server.execute("CREATE ROLE maintainer LOGIN; GRANT maintainer TO freezer")
        own_server.execute("ALTER DATABASE postgres OWNER TO maintainer")
        done = 0
        who = "maintainer" if "DATABASE" in whose else "freezer"
        with own_server.control() as conn:
            conn.execute("DO $$BEGIN END$$")
            conn.execute(f"SET ROLE {who}".encode())
            for name, value in worst(own_server, extreme):
                command = f"ALTER {whose} SET {name} = {sql.Literal(value).as_string()}"
                with suppress(psycopg.errors.InvalidParameterValue, psycopg.errors.UndefinedObject):
                    conn.execute(command.encode())
                    done += 1
        assert done > 80

    return spoil


def connect_to(server: Server) -> Any:
    return connector(server.dsn("postgres", "freezer"))


@pytest.mark.parametrize("extreme", _WORST)
@pytest.mark.parametrize("whose", ["DATABASE postgres", "ROLE freezer"])
def test_no_setting_of_others_reaches_a_session_of_ours_and_a_lease_ends_on_time(
    own_server, new_database, spoilt, extreme, whose
):
    database, connect = new_database(own_server), connect_to(own_server)
    install(connect)
    spoilt(extreme, whose)
    before = settings_of(own_server)

    with control(connect, "look") as conn:
        left = {name for (name,) in conn.execute(_OTHERS)}
        assert left <= _SHOWN
        assert conn.execute("SHOW exit_on_error").fetchone() == ("off",)
        assert conn.execute("SHOW row_security").fetchone() == ("on",)
    pause(connect, databases=[database], holder="test", lease=ms(2500), drain_timeout=ms(800))
    assert len(dead_men(own_server)) == 1

    def thawed() -> bool:
        return history(connect, limit=1)[0].state is State.THAWED

    wait_until(thawed)
    assert settings_of(own_server) == before
    pause(connect, databases=[database], holder="test")
    assert len(resume(connect, databases=[database], holder="test").thawed) == 1
    assert settings_of(own_server) == before


def test_a_session_that_dies_of_its_first_error_would_be_no_dead_man_switch(own_server, new_database):
    database, connect = new_database(own_server), connect_to(own_server)
    own_server.execute("ALTER ROLE freezer SET exit_on_error = on")
    before = settings_of(own_server)
    frozen = pause(connect, databases=[database], holder="test")
    own_server.execute("REVOKE app_owner FROM freezer")  # so that a thaw fails
    own_server.execute(f"UPDATE {SCHEMA}.freezes SET lease_until = clock_timestamp()")
    wait_until(lambda: history(connect, limit=1)[0].left_over)

    assert dead_men(own_server) == [frozen.dead_man_pid]
    own_server.execute("GRANT app_owner TO freezer")
    wait_until(lambda: settings_of(own_server) == before)


def test_a_superuser_is_not_made_to_work_without_triggers(own_server):
    own_server.execute("ALTER DATABASE postgres SET session_replication_role = replica")

    with control(connector(own_server.dsn("postgres", "postgres")), "look") as conn:
        assert conn.execute("SHOW session_replication_role").fetchone() == ("origin",)
