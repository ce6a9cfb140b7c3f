"""Snapshots of the EBS volumes under a PostgreSQL server, and of those with the files that its rows refer to.

The database stands still from the pause until AWS has accepted the snapshots, which takes seconds. They are copied
afterwards, for minutes to hours, while the application works.

Runs as it is. It needs two Airflow connections: one of the role that freezes, whose database field names the database,
and one to AWS that may ec2:CreateSnapshots, ec2:CreateSnapshot, ec2:CreateTags, ec2:DescribeSnapshots,
ec2:DescribeInstances and ec2:DeleteSnapshot.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from airflow_pg_freeze.operators.attest import PgAttestOperator
from airflow_pg_freeze.operators.ebs import EbsCertifySnapshotsOperator, EbsCreateSnapshotsOperator
from airflow_pg_freeze.sensors.ebs import EbsSnapshotCompletedSensor
from airflow_pg_freeze.task_group import pg_frozen

with DAG(
    "ebs_snapshot",
    description="Snapshot the EBS volumes of an instance while no row can change",
    schedule=None,
    max_active_runs=1,
    params={
        "freeze_conn_id": Param("postgres_default", type="string", description="connection of the role that freezes"),
        "aws_conn_id": Param("aws_default", type="string", description="connection to AWS"),
        "instance_id": Param(type="string", description="the instance whose data volumes are snapshotted"),
    },
):
    with pg_frozen(
        postgres_conn_id="{{ params.freeze_conn_id }}",
        lease=timedelta(minutes=5),
        # One task less, and one hop of outage less.
        checkpoint="in-pause",
    ) as frozen:
        before = PgAttestOperator(
            task_id="attest_before",
            moment="before",
            postgres_conn_id="{{ params.freeze_conn_id }}",
            holder=frozen.holder,
        )
        snapshots = EbsCreateSnapshotsOperator(
            task_id="snapshots",
            instance_id="{{ params.instance_id }}",
            exclude_boot_volume=True,
            delete_partial=True,
            max_wait=timedelta(minutes=1),
            postgres_conn_id="{{ params.freeze_conn_id }}",
            aws_conn_id="{{ params.aws_conn_id }}",
            holder=frozen.holder,
            retries=2,
            retry_delay=timedelta(seconds=5),
        )
        # What was found stands on the snapshots, for whoever restores one: no level fails the run here.
        after = PgAttestOperator(
            task_id="attest_after",
            moment="after",
            require=None,
            postgres_conn_id="{{ params.freeze_conn_id }}",
            holder=frozen.holder,
        )
        before >> snapshots >> after
    snapshot_ids = "{{ ti.xcom_pull(task_ids='frozen.snapshots')['snapshot_ids'] }}"
    certify = EbsCertifySnapshotsOperator(
        task_id="certify",
        snapshot_ids=snapshot_ids,
        attestation=after.output,
        token=frozen.token,
        aws_conn_id="{{ params.aws_conn_id }}",
        retries=2,
    )
    completed = EbsSnapshotCompletedSensor(
        task_id="completed",
        snapshot_ids=snapshot_ids,
        aws_conn_id="{{ params.aws_conn_id }}",
        delete_failed=True,
        deferrable=True,
    )
    frozen >> certify >> completed
