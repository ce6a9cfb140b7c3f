"""Runs DAGs and tasks with a real Airflow, in this process or in one that can be sent signals."""

import importlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from airflow.providers.common.compat.sdk import DAG


def migrate() -> None:
    """Create the metadata database, as `airflow db migrate` does, and tell it of the one bundle of DAGs."""
    from airflow.dag_processing.bundles.manager import DagBundlesManager
    from airflow.utils.db import initdb

    initdb()
    DagBundlesManager().sync_bundles_to_db()


@dataclass(frozen=True)
class Run:
    """What became of a DAG run."""

    run_id: str
    state: str
    states: dict[str, str | None]
    tries: dict[str, int]
    xcoms: dict[str, Any]


def load_dags(path: Path) -> dict[str, DAG]:
    """Return the DAGs of a file, loaded as Airflow's DAG processor does."""
    bag = dagbag().DagBag(dag_folder=path)
    assert not bag.import_errors, bag.import_errors
    return dict(bag.dags)


def dagbag() -> Any:
    """Return the module that loads DAGs."""
    try:
        return importlib.import_module("airflow.dag_processing.dagbag")
    except ImportError:  # Airflow 3.1
        return importlib.import_module("airflow.models.dagbag")


def register(dag: DAG) -> None:
    """Make a DAG known to the metadata database, as the DAG processor does."""
    bag = dagbag().DagBag(dag_folder=os.devnull)
    bag.bag_dag(dag)
    dagbag().sync_bag_to_db(bag, "dags-folder", None)


def run_dag(dag: DAG, **conf: Any) -> Run:
    """Run a DAG that exists in this process only."""
    register(dag)
    finished = dag.test(run_conf=conf)
    instances = finished.get_task_instances()
    return Run(
        run_id=finished.run_id,
        state=str(finished.state),
        states={ti.task_id: None if ti.state is None else str(ti.state) for ti in instances},
        tries={ti.task_id: ti.try_number for ti in instances},
        xcoms={ti.task_id: ti.xcom_pull(task_ids=ti.task_id, map_indexes=ti.map_index) for ti in instances},
    )


class TaskProcess:
    """A process that runs one task at a time, on command, as Airflow's task runner does: with its signal handler."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", Path(__file__).with_name("task_process.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._dag_id = ""
        self.log = ""
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Self:
        # The first task takes seconds, in which Airflow builds its execution API: no test should have to allow for it.
        self.begin("airflow.providers.standard.operators.empty.EmptyOperator", "warm_up", {})
        self.state()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        # All the time: a process whose output nobody reads stops when the pipe is full.
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def begin(self, operator: str, dag_id: str, environment: dict[str, str], **arguments: Any) -> None:
        """Start one task of a DAG of its own."""
        self.log = ""
        assert self._process.stdin is not None
        self._dag_id = re.sub(r"\W+", "_", dag_id)
        command = {"operator": operator, "dag_id": self._dag_id, "environment": environment, "arguments": arguments}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def terminate(self) -> None:
        """Send SIGTERM, as a supervisor does for a task that is to end."""
        self._process.send_signal(signal.SIGTERM)

    def state(self) -> str:
        """Wait for the task to end; return the state in which it ended."""
        return self.wait_for(f"STATE {self._dag_id} ").split()[-1]

    def wait_for(self, word: str) -> str:
        """Read on until a line begins with *word*; return that line."""
        while True:
            try:
                line = self._lines.get(timeout=110)
            except queue.Empty:
                raise AssertionError(f"no {word} from the task's process:\n{self.log}") from None
            if line.startswith(word):
                return line
            self.log += line


def eventually(condition: Callable[[], Any], within: timedelta = timedelta(seconds=30)) -> Any:
    """Return what *condition* returns as soon as it is true."""
    give_up = time.monotonic() + within.total_seconds()
    while not (found := condition()):
        assert time.monotonic() < give_up, f"not within {within}"
        time.sleep(0.1)
    return found
