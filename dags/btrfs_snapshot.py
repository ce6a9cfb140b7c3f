"""Read-only btrfs snapshots of a PostgreSQL cluster and of the files that its rows refer to.

Runs as it is, on a worker that sees the subvolumes and is root (or with sudo=True). It needs one Airflow connection, of
the role that freezes, whose database field names the database. For ZFS and LVM write `zfs:tank/data` or `lvm:vg0/data`.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from airflow_pg_freeze.operators.volume import VolumeSnapshotOperator
from airflow_pg_freeze.task_group import pg_frozen

with DAG(
    "btrfs_snapshot",
    description="Snapshot btrfs subvolumes while no row can change",
    schedule=None,
    max_active_runs=1,
    params={
        "freeze_conn_id": Param("postgres_default", type="string", description="connection of the role that freezes"),
        "data": Param("/srv/postgresql", type="string", description="the subvolume with the cluster"),
        "files": Param("/srv/files", type="string", description="the subvolume with the files that rows refer to"),
        "directory": Param("/srv/snapshots", type="string", description="where the snapshots go, on the same btrfs"),
    },
):
    with pg_frozen(
        postgres_conn_id="{{ params.freeze_conn_id }}",
        lease=timedelta(minutes=2),
        # One task less, and one hop of outage less.
        checkpoint="in-pause",
    ) as frozen:
        VolumeSnapshotOperator(
            task_id="snapshot",
            volumes=["btrfs:{{ params.data }}", "btrfs:{{ params.files }}"],
            directory="{{ params.directory }}",
            delete_partial=True,
            postgres_conn_id="{{ params.freeze_conn_id }}",
            holder=frozen.holder,
            retries=2,
            retry_delay=timedelta(seconds=5),
        )
