"""``--conn-id`` finds what Airflow finds, in its database too, and says nothing beside the one object."""

import json
import subprocess
import sys

import pytest

from devtools.asking import pause
from devtools.pgserver import password
from pg_freeze import resume


def command(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def environment(text):
    """Return what ``env -0`` has printed, but for what the shell and the freeze add."""
    pairs = (one.partition("=") for one in text.split("\0") if one)
    return {name: value for name, _, value in pairs if name != "_" and not name.startswith("PG_FREEZE_")}


def pg_freeze(*words):
    return command("-m", "pg_freeze", *words)


@pytest.fixture
def stored(metadata_database, server, app_database):
    """A connection in Airflow's database, put there as people do."""
    name = f"stored_{app_database}"
    uri = f"postgres://freezer:{password('freezer')}@127.0.0.1:{server.port}/{app_database}"
    added = command("-W", "ignore", "-m", "airflow", "connections", "add", name, "--conn-uri", uri)
    assert added.returncode == 0, added.stderr
    return name


def test_a_connection_in_airflows_database_is_found(stored, server, app_database):
    connect = server.connect_factory("freezer")
    pause(connect, databases=[app_database], holder="somebody")
    try:
        asked = pg_freeze("status", "--check", "--json", "--conn-id", stored, "--database", app_database)
    finally:
        resume(connect, databases=[app_database], holder="somebody")

    assert asked.returncode == 7, asked.stdout + asked.stderr
    assert json.loads(asked.stdout)["holder"] == "somebody"
    assert asked.stderr == ""


def test_one_that_is_nowhere_is_bad_usage(metadata_database):
    asked = pg_freeze("status", "--json", "--conn-id", "no_such_connection")

    assert asked.returncode == 2
    assert "no_such_connection" in json.loads(asked.stdout)["message"]


def test_a_command_gets_the_environment_that_was_given_and_nothing_of_airflows(stored, app_database):
    given = subprocess.run(["env", "-0"], capture_output=True, text=True, check=True).stdout

    block = ["run", "--conn-id", stored, "--database", app_database, "--strategy", "read-only", "--require", "none"]
    block.append("--no-checkpoint")  # which before PostgreSQL 15 only superusers may make
    done = pg_freeze(*block, "--", "env", "-0")

    assert done.returncode == 0, done.stderr
    seen = done.stdout[: done.stdout.rindex("\0") + 1]
    assert environment(seen) == environment(given)
