"""The DAGs that the end-to-end tests play with.

The run's configuration names the database, and a directory, the stage, where test and snapshot meet: the snapshot
leaves word there when it begins, and waits for what it shall do.
"""

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
from airflow.providers.common.compat.sdk import DAG, get_current_context, task
from airflow.providers.standard.sensors.time_delta import TimeDeltaSensor

from airflow_pg_freeze.operators import PgCheckpointOperator, PgPauseOperator, PgResumeOperator
from airflow_pg_freeze.operators.frozen_ebs import PgFrozenEbsSnapshotOperator
from airflow_pg_freeze.sensors import PgLingeringBackendsSensor
from airflow_pg_freeze.task_group import pg_frozen

CONF = "{{ dag_run.conf['%s'] }}"
SLOWNESS = int(os.environ["E2E_SLOWNESS"])
TARGET: dict[str, Any] = {"postgres_conn_id": "target", "database": CONF % "database"}
PAUSE: dict[str, Any] = {name: CONF % name for name in ("lease", "drain_timeout", "on_drain_timeout")}
RESUME: dict[str, Any] = {"reader_grace": CONF % "reader_grace"}


def take_snapshot():
    """Note whether the database can be written to, then do as told: "ok" or "fail"."""
    conf = get_current_context()["dag_run"].conf
    stage = Path(conf["stage"])
    options = "-c lock_timeout=300ms"
    with psycopg.connect(os.environ["E2E_APP"], dbname=conf["database"], autocommit=True, options=options) as conn:
        try:
            conn.execute("INSERT INTO written DEFAULT VALUES")
            found = "writable"
        except (
            psycopg.errors.ReadOnlySqlTransaction,
            psycopg.errors.LockNotAvailable,
            psycopg.errors.InsufficientPrivilege,
        ):
            found = "frozen"
    with (stage / "began").open("a") as out:
        out.write(f"{found}\n")
    orders = stage / "orders"
    give_up = time.monotonic() + 300 * SLOWNESS
    while not orders.exists() and time.monotonic() < give_up:
        time.sleep(0.1)
    if orders.read_text() != "ok":
        raise RuntimeError("told to fail")


snapshot = task(task_id="snapshot")(take_snapshot)


def plain(dag_id: str, **settings) -> None:
    """Three operators in a row, resume with all_done: what one would write without pg_frozen."""
    with DAG(dag_id, schedule=None, **settings):
        pause = PgPauseOperator(task_id="pause", **TARGET, **PAUSE)
        checkpoint = PgCheckpointOperator(task_id="checkpoint", **TARGET)
        resume = PgResumeOperator(task_id="resume", **TARGET, **RESUME)
        pause >> checkpoint >> snapshot() >> resume


def frozen(dag_id: str, **settings) -> None:
    """The same with pg_frozen."""
    with DAG(dag_id, schedule=None, **settings), pg_frozen(**TARGET, **PAUSE, resume_args=RESUME):
        snapshot()


def one_task(strategy: str) -> None:
    """One task that freezes for the time of its function; and the same with a retry."""
    for dag_id, retries in ((strategy, 0), (f"{strategy}_retried", 1)):
        with DAG(dag_id, schedule=None, default_args={"retries": retries, "retry_delay": timedelta(seconds=3)}):
            task.pg_frozen(task_id="snapshot", strategy=strategy, **TARGET, **PAUSE)(take_snapshot)()


def ebs(strategy: str) -> None:
    """One task that freezes for the time in which AWS takes snapshots, with a retry."""
    with DAG(f"{strategy}-ebs", schedule=None, render_template_as_native_obj=True):
        PgFrozenEbsSnapshotOperator(
            task_id="snapshot",
            strategy=strategy,
            volume_ids=CONF % "volumes",
            aws_conn_id=CONF % "aws",
            retries=1,
            retry_delay=timedelta(seconds=1),
            **TARGET,
            **PAUSE,
        )


plain("plain")
frozen("frozen")
for strategy in ("lock", "read-only", "privileges"):
    one_task(strategy)
    ebs(strategy)
# Somebody pauses these while they run, which stops all runs of a DAG.
plain("plain_paused")
frozen("frozen_paused")
plain("plain_timeout", dagrun_timeout=timedelta(seconds=35 * SLOWNESS))
frozen("frozen_timeout", dagrun_timeout=timedelta(seconds=35 * SLOWNESS))

with DAG("frozen_deferred", schedule=None), pg_frozen(**TARGET, **PAUSE, resume_args=RESUME):
    # From when the run was to begin.
    TimeDeltaSensor(task_id="snapshot", delta=timedelta(seconds=20 * SLOWNESS), deferrable=True)

with DAG("frozen_mapped", schedule=None), pg_frozen(**TARGET, **PAUSE, resume_args=RESUME):

    @task(task_id="snapshot")
    def copy(number: int) -> None:
        """Snapshot one of two volumes."""
        take_snapshot()

    copy.expand(number=[1, 2])

with DAG("plain_deferred", schedule=None):
    waits = PgLingeringBackendsSensor(task_id="sensor", deferrable=True, wait_for_superusers=True, **TARGET)
    thaws = PgResumeOperator(task_id="resume", **TARGET, **RESUME)
    PgPauseOperator(task_id="pause", **TARGET, **PAUSE) >> waits >> thaws

with DAG("warm_up", schedule=None):

    @task(retries=9, retry_delay=timedelta(seconds=1))
    def nothing():
        """Make every process load what it loads late."""

    nothing()
