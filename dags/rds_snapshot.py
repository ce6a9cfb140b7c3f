"""A snapshot of an RDS instance while no row can change.

Amazon does not document when within its making the data of an RDS snapshot is fixed, so the database stands still until
the snapshot is available: minutes. Readers are never refused meanwhile. Where that is too long, RDS's own snapshots are
consistent by crash recovery; freezing is for what must match something outside the database, such as files.

Runs as it is. It needs two Airflow connections: one of the role that freezes, whose database field names the database,
and one to AWS that may rds:CreateDBSnapshot, rds:AddTagsToResource, rds:DescribeDBSnapshots and rds:DeleteDBSnapshot.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from airflow_pg_freeze.operators import PgCheckpointOperator
from airflow_pg_freeze.operators.rds import RdsSnapshotOperator
from airflow_pg_freeze.task_group import pg_frozen

with DAG(
    "rds_snapshot",
    description="Snapshot an RDS instance while no row can change",
    schedule=None,
    max_active_runs=1,
    params={
        "freeze_conn_id": Param("postgres_default", type="string", description="connection of the role that freezes"),
        "aws_conn_id": Param("aws_default", type="string", description="connection to AWS"),
        "db_identifier": Param(type="string", description="the RDS instance"),
    },
):
    with pg_frozen(
        postgres_conn_id="{{ params.freeze_conn_id }}",
        admit="readers",
        lease=timedelta(minutes=30),
        checkpoint="none",
    ) as frozen:
        # Before PostgreSQL 15, and without pg_checkpoint, one may not CHECKPOINT on RDS: the copy then only takes
        # longer to recover.
        checkpoint = PgCheckpointOperator(
            task_id="checkpoint",
            required=False,
            postgres_conn_id="{{ params.freeze_conn_id }}",
            holder=frozen.holder,
        )
        snapshot = RdsSnapshotOperator(
            task_id="snapshot",
            db_identifier="{{ params.db_identifier }}",
            aws_conn_id="{{ params.aws_conn_id }}",
            delete_partial=True,
            retries=2,
            retry_delay=timedelta(seconds=5),
            postgres_conn_id="{{ params.freeze_conn_id }}",
            holder=frozen.holder,
        )
        checkpoint >> snapshot
