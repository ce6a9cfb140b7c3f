"""Snapshots local volumes under a frozen server, by the commands of their file system, on the worker."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from airflow.providers.common.compat.sdk import BaseOperator, Context

from airflow_pg_freeze.constants import Checked, check_constants
from airflow_pg_freeze.hooks.pg_freeze import RUN, PgFreezeHook
from airflow_pg_freeze.operators._snapshot import Terminated, hopeless_fails_at_once
from airflow_pg_freeze.snapshots import SnapshotRefused
from airflow_pg_freeze.snapshots.standing import standing_until, still_standing
from pg_freeze.durations import Duration, duration
from pg_freeze.volumes import Naming, Volume, delete_snapshots, snapshot_volumes
from pg_freeze.volumes.commands import Commands

MAX_WAIT: Final = timedelta(minutes=1)


class VolumeSnapshotOperator(Checked, BaseOperator):
    """Snapshot btrfs subvolumes, ZFS datasets and LVM volumes of a frozen server. Runs where the volumes are.

    The snapshots are read-only, and their names carry the token of the freeze: a retry adopts what is there, and makes
    what is missing. Fails if the freeze does not stand, before or after.

    Volumes are snapshotted one after the other (datasets of one ZFS pool at once): alike to one point in time for
    whatever stands still, and only for that.

    The XCom is a dictionary with ``snapshots`` (volume to snapshot), ``adopted`` (those of an earlier try) and
    ``token``.

    :param volumes: such as ``btrfs:/srv/data``, ``zfs:tank/data``, ``lvm:vg0/data``. (templated)
    :param directory: where btrfs snapshots go, on the same file system; by default beside the subvolume. (templated)
    :param prefix: begins the names; they go on with the token. (templated)
    :param lvm_size: room for what changes while a snapshot of LVM exists, such as ``5G`` or ``10%ORIGIN``; None for
        thin volumes. (templated)
    :param sudo: run the commands through ``sudo -n``, for a worker that is not root.
    :param delete_partial: delete what was made if the set does not become complete, or the freeze did not stand.
    :param max_wait: how long, a timedelta, seconds or text such as ``5m``, the commands may take altogether; the
        database stands still meanwhile.
    :param postgres_conn_id: the Airflow connection to the server. (templated)
    :param database: the frozen database or databases; by default the connection's schema. (templated)
    :param maintenance_database: the database that the freeze is controlled from. (templated)
    :param holder: who owns the freeze; by default the DAG run. Within ``pg_frozen() as frozen`` it is
        ``frozen.holder``. (templated)
    """

    template_fields: Sequence[str] = (
        "volumes",
        "directory",
        "prefix",
        "lvm_size",
        "postgres_conn_id",
        "database",
        "maintenance_database",
        "holder",
    )
    ui_color = "#eeaa88"

    def __init__(
        self,
        *,
        volumes: Sequence[str],
        directory: str | None = None,
        prefix: str = "pg-freeze",
        lvm_size: str | None = "10%ORIGIN",
        sudo: bool = False,
        delete_partial: bool = False,
        max_wait: Duration = MAX_WAIT,
        postgres_conn_id: str = "postgres_default",
        database: str | Sequence[str] | None = None,
        maintenance_database: str = "postgres",
        holder: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.volumes = volumes
        self.directory = directory
        self.prefix = prefix
        self.lvm_size = lvm_size
        self.sudo = sudo
        self.delete_partial = delete_partial
        self.max_wait = max_wait
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.maintenance_database = maintenance_database
        self.holder = RUN if holder is None else holder
        self._working = False
        check_constants(self)

    def execute(self, context: Context) -> dict[str, Any]:  # noqa: ARG002  Airflow passes it
        """Snapshot, and return which snapshots there are.

        :raises AirflowFailException: if the freeze does not stand, or a program, a right or a volume is missing.
        :raises SnapshotFailed: if a command failed otherwise, or took too long.
        """
        with hopeless_fails_at_once():
            if isinstance(self.volumes, str):
                raise SnapshotRefused(f"volumes is the text {self.volumes!r}: give a list")
            volumes = [Volume.parse(volume) for volume in self.volumes]
            hook = PgFreezeHook(self.postgres_conn_id, maintenance_database=self.maintenance_database)
            freeze, deadline = standing_until(
                hook,
                databases=hook.databases(self.database),
                holder=self.holder,
                max_wait=duration("max_wait", self.max_wait),
            )
            naming = Naming(freeze.token, self.prefix, self.directory or None, self.lvm_size)
            self._working = True
            try:
                made = snapshot_volumes(
                    volumes, naming, Commands(deadline, self.sudo), delete_partial=self.delete_partial
                )
                try:
                    still_standing(hook, freeze)
                except BaseException:
                    if self.delete_partial:
                        delete_snapshots(made, Commands(deadline, self.sudo))
                    raise
            finally:
                self._working = False
        for snapshot in made:
            self.log.info(
                "%s of %s%s", snapshot.name, snapshot.volume, ", of an earlier try" if snapshot.adopted else ""
            )
        return {
            "snapshots": {str(snapshot.volume): snapshot.name for snapshot in made},
            "adopted": [snapshot.name for snapshot in made if snapshot.adopted],
            "token": str(freeze.token),
        }

    def on_kill(self) -> None:
        """End with an exception, upon which what was made is deleted if so asked; Airflow would let execute() go on.

        :raises Terminated: while snapshots are being made; once, for a second signal must not interrupt the clean-up.
        """
        if self._working:
            self._working = False
            raise Terminated("the snapshot was told to end (SIGTERM)")
