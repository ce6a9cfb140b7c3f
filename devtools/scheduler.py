"""A real Airflow of one's own: API server, scheduler and DAG processor with LocalExecutor, on loopback.

Its metadata are in a PostgreSQL of its own, as in production: with SQLite, which needs less, its API came to a
standstill for minutes on a busy machine.
"""

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, LiteralString, Self
from urllib.parse import quote

import psycopg
from psycopg.rows import dict_row

from devtools.environment import without
from devtools.pgserver import Server, free_port, password

COMPONENTS: Final = (
    ("api-server", "--host", "127.0.0.1", "--workers", "1"),
    ("scheduler", "--skip-serve-logs"),
    ("dag-processor",),
)
# Tasks are forked by the scheduler: what that has imported, they need not import each for itself, frozen.
MAIN: Final = "import airflow_pg_freeze.task_group; from airflow.__main__ import main; main()"
OWNER: Final = "airflow"
READY_WITHIN: Final = 480.0
STOP_WITHIN: Final = 5.0
# Reads its standard input to the end, which comes when its parent is gone, however it went. Tasks and their commands
# are in sessions and process groups of their own, but all have our AIRFLOW_HOME.
WATCHER: Final = """
cat >/dev/null
for signal in TERM KILL; do
    for found in $(grep -lsxzF "AIRFLOW_HOME=$1" /proc/[0-9]*/environ); do
        pid=${found#/proc/}
        kill -$signal "${pid%/environ}" 2>/dev/null
    done
    [ $signal = KILL ] || sleep 1
done
rm -rf "$2"
"""


_KNOWN: Final[LiteralString] = """
    SELECT FROM dag JOIN serialized_dag USING (dag_id)
     WHERE dag_id = %s AND EXISTS (SELECT FROM job WHERE job_type = 'SchedulerJob' AND state = 'running')"""
_STATE: Final[LiteralString] = "SELECT state FROM dag_run WHERE dag_id = %s AND run_id = %s"
_TASKS: Final[LiteralString] = """
    SELECT task_id, state, start_date, end_date FROM task_instance
     WHERE dag_id = %s AND run_id = %s ORDER BY start_date NULLS LAST"""


@dataclass(frozen=True, slots=True)
class Task:
    """A task of a run, as Airflow has it."""

    task_id: str
    state: str | None
    start_date: datetime | None
    end_date: datetime | None


class AirflowFailed(Exception):
    """Airflow did not start, or not answer as expected; the message ends with its logs."""


