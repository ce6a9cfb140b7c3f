"""A copy of a PostgreSQL cluster and of the files that its rows refer to, both of the same moment.

Runs as it is on a worker that has pg_basebackup and sees the files. What it needs:

* the connection ``postgres_default``: the role that freezes, with the database in the Database field;
* the connection ``postgres_replication``: a role with REPLICATION on the same server;
* the Airflow variables ``snapshot_files``, the directory of the files, and ``snapshot_target``, in which each run makes
  a directory of its own.

The copy wakes up frozen: start PostgreSQL on it and ``CALL pgfreeze.thaw_all()`` in the database postgres.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

from airflow_pg_freeze.task_group import pg_frozen

ENVIRONMENT = {
    "PGHOST": "{{ conn.postgres_replication.host }}",
    "PGPORT": "{{ conn.postgres_replication.port or 5432 }}",
    "PGUSER": "{{ conn.postgres_replication.login }}",
    "PGPASSWORD": "{{ conn.postgres_replication.password }}",
    "FILES": "{{ var.value.snapshot_files }}",
    "TARGET": "{{ var.value.snapshot_target }}/{{ run_id }}",
}

with (
    DAG(
        "local_snapshot",
        schedule=None,
        max_active_runs=1,
        default_args={"env": ENVIRONMENT, "append_env": True},
        doc_md=__doc__,
        tags=["pg_freeze"],
    ),
    # Readers are never refused; only writes wait.
    pg_frozen(postgres_conn_id="postgres_default", admit="readers", lease=timedelta(minutes=10)),
):
    BashOperator(
        task_id="cluster",
        bash_command='mkdir -p "$TARGET" && pg_basebackup --checkpoint=fast --pgdata "$TARGET/cluster"',
    )
    BashOperator(
        task_id="files",
        bash_command='mkdir -p "$TARGET" && cp -a --reflink=auto "$FILES" "$TARGET/files"',
    )
