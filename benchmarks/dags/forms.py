"""The same freeze in four forms, around a stand-in for the snapshot."""

from __future__ import annotations

import time
from datetime import timedelta

from airflow.sdk import DAG, get_current_context, task

from airflow_pg_freeze.hooks import PgFreezeHook
from airflow_pg_freeze.task_group import pg_frozen

#: Seconds that the snapshot takes.
SNAPSHOT = 0.5
CONNECTION = "application"
LEASE = timedelta(minutes=2)

with (
    DAG("four_tasks", schedule=None),
    pg_frozen(postgres_conn_id=CONNECTION, lease=LEASE, admit="readers"),
):

    @task
    def snapshot() -> None:
        """Take as long as a snapshot."""
        time.sleep(SNAPSHOT)

    snapshot()

for strategy in ("read-only", "lock"):
    with DAG(f"one_task_{strategy}", schedule=None):
        # Counters of rows come late from a busy application, and would spoil the attestation; no pg_walinspect here.
        @task.pg_frozen(postgres_conn_id=CONNECTION, lease=LEASE, strategy=strategy, admit="readers", require=None)
        def frozen_snapshot() -> None:
            """Take as long as a snapshot."""
            time.sleep(SNAPSHOT)

        frozen_snapshot()

with DAG("hook", schedule=None):

    @task
    def own_function() -> None:
        """Freeze as a function of one's own does."""
        with PgFreezeHook(CONNECTION).frozen(holder=get_current_context()["run_id"], lease=LEASE):
            time.sleep(SNAPSHOT)

    own_function()
