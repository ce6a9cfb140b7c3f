"""Airflow as it runs in production: scheduler, API server, DAG processor and triggerer, each a process of its own.

Its metadata are in PostgreSQL, since sqlite would not survive what is done to these processes. They and all their
descendants are found by the environment that they inherit, so that nothing is left running, orphans included.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, LiteralString, TypeVar

import psycopg
from psycopg.rows import dict_row

from devtools.environment import without
from devtools.pgserver import Server

COMPONENTS: Final = ("api-server", "scheduler", "dag-processor", "triggerer")
# Tasks are forked by the scheduler's executor: what that has imported they need not import each for itself, which
# halves the time that the whole suite takes.
MAIN: Final = "import airflow_pg_freeze.task_group; from airflow.__main__ import main; main()"
#: Multiplies every time limit, for a machine that has other things to do.
SLOWNESS: Final = int(os.environ.get("E2E_SLOWNESS") or 1)
#: The scheduler takes a task for lost when its supervisor was silent for so many seconds; by default 300.
SILENCE: Final = 20 * SLOWNESS
SETTINGS: Final = {
    "CORE__EXECUTOR": "LocalExecutor",
    "CORE__LOAD_EXAMPLES": "False",
    "CORE__DAGBAG_IMPORT_TIMEOUT": str(60 * SLOWNESS),
    "CORE__PARALLELISM": "10",
    "CORE__MAX_ACTIVE_RUNS_PER_DAG": "200",
    "CORE__MAX_ACTIVE_TASKS_PER_DAG": "200",
    "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
    "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
    "CORE__FERNET_KEY": "",
    "API__WORKERS": "1",
    "API__HOST": "127.0.0.1",
    "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "600",
    "DAG_PROCESSOR__PARSING_PROCESSES": "1",
    "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.05",
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": str(SILENCE),
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "1",
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "2",
    "SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "5",
    "SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": str(15 * SLOWNESS),
    "WORKERS__MIN_HEARTBEAT_INTERVAL": "2",
    "WORKERS__EXECUTION_API_TIMEOUT": "60",
    "TRIGGERER__JOB_HEARTBEAT_SEC": "2",
    "TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": str(10 * SLOWNESS),
}

# Airflow must not outlive the tests, however those end: the watcher's input is closed when they do.
WATCHER: Final = r"""
cat >/dev/null
for _ in 1 2 3 4 5; do
    for file in $(grep -lzs "^AIRFLOW_HOME=$1\$" /proc/[0-9]*/environ); do
        pid=${file#/proc/}
        kill -KILL "${pid%/environ}" 2>/dev/null
    done
    sleep 0.1
done
rm -rf "$1"
"""

T = TypeVar("T")


class AirflowFailed(Exception):
    """A process of Airflow did not do what it should."""


@dataclass(frozen=True)
class Airflow:
    """An Airflow that runs, or is to run: its processes, and the REST calls that a person's clicks make.

    :param root: its home, where logs and process ids are too.
    :param url: of its REST API.
    :param environment: of its processes.
    :param metadata: connection string of its metadata database, for looking on: the REST API would be kept busy by it.
    """

    root: str
    url: str
    environment: dict[str, str]
    metadata: str

    @property
    def home(self) -> Path:
        """Its home directory."""
        return Path(self.root)

    def as_dict(self) -> dict[str, Any]:
        """Return what another process needs to talk to it."""
        return asdict(self)

    def start(self, component: str) -> None:
        """Start one of ``COMPONENTS``."""
        with (self.home / f"{component}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", MAIN, component],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        (self.home / f"{component}.pid").write_text(str(process.pid))

    def kill(self, component: str) -> None:
        """End one of ``COMPONENTS`` with SIGKILL, and its children, but not theirs: the tasks' own processes go on.

        The executor's workers inherit the scheduler's connections to the metadata database. If they stayed, its
        transaction would stay open, with all it has locked.
        """
        pid = int((self.home / f"{component}.pid").read_text())
        children = [
            int(word) for file in Path(f"/proc/{pid}/task").glob("*/children") for word in file.read_text().split()
        ]
        for one in (pid, *children):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)

    def kill_all(self) -> None:
        """End every process that belongs to this Airflow with SIGKILL."""
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def processes(self) -> list[int]:
        """Return the live processes that have this home in their environment."""
        mark = f"AIRFLOW_HOME={self.root}\0".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            # A process that ends meanwhile; a zombie has no environment.
            with suppress(OSError):
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def until_healthy(self) -> None:
        """Wait until all components say that they are well."""

        def healthy() -> bool:
            try:
                health = self.call("GET", "/monitor/health")
            except OSError:
                return False
            return all(health[name]["status"] == "healthy" for name in ("scheduler", "dag_processor", "triggerer"))

        eventually(healthy, "Airflow to be healthy", 120 * SLOWNESS, every=0.5)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Make one REST call and return its answer.

        :raises AirflowFailed: for an error of the server's, with what it said.
        """
        request = urllib.request.Request(
            f"{self.url}/api/v2{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Accept": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60 * SLOWNESS) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise AirflowFailed(f"{method} {path}: {error.code} {error.read().decode()[:2000]}") from error
        return json.loads(text) if text else None

    def look(self, query: LiteralString, *parameters: Any) -> list[dict[str, Any]]:
        """Return rows of the metadata database."""
        with psycopg.connect(self.metadata, autocommit=True, row_factory=dict_row) as conn:
            return conn.execute(query, parameters).fetchall()

    def tail(self, lines: int = 40) -> str:
        """Return the ends of the components' logs."""
        parts = []
        for name in COMPONENTS:
            log = (self.home / f"{name}.log").read_text(errors="replace").splitlines()
            told = [line for line in log if "request finished" not in line]
            parts.append(f"--- {name}\n" + "\n".join(told[-lines:]))
        return "\n".join(parts)


@contextmanager
def airflow_running(connections: Mapping[str, Mapping[str, Any]], variables: Mapping[str, str]) -> Iterator[Airflow]:
    """Have an Airflow, with its home, its metadata and all its processes. Its DAGs belong into ``home/dags``.

    :param connections: Airflow connections, by id.
    :param variables: more environment for all its processes.
    """
    root = tempfile.mkdtemp(prefix="pgf-e2e-")
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", WATCHER, "sh", root], stdin=subprocess.PIPE, start_new_session=True, cwd="/"
    )
    with Server(18) as metadata:
        Path(root, "dags").mkdir()
        metadata.create_role("airflow")
        metadata.execute("ALTER ROLE airflow PASSWORD 'airflow'")
        metadata.create_database("airflow", "airflow")
        port = free_port()
        url, database = f"http://127.0.0.1:{port}", f"airflow:airflow@127.0.0.1:{metadata.port}/airflow"
        settings = {
            **SETTINGS,
            "CORE__DAGS_FOLDER": f"{root}/dags",
            "CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
            "API__BASE_URL": url,
            "API__PORT": str(port),
            "API__SECRET_KEY": secrets.token_hex(16),
            "API_AUTH__JWT_SECRET": secrets.token_hex(32),
            "DATABASE__SQL_ALCHEMY_CONN": f"postgresql+psycopg2://{database}",
            "DATABASE__SQL_ALCHEMY_CONN_ASYNC": f"postgresql+asyncpg://{database}",
        }
        airflow = Airflow(
            root,
            url,
            {
                **without("AIRFLOW", "PG"),
                **{f"AIRFLOW__{name}": value for name, value in settings.items()},
                **{f"AIRFLOW_CONN_{name.upper()}": json.dumps(value) for name, value in connections.items()},
                **variables,
                "AIRFLOW_HOME": root,
                # A process that changes its title would overwrite its environment, by which processes() knows it.
                "SPT_NOENV": "1",
                "PYTHONUNBUFFERED": "1",
            },
            metadata.dsn("airflow"),
        )
        try:
            yield airflow
        finally:
            airflow.kill_all()
            assert watcher.stdin is not None
            watcher.stdin.close()
            watcher.wait()


def start(airflow: Airflow) -> None:
    """Create the metadata and start all components; return once they are healthy."""
    done = subprocess.run(
        [sys.executable, "-m", "airflow", "db", "migrate"],
        check=False,
        env=airflow.environment,
        capture_output=True,
        text=True,
        timeout=120 * SLOWNESS,
    )
    if done.returncode:
        raise AirflowFailed(f"airflow db migrate: {done.stdout[-4000:]}{done.stderr[-4000:]}")
    for name in COMPONENTS:
        airflow.start(name)
    try:
        airflow.until_healthy()
    except TimeoutError as error:
        raise AirflowFailed(f"{error}\n{airflow.tail()}") from error


def eventually(probe: Callable[[], T], what: str, seconds: float = 60, every: float = 0.1) -> T:
    """Return what *probe* returns, as soon as that is true.

    :raises TimeoutError: naming *what* was waited for.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(every)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
