"""A strategy that another distribution brings: found by its entry point, with nothing of ours changed for it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from devtools.environment import without
from devtools.pgserver import Server
from tests.server.clients import is_alive, wait_until

pytestmark = pytest.mark.pg("!=15,!=16,!=17")

#: Chosen roles may not log in, and their sessions are ended.
MODULE = '''
from pg_freeze import findings
from pg_freeze.strategies.base import Strategy

ROUTINES = """
    CREATE OR REPLACE FUNCTION pgfreeze.engage_no_logins(f pgfreeze.freezes) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
    DECLARE
        r text;
    BEGIN
        INSERT INTO pgfreeze.frozen_databases (token, database, name, closed)
        SELECT f.token, d.oid, d.datname, false FROM pg_database d WHERE d.datname::text = ANY (f.databases);
        FOREACH r IN ARRAY f.roles LOOP EXECUTE format('ALTER ROLE %I NOLOGIN', r); END LOOP;
    END $$;
    CREATE OR REPLACE FUNCTION pgfreeze.release_no_logins(the_token uuid) RETURNS text
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
    DECLARE
        r text;
    BEGIN
        FOR r IN SELECT unnest(roles) FROM pgfreeze.freezes WHERE token = the_token LOOP
            EXECUTE format('ALTER ROLE %I LOGIN', r);
        END LOOP;
        RETURN NULL;
    END $$"""


class NoLogins(Strategy):
    name = "no-logins"
    enters = False
    options = frozenset({"roles"})
    lingers = "was.there AND s.usename::text = ANY (held.roles)"

    def findings(self, around):
        yield from findings.signal(around)

    def install(self, conn):
        conn.execute(ROUTINES)

    def facts(self, freeze):
        return {"kept out": ", ".join(freeze.roles), **super().facts(freeze)}


STRATEGY = NoLogins()
'''


class Site:
    """A server, its application, and the command line where that distribution is installed or not."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.server = server
        self.environment = without("PG", "AIRFLOW", "COLUMNS") | {"PG_FREEZE_DSN": server.dsn()}
        self.directory = directory
        information = directory / "pg_freeze_no_logins-1.0.dist-info"
        information.mkdir()
        (directory / "pg_freeze_no_logins.py").write_text(MODULE)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: pg-freeze-no-logins\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(
            "[pg_freeze.strategies]\nno-logins = pg_freeze_no_logins:STRATEGY\n"
        )

    def pg_freeze(self, *words: str, installed: bool = True) -> tuple[int, dict[str, Any]]:
        more = {"PYTHONPATH": str(self.directory)} if installed else {}
        done = subprocess.run(
            [sys.executable, "-m", "pg_freeze", words[0], "--json", *words[1:]],
            env=self.environment | more,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, json.loads(done.stdout)

    def app(self) -> psycopg.Connection[Any]:
        return self.server.connect_factory("app", "app")()

    def keeps_out(self) -> bool:
        try:
            self.app().close()
        except psycopg.OperationalError:
            return True
        return False


@pytest.fixture
def site(own_server: Server, tmp_path: Path) -> Site:
    own_server.create_database("app", "app")
    return Site(own_server, tmp_path)


FREEZE = ("--database", "app", "--holder", "me", "--strategy", "no-logins", "--role", "app")


def test_it_freezes_and_thaws_through_the_command_line(site):
    with site.app() as before:
        code, freeze = site.pg_freeze("pause", *FREEZE)
        assert (code, freeze["strategy"], freeze["state"]) == (0, "no-logins", "frozen")
        assert freeze["terminated"] == {"idle": 1}
        assert not is_alive(before)
    assert site.keeps_out()
    assert site.pg_freeze("pause", *FREEZE)[1]["token"] == freeze["token"]
    assert site.pg_freeze("status", "--database", "app")[1]["token"] == freeze["token"]

    code, done = site.pg_freeze("resume", "--database", "app", "--holder", "me")

    assert (code, [one["token"] for one in done["thawed"]]) == (0, [freeze["token"]])
    assert not site.keeps_out()


def test_it_freezes_for_the_time_of_a_command(site):
    look = f"import psycopg; psycopg.connect({site.server.dsn('app', 'app')!r})"

    code, done = site.pg_freeze("run", *FREEZE, "--require", "none", "--", sys.executable, "-c", look)

    assert (code, done["command_exit_code"], done["strategy"]) == (1, 1, "no-logins")
    assert not site.keeps_out()


def test_preflight_judges_it_and_no_option_that_it_does_not_know_is_taken(site):
    assert site.pg_freeze("preflight", *FREEZE)[0] == 0
    code, refused = site.pg_freeze("pause", *FREEZE, "--admit", "nobody")
    assert (code, refused["error"]) == (2, "InvalidRequest")


def test_where_it_is_not_installed_its_freeze_is_shown_and_thawed_and_none_begins(site):
    code, freeze = site.pg_freeze("pause", *FREEZE, "--lease", "1h")
    assert code == 0

    code, refused = site.pg_freeze("pause", *FREEZE, installed=False)
    assert (code, refused["error"]) == (2, "InvalidRequest")
    assert "lock" in refused["message"]
    assert site.pg_freeze("status", "--database", "app", installed=False)[1]["strategy"] == "no-logins"
    code, done = site.pg_freeze("resume", "--database", "app", "--holder", "me", installed=False)

    assert (code, [one["token"] for one in done["thawed"]]) == (0, [freeze["token"]])
    assert not site.keeps_out()


def test_the_server_thaws_it_when_the_lease_ends(site):
    assert site.pg_freeze("pause", *FREEZE, "--lease", "2s", "--drain-timeout", "1s")[0] == 0

    wait_until(lambda: not site.keeps_out())
