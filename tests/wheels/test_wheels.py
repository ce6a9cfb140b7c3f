"""Both distributions, built, installed into clean environments, and tried there on a real server."""

import json
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from devtools.binaries import CHECKOUT
from devtools.environment import without
from devtools.pgserver import password

# Airflow is installed, with whatever installer is there.
pytestmark = pytest.mark.timeout(600)

CONSTRAINTS = CHECKOUT / "constraints.txt"


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The files that would be published, built from what git has."""
    place = tmp_path_factory.mktemp("built")
    sources = place / "sources"
    for name in run("git", "ls-files", "-z", cwd=CHECKOUT).split("\0"):
        if name and (CHECKOUT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, sources / name)
    for project in (sources / "engine", sources):
        run(sys.executable, "-m", "hatchling", "build", "-d", place, cwd=project)
    return sorted(place.glob("*.*"))


def environment(place, *requirements):
    venv.create(place, with_pip=True)
    python = place / "bin/python"
    uv = shutil.which("uv")
    words = [uv, "pip", "install", "--quiet", "--python", python] if uv else [python, "-m", "pip", "install", "--quiet"]
    run(*words, "--constraint", CONSTRAINTS, *requirements)
    return python


def wheel(built, name):
    return next(path for path in built if path.suffix == ".whl" and path.name.startswith(f"{name}-"))


def sdist(built, name):
    return next(path for path in built if path.suffix == ".gz" and path.name.startswith(f"{name}-"))


@pytest.fixture(scope="session")
def engine(built, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("engine"), wheel(built, "pg_freeze"))


def clean(**more):
    return {**without("PG", "AIRFLOW", "PYTHON"), **more}


def test_the_engine_freezes_where_there_is_no_airflow(engine, server, app_database, tmp_path):
    installed = {one["name"] for one in json.loads(run(engine, "-m", "pip", "list", "--format", "json"))}
    there = run(engine, "-c", "import importlib.util as u; print(u.find_spec('airflow'))", cwd=tmp_path)
    assert there.strip() == "None"
    dependencies = {"markdown-it-py", "mdurl", "psycopg", "psycopg-binary", "pygments", "rich", "typing-extensions"}
    assert {name.lower().replace("_", "-") for name in installed} <= dependencies | {"pg-freeze", "pip", "setuptools"}
    program = engine.with_name("pg-freeze")
    environment = clean(PG_FREEZE_DSN=server.dsn("postgres", "freezer"))

    frozen = json.loads(run(program, "pause", "--database", app_database, "--json", env=environment, cwd=tmp_path))
    status = json.loads(run(program, "status", "--json", env=environment, cwd=tmp_path))
    run(program, "resume", "--database", app_database, env=environment, cwd=tmp_path)
    done = json.loads(
        run(program, "run", "--database", app_database, "--json", "--", "true", env=environment, cwd=tmp_path)
    )

    assert frozen["state"] == "frozen"
    assert frozen["token"] in [one["token"] for one in status["freezes"]]
    assert done["attestation"]["level"] in {"strict", "quiesced"}


def test_a_connection_of_airflow_is_refused_where_only_the_engine_is(engine, tmp_path):
    program = engine.with_name("pg-freeze")
    done = subprocess.run(
        [program, "status", "--conn-id", "gitlab"],
        capture_output=True,
        text=True,
        check=False,
        env=clean(),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "pip install ./engine . in a checkout" in done.stderr


def test_the_provider_brings_the_engine_its_examples_and_connections(built, server, app_database, tmp_path):
    python = environment(tmp_path / "provider", wheel(built, "pg_freeze"), wheel(built, "airflow_provider_pg_freeze"))
    airflow = clean(AIRFLOW_HOME=str(tmp_path / "home"), AIRFLOW__CORE__LOAD_EXAMPLES="False")

    listed = json.loads(run(python, "-W", "ignore", "-m", "airflow", "providers", "list", "-o", "json", env=airflow))
    assert "airflow-provider-pg-freeze" in [one["package_name"] for one in listed]
    examples = "import pathlib, runpy, airflow_pg_freeze.example_dags as e\n"
    examples += "[runpy.run_path(str(p)) for p in sorted(pathlib.Path(*e.__path__).glob('*.py'))]"
    run(python, "-W", "ignore", "-c", examples, env=airflow, cwd=tmp_path)

    connection = {
        "conn_type": "postgres",
        "host": "127.0.0.1",
        "port": server.port,
        "login": "freezer",
        "password": password("freezer"),
        "schema": app_database,
    }
    known = {**airflow, "AIRFLOW_CONN_GITLAB": json.dumps(connection)}
    program = python.with_name("pg-freeze")
    found = json.loads(run(program, "status", "--conn-id", "gitlab", "--json", env=known, cwd=tmp_path))
    assert found["freezes"] == []


def test_what_is_published_holds_its_own_files_and_no_others(built):
    engine = set(zipfile.ZipFile(wheel(built, "pg_freeze")).namelist())
    provider = set(zipfile.ZipFile(wheel(built, "airflow_provider_pg_freeze")).namelist())
    with tarfile.open(sdist(built, "airflow_provider_pg_freeze")) as opened:
        source = {Path(*Path(name).parts[1:]).as_posix() for name in opened.getnames()}

    assert {
        "pg_freeze/sql/install.sql",
        "pg_freeze/journal/migrations/0001.sql",
        "pg_freeze/journal/digests.txt",
        "pg_freeze/py.typed",
        "pg_freeze/cli/verbs/resume.py",
    } <= engine
    assert not [name for name in engine if name.startswith("airflow")]
    assert {"airflow_pg_freeze/example_dags/pg_freeze_guard.py", "airflow_pg_freeze/py.typed"} <= provider
    assert not [name for name in provider if name.startswith("pg_freeze/")]
    assert not [name for name in source if name.startswith("engine")]
    assert "tests/conftest.py" in source
