"""Snapshots an RDS instance or cluster under a frozen database, and waits until it is available."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, Literal

from airflow.providers.amazon.aws.operators.rds import RdsCreateDbSnapshotOperator
from airflow.providers.common.compat.sdk import Context
from botocore.exceptions import BotoCoreError, ClientError

from airflow_pg_freeze.constants import Checked, check_constants, check_given
from airflow_pg_freeze.hooks.pg_freeze import RUN, PgFreezeHook
from airflow_pg_freeze.operators._snapshot import (
    Terminated,
    hopeless_fails_at_once,
    origin,
    task_key,
)
from airflow_pg_freeze.snapshots import SnapshotFailed, SnapshotRefused
from airflow_pg_freeze.snapshots import tags as tagging
from airflow_pg_freeze.snapshots.aws import code_of, patiently, reworded
from airflow_pg_freeze.snapshots.ebs import UNATTESTED
from airflow_pg_freeze.snapshots.standing import standing_until, still_standing
from pg_freeze import Freeze, LeaseLost
from pg_freeze.durations import Duration, duration

MAX_WAIT: Final = timedelta(minutes=30)
_TAKEN: Final = frozenset({"DBSnapshotAlreadyExists", "DBClusterSnapshotAlreadyExistsFault"})
_GONE: Final = frozenset({"DBSnapshotNotFound", "DBSnapshotNotFoundFault", "DBClusterSnapshotNotFoundFault"})
_COMING: Final = frozenset({"creating", "copying"})


class RdsSnapshotOperator(Checked, RdsCreateDbSnapshotOperator):
    """Snapshot an RDS instance or cluster of a frozen database, and return once it is available.

    Amazon does not document when within its making the data of an RDS snapshot is fixed, so that the database must
    stand still until it is ``available``: minutes, more for the first snapshot of a large instance. Give the freeze a
    lease that is long enough, and let readers in: ``admit="readers"``.

    The snapshot's identifier holds the freeze's token, so that no two tries make two: a retry adopts what an earlier
    try has begun. Fails if the freeze does not stand, before, meanwhile or after.

    The XCom is a dictionary with ``db_snapshot_identifier``, ``arn``, ``adopted`` and ``token``.

    :param db_identifier: the instance or cluster. (templated)
    :param db_type: ``instance`` or ``cluster``.
    :param db_snapshot_identifier: begins the snapshot's identifier; by default ``pg-freeze-`` and the *db_identifier*.
        (templated)
    :param tags: more tags, as a dictionary. (templated)
    :param delete_partial: delete the snapshot if it failed, or the freeze did not stand.
    :param max_wait: how long, a timedelta, seconds or text such as ``30m``, to wait until it is available; never longer
        than the freeze's lease allows.
    :param poke_interval: how long, likewise, between two looks; the database stands still meanwhile.
    :param postgres_conn_id: the Airflow connection to the server. (templated)
    :param database: the frozen database or databases; by default the connection's schema. (templated)
    :param maintenance_database: the database that the freeze is controlled from. (templated)
    :param holder: who owns the freeze; by default the DAG run. Within ``pg_frozen() as frozen`` it is
        ``frozen.holder``. (templated)
    :param aws_conn_id: the Airflow connection to AWS. (templated)
    :param region_name: the region, if not the connection's. (templated)
    """

    template_fields: tuple[str, ...] = (
        *RdsCreateDbSnapshotOperator.template_fields,
        "postgres_conn_id",
        "database",
        "maintenance_database",
        "holder",
    )

    def __init__(
        self,
        *,
        db_identifier: str,
        db_type: Literal["instance", "cluster"] = "instance",
        db_snapshot_identifier: str | None = None,
        tags: Mapping[str, str] | None = None,
        delete_partial: bool = False,
        max_wait: Duration = MAX_WAIT,
        poke_interval: Duration = 10,
        postgres_conn_id: str = "postgres_default",
        database: str | Sequence[str] | None = None,
        maintenance_database: str = "postgres",
        holder: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_given({"db_type": db_type, "tags": tags}, ["tags"])  # Airflow's own errors would not name them
        super().__init__(
            db_type=db_type,
            db_identifier=db_identifier,
            db_snapshot_identifier=db_snapshot_identifier or f"pg-freeze-{db_identifier}",
            tags=dict(tags or {}),
            wait_for_completion=False,
            **kwargs,
        )
        self.delete_partial = delete_partial
        self.max_wait = max_wait
        self.poke_interval = poke_interval
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.maintenance_database = maintenance_database
        self.holder = RUN if holder is None else holder
        self._working = False
        check_constants(self)

    def execute(self, context: Context) -> dict[str, Any]:  # type: ignore[override]  # theirs is AWS's answer as text
        """Snapshot, wait, and return which snapshot it is.

        :raises AirflowFailException: if the freeze does not stand, or AWS refuses.
        :raises SnapshotFailed: if AWS could not do it in time, or the snapshot failed.
        """
        with hopeless_fails_at_once():
            hook = PgFreezeHook(self.postgres_conn_id, maintenance_database=self.maintenance_database)
            freeze, deadline = standing_until(
                hook,
                databases=hook.databases(self.database),
                holder=self.holder,
                max_wait=duration("max_wait", self.max_wait),
            )
            own = self.tags
            if not isinstance(own, Mapping):
                raise SnapshotRefused(f"tags is {own!r}: give a dictionary")
            self.db_snapshot_identifier = f"{self.db_snapshot_identifier}-{freeze.token}"
            self.tags = tagging.freeze_tags(
                freeze, task=task_key(context), level=UNATTESTED, origin=origin(context), own=own
            )
            self._working = True
            try:
                adopted = self._create(context, deadline)
                arn = self._wait(hook, freeze, deadline)
            except (SnapshotFailed, LeaseLost) as error:
                raise type(error)(f"{error}. {self._clean_up()}") from error
            except BaseException:
                self._clean_up()
                raise
            finally:
                self._working = False
        self.log.info("Available: %s", self.db_snapshot_identifier)
        return {
            "db_snapshot_identifier": self.db_snapshot_identifier,
            "arn": arn,
            "adopted": adopted,
            "token": str(freeze.token),
        }

    def on_kill(self) -> None:
        """End with an exception; Airflow would let execute() go on.

        :raises Terminated: while the snapshot is being made; once, for a second signal must not interrupt the clean-up.
        """
        if self._working:
            self._working = False
            raise Terminated("the snapshot was told to end (SIGTERM)")

    def _create(self, context: Context, deadline: float) -> bool:
        """Begin the snapshot, and return whether an earlier try had."""

        def create() -> bool:
            try:
                super(RdsSnapshotOperator, self).execute(context)
            except ClientError as error:
                if code_of(error) in _TAKEN:
                    return True
                raise
            return False

        adopted = patiently(create, doing=f"snapshot {self.db_identifier}", deadline=deadline)
        if adopted:
            self.log.info("Adopted from an earlier try: %s", self.db_snapshot_identifier)
        return adopted

    def _wait(self, hook: PgFreezeHook, freeze: Freeze, deadline: float) -> str:
        """Wait until the snapshot is available, and return its ARN; look at the freeze each time."""
        while True:
            now = patiently(self._describe, doing=f"look at {self.db_snapshot_identifier}", deadline=deadline)
            still_standing(hook, freeze)
            state = str(now.get("Status", "unknown")).lower()
            self.log.info("%s: %s, %s %%", self.db_snapshot_identifier, state, now.get("PercentProgress", 0))
            if state == "available":
                return str(now.get("DBSnapshotArn") or now.get("DBClusterSnapshotArn"))
            if state not in _COMING:
                raise SnapshotFailed(f"{self.db_snapshot_identifier} is {state!r} and will not become available")
            pause = duration("poke_interval", self.poke_interval).total_seconds()
            if time.monotonic() + pause >= deadline:
                raise SnapshotFailed(
                    f"{self.db_snapshot_identifier} is still {state!r} ({now.get('PercentProgress', 0)} %), and no "
                    "time is left: give a longer lease, and a longer max_wait"
                )
            time.sleep(pause)

    def _describe(self) -> dict[str, Any]:
        rds, name = self.hook.conn, self.db_snapshot_identifier
        if self.db_type.value == "instance":
            found = rds.describe_db_snapshots(DBSnapshotIdentifier=name)["DBSnapshots"]
        else:
            found = rds.describe_db_cluster_snapshots(DBClusterSnapshotIdentifier=name)["DBClusterSnapshots"]
        return dict(found[0])

    def _clean_up(self) -> str:
        """Delete the snapshot if told to, and say what is left."""
        rds, name = self.hook.conn, self.db_snapshot_identifier
        if not self.delete_partial:
            return f"{name} may be left; the next try adopts it"
        try:
            if self.db_type.value == "instance":
                rds.delete_db_snapshot(DBSnapshotIdentifier=name)
            else:
                rds.delete_db_cluster_snapshot(DBClusterSnapshotIdentifier=name)
        except (ClientError, BotoCoreError) as error:
            if code_of(error) in _GONE:
                return "No snapshot was made"
            self.log.warning("%s", reworded(error, f"delete {name}"))
            return f"{name} could not be deleted ({code_of(error)}): it may be left"
        return f"{name} was deleted"
