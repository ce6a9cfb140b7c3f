"""One Airflow for all end-to-end tests, each of which plays a scene of its own on it.

The processes are started by the pytest that the user has started, before its workers: with ``-n 10`` ten scenes are
played at the same time. A scene mostly waits, for Airflow and for leases.

``play(dag_id, event, **conf) -> Scene``
    a new scene: a database, and a run that can be started
``alone -> Airflow``
    the same Airflow, while no other test runs: for what kills the scheduler
``tell(scene, **words)``
    puts the scene into the table, which is shown at the end, and written by ``--e2e-table FILE``; *words* replace what
    the scene itself says of a column, see ``Row``
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from devtools.pgserver import Server, password
from devtools.rights import create_roles
from pg_freeze import Connect, connector
from tests.e2e.processes import SLOWNESS, Airflow, airflow_running, eventually, start
from tests.e2e.scene import SHORT_LEASE, Row, Scene

HERE = Path(__file__).parent
TABLE = pytest.StashKey[list[Row]]()
STAGE = pytest.StashKey[ExitStack]()
AIRFLOW = pytest.StashKey[Airflow]()
#: What the table calls them.
WIRINGS = {
    "frozen": "`pg_frozen`",
    "plain": "three operators",
    "lock": "`@task.pg_frozen`, lock",
    "read-only": "`@task.pg_frozen`, read-only",
    "privileges": "`@task.pg_frozen`, privileges",
}


HEAD = f"""# What became of the database, on real Airflow processes

Seen on Airflow {version("apache-airflow")} and PostgreSQL {os.environ.get("PG") or 18}: scheduler, API server, DAG
processor, triggerer and LocalExecutor on {os.cpu_count()} cores, with eight scenes played at the same time. A lost task
was noticed after 20 s (Airflow's default is 300), and a lease where one was waited for was {SHORT_LEASE} s. Written
by `make e2e ARGS='--e2e-table docs/e2e-table.md'`.

"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--e2e-table", type=Path, metavar="FILE", help="write the table of the end-to-end tests to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    config.stash[TABLE] = []
    stage = config.stash[STAGE] = ExitStack()
    try:
        # A scene of minutes reads the WAL since it began; each new database has a checkpoint recycle some.
        server = stage.enter_context(Server(int(os.environ.get("PG") or 18), settings={"wal_keep_size": "2GB"}))
        create_roles(server)
        # As a site has it that takes snapshots for good: many write here, so transaction ids prove nothing.
        server.execute("CREATE EXTENSION pg_walinspect SCHEMA pg_catalog")
        server.execute("GRANT EXECUTE ON FUNCTION pg_get_wal_records_info(pg_lsn, pg_lsn) TO freezer")
        connection = {
            "conn_type": "postgres",
            "host": "127.0.0.1",
            "port": server.port,
            "login": "freezer",
            "password": password("freezer"),
        }
        unreachable = {**connection, "port": 1}
        app = server.dsn(user="app")
        airflow = config.stash[AIRFLOW] = stage.enter_context(
            airflow_running(
                {"target": connection, "unreachable": unreachable},
                {"E2E_APP": app, "E2E_SLOWNESS": str(SLOWNESS), "AIRFLOW_VAR_PG_FREEZE_GUARD": "unreachable,target"},
            )
        )
        for file in (HERE / "dags" / "freezes.py", HERE.parents[1] / "dags" / "pg_freeze_guard.py"):
            shutil.copy(file, airflow.home / "dags")
        start(airflow)
        eventually(lambda: airflow.call("GET", "/dags")["total_entries"] >= 20, "the DAGs", 60 * SLOWNESS)
        # It runs once a minute, and would take its share of a test's time.
        airflow.call("PATCH", "/dags/pg_freeze_guard", {"is_paused": True})
        # The first task of all finds an API server that has yet to load half of itself, and may be given up by it.
        airflow.call("POST", "/dags/warm_up/dagRuns", {"dag_run_id": "first", "logical_date": None})
        run = "/dags/warm_up/dagRuns/first"
        eventually(lambda: airflow.call("GET", run)["state"] == "success", "the first run", 60 * SLOWNESS, every=0.5)
    except BaseException:
        stage.close()
        raise
    os.environ["PGF_E2E"] = json.dumps(
        {"airflow": airflow.as_dict(), "superuser": server.dsn(), "app": app, "freezer": server.dsn(user="freezer")}
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "alone" in getattr(item, "fixturenames", ()))


def pytest_unconfigure(config: pytest.Config) -> None:
    if STAGE in config.stash:
        config.stash[STAGE].close()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # Called in the process that the user started, also for what its workers ran.
    if report.when == "call" and _Table.rows is not None:
        _Table.rows += [
            Row(**value) for name, value in report.user_properties if name == "row" and isinstance(value, dict)
        ]


class _Table:
    rows: list[Row] | None = None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    _Table.rows = session.config.stash.get(TABLE, None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(TABLE, [])
    if rows:
        terminalreporter.write_sep("=", "what became of the database")
        terminalreporter.write_line(table(rows))
        if config.option.e2e_table is not None:
            config.option.e2e_table.write_text(HEAD + table(rows) + "\n")
    if terminalreporter.stats.get("failed") and AIRFLOW in config.stash:
        terminalreporter.write_sep("=", "Airflow's processes")
        terminalreporter.write_line(config.stash[AIRFLOW].tail())


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table: one line for each scene, those of an event side by side."""
    lines = [
        "| what happens | wiring | database writable again after | run | the snapshot found the database |",
        "|---|---|---|---|---|",
    ]
    wirings = list(WIRINGS)
    first = ("all goes well", "the snapshot", "the")
    for row in sorted(
        rows,
        key=lambda row: (
            next((n for n, begins in enumerate(first) if row.event.startswith(begins)), len(first)),
            row.event,
            wirings.index(row.wiring),
        ),
    ):
        wiring = WIRINGS.get(row.wiring, row.wiring)
        lines.append(f"| {row.event} | {wiring} | {row.writable} | {row.run} | {row.snapshot} |")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def where() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.environ["PGF_E2E"])
    return found


@pytest.fixture(scope="session")
def airflow(where: dict[str, Any]) -> Airflow:
    return Airflow(**where["airflow"])


@pytest.fixture
def freezer(where: dict[str, Any]) -> Connect:
    """Return what the core takes for ``connect``."""
    return connector(where["freezer"])


@contextmanager
def _locked(airflow: Airflow, how: int) -> Iterator[None]:
    with (airflow.home / "lock").open("a") as file:
        fcntl.flock(file, how)
        yield


@pytest.fixture
def together(airflow: Airflow, request: pytest.FixtureRequest) -> Iterator[None]:
    with _locked(airflow, fcntl.LOCK_EX if "alone" in request.fixturenames else fcntl.LOCK_SH):
        yield


@pytest.fixture
def alone(airflow: Airflow, together: None) -> Airflow:
    return airflow


@pytest.fixture
def play(
    airflow: Airflow, where: dict[str, Any], together: None, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Scene]]:
    scenes: list[Scene] = []

    def begin(dag_id: str, event: str, **conf: Any) -> Scene:
        scenes.append(Scene(airflow, where["superuser"], where["app"], dag_id, event, **conf))
        return scenes[-1]

    yield begin
    for scene in scenes:
        if request.node.stash.get(FAILED, False):
            print(scene.report())
        scene.close()


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    return lambda scene, **words: record_property("row", asdict(replace(scene.row(), **words)))


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]  # pluggy's Result
    if report.when == "call":
        item.stash[FAILED] = report.failed
