"""What Airflow sees of the distribution: the provider, its DAGs."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import airflow_pg_freeze
from airflow_pg_freeze.provider_info import get_provider_info
from pg_freeze import history
from tests.airflow.running import load_dags

DAGS = Path(__file__).parents[2] / "dags"


def airflow_command(*arguments):
    command = [sys.executable, "-W", "ignore", "-m", "airflow", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_airflow_lists_the_provider(metadata_database):
    # Only if what it says of itself is as Airflow's schema wants it.
    listed = json.loads(airflow_command("providers", "list", "--output", "json"))

    ours = [provider for provider in listed if provider["package_name"] == "airflow-provider-pg-freeze"]
    assert [provider["version"] for provider in ours] == [airflow_pg_freeze.__version__]


def test_every_hook_operator_sensor_and_trigger_is_named_and_can_be_imported():
    info = get_provider_info()
    named = {
        module
        for kind in ("hooks", "operators", "sensors", "triggers")
        for entry in info[kind]
        for module in entry["python-modules"]
    }
    package = Path(airflow_pg_freeze.__file__).parent
    paths = [
        path for kind in ("hooks", "operators", "sensors", "triggers") for path in package.glob(f"{kind}/[!_]*.py")
    ]
    there = {".".join(path.relative_to(package.parent).with_suffix("").parts) for path in paths}

    assert named == there
    for module in named:
        importlib.import_module(module)


@pytest.mark.parametrize("path", sorted(DAGS.glob("*.py")), ids=lambda path: path.stem)
def test_each_example_is_a_dag_that_loads_fast(path):
    load_dags(path)  # what the file imports is imported once
    began = time.process_time()
    dags = load_dags(path)

    assert time.process_time() - began < 1
    assert dags


@pytest.fixture
def example(connection, app_database, monkeypatch, tmp_path):
    connection(app_database, conn_id="postgres_default")

    def load(command):
        monkeypatch.setenv("AIRFLOW_VAR_PG_SNAPSHOT_COMMAND", command)
        return load_dags(DAGS / "pg_freeze_example.py")["pg_freeze_example"]

    return load


def test_the_example_snapshots_a_frozen_database(example, run, server, app_database, tmp_path, app_connect):
    copy = tmp_path / "snapshot"
    finished = run(example(f"cp --recursive '{server.data}/global' '{copy}'"))

    assert finished.state == "success", finished.states
    assert (copy / "pg_control").exists()
    assert finished.xcoms["checkpoint"]["checkpoint_lsn"]
    app_connect(app_database).execute("CREATE TABLE writable ()")


def test_the_run_of_the_example_fails_with_its_snapshot_and_thaws(example, run, connect, app_database, app_connect):
    finished = run(example("exit 1"))

    assert finished.state == "failed"
    assert finished.states["snapshot"] == "failed"
    assert finished.states["resume"] == "success"
    assert [freeze.state for freeze in history(connect) if app_database in freeze.databases] == ["thawed"]
    app_connect(app_database).execute("CREATE TABLE writable ()")