class Airflow:
    """Airflow with the DAG files of one directory, gone at the end of the ``with`` block.

    :param metadata: a server for Airflow's own database.
    :param workspace: a directory that goes with it, even if this process is killed.
    :param dags: the directory with DAG files.
    :param connections: connection strings (URIs) by connection id.
    :param variables: Airflow variables.
    :param path: directories to search for programs before the usual ones.
    """

    def __init__(
        self,
        metadata: Server,
        *,
        workspace: Path,
        dags: Path,
        connections: Mapping[str, str],
        variables: Mapping[str, str],
        path: Path,
    ) -> None:
        metadata.create_role(OWNER)
        metadata.create_database(OWNER, OWNER)
        self._metadata = metadata
        self._workspace = workspace
        self.home = workspace / "airflow"
        self.port = free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watcher: subprocess.Popen[bytes] | None = None
        self._environment = {
            **{f"AIRFLOW_CONN_{name.upper()}": uri for name, uri in connections.items()},
            **{f"AIRFLOW_VAR_{name.upper()}": value for name, value in variables.items()},
        }
        self._environment |= self._settings(dags, path)

    def _settings(self, dags: Path, path: Path) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.port}"
        metadata = f"{OWNER}:{quote(password(OWNER), safe='')}@127.0.0.1:{self._metadata.port}/{OWNER}"
        # Nothing of the Airflow or the PostgreSQL that this user may have set up.
        ours = without("AIRFLOW", "PG")
        return {
            **ours,
            "PATH": f"{path}:{os.environ['PATH']}",
            "AIRFLOW_HOME": str(self.home),
            # A process that changes its title would overwrite its environment, by which the watcher knows it.
            "SPT_NOENV": "1",
            "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__PARALLELISM": "4",
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__CORE__HOSTNAME_CALLABLE": "socket.gethostname",
            "AIRFLOW__API__BASE_URL": url,
            "AIRFLOW__API__PORT": str(self.port),
            "AIRFLOW__API__SECRET_KEY": secrets.token_hex(),
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"postgresql+psycopg2://{metadata}",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC": f"postgresql+asyncpg://{metadata}",
            # On a machine that is busy with the application as well, the API server may take its time.
            "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "WARNING",
            # Each hop between pause and resume is outage: the default of 1 s is for schedulers with thousands of DAGs.
            "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.05",
        }

    def __enter__(self) -> Self:
        self.home.mkdir()
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", WATCHER, "sh", str(self.home), str(self._workspace)],
            stdin=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + STOP_WITHIN
        while any(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        # What is left, such as a task that outlives its scheduler, is the watcher's.
        assert self._watcher is not None
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        for process in self._processes:
            process.wait()
        self._watcher.wait()

    def start(self, dag: str, meanwhile: Callable[[str], None]) -> None:
        """Start everything, and return once the scheduler knows *dag*.

        :param meanwhile: called again and again while it takes its time, with what is waited for.
        """
        migration = self._launch("db", "migrate")
        deadline = time.monotonic() + READY_WITHIN
        while migration.poll() is None:
            self._check(deadline)
            meanwhile("its database")
            time.sleep(0.1)
        if migration.returncode:
            raise AirflowFailed(f"airflow db migrate failed\n{self.logs()}")
        for component, *arguments in COMPONENTS:
            extra = ["--port", str(self.port)] if component == "api-server" else []
            self._launch(component, *arguments, *extra)
        while not self._knows(dag):
            self._check(deadline)
            meanwhile("API server, scheduler and DAG processor")
            time.sleep(0.2)

    def trigger(self, dag: str) -> str:
        """Start a run of *dag*, and return its id."""
        run = self._request(f"/api/v2/dags/{dag}/dagRuns", {"logical_date": None})
        return str(run["dag_run_id"])

    def state(self, dag: str, run: str) -> str:
        """Return the state of a run."""
        return str(self._look(_STATE, dag, run)[0]["state"])

    def tasks(self, dag: str, run: str) -> dict[str, Task]:
        """Return the tasks of a run by id, those that began first, first."""
        return {row["task_id"]: Task(**row) for row in self._look(_TASKS, dag, run)}

    def _look(self, query: LiteralString, *values: str) -> list[Any]:
        """Return rows of the metadata: the REST API would be kept busy by whoever asks it all the time."""
        with psycopg.connect(self._metadata.dsn(OWNER), autocommit=True, row_factory=dict_row) as conn:
            return conn.execute(query, values).fetchall()

    def logs(self, lines: int = 30) -> str:
        """Return the ends of all logs: of the components, and of tasks."""
        found = sorted((self.home / "logs").rglob("*.log")) if self.home.exists() else []
        return "\n".join(
            f"--- {log.relative_to(self.home)}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
            for log in found
        )

    def _launch(self, *command: str) -> subprocess.Popen[bytes]:
        logs = self.home / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{command[0]}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", MAIN, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=self.home,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _knows(self, dag: str) -> bool:
        if not self._look(_KNOWN, dag):
            return False
        try:
            # The second is for tasks; it is set up when it is first asked, which takes a while.
            self._request("/api/v2/monitor/health")
            self._request("/execution/health")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True

    def _check(self, deadline: float) -> None:
        gone = [process for process in self._processes[1:] if process.poll() is not None]
        if gone or time.monotonic() > deadline:
            raise AirflowFailed(f"Airflow did not start within {READY_WITHIN:g} s\n{self.logs()}")

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        # A proxy that this user's environment may name is not for loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)
