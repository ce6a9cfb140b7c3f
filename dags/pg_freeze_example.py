"""Freeze a database, be sure that it stands still, write it out, take a snapshot of its volume, thaw it.

What it needs:

* the connection ``postgres_default``, with the database to freeze in its Database field;
* the Airflow variable ``pg_snapshot_command``: the command that snapshots the volume, such as
  ``zfs snapshot tank/pgdata@$(date +%s)``. It is a variable and not a parameter of the run, so that it takes more than
  the right to start this DAG to run commands on a worker.

Each task is spelled out here. ``airflow_pg_freeze.task_group.pg_frozen`` composes the same, and also stands up to
people who mark tasks, clear some of them or retry them: prefer it for your own DAGs.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG

from airflow_pg_freeze.operators import PgCheckpointOperator, PgPauseOperator, PgResumeOperator
from airflow_pg_freeze.sensors import PgLingeringBackendsSensor

with DAG(
    "pg_freeze_example",
    schedule=None,
    max_active_runs=1,
    default_args={"postgres_conn_id": "postgres_default"},
    doc_md=__doc__,
    tags=["pg_freeze"],
):
    pause = PgPauseOperator(task_id="pause", lease=timedelta(minutes=15), drain_timeout=timedelta(seconds=20))
    lingering = PgLingeringBackendsSensor(task_id="lingering_backends", timeout=60)
    checkpoint = PgCheckpointOperator(task_id="checkpoint")
    snapshot = BashOperator(task_id="snapshot", bash_command="{{ var.value.pg_snapshot_command }}")
    resume = PgResumeOperator(task_id="resume", trigger_rule="all_done")
    # A run is as green as its last tasks. Without this one a failed snapshot would be hidden by the resume after it.
    snapshot_taken = EmptyOperator(task_id="snapshot_taken")

    pause >> lingering >> checkpoint >> snapshot >> [resume, snapshot_taken]
