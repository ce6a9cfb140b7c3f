"""Waits until EBS snapshots are copied, which needs no freeze."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

from airflow.providers.amazon.aws.hooks.ec2 import EC2Hook
from airflow.providers.amazon.aws.sensors.base_aws import AwsBaseSensor
from airflow.providers.common.compat.sdk import AirflowFailException, Context, PokeReturnValue, conf

from airflow_pg_freeze.constants import Checked, check_constants, check_given
from airflow_pg_freeze.operators._snapshot import hopeless_fails_at_once
from airflow_pg_freeze.operators.ebs import EbsSnapshotsLink
from airflow_pg_freeze.snapshots import SnapshotFailed, SnapshotRefused
from airflow_pg_freeze.snapshots.ebs import copying, delete_snapshots
from airflow_pg_freeze.snapshots.ebs_wanted import snapshot_ids
from airflow_pg_freeze.triggers.ebs import EbsSnapshotCompletedTrigger
from pg_freeze.durations import Duration, duration


class EbsSnapshotCompletedSensor(Checked, AwsBaseSensor[EC2Hook]):
    """Wait until EBS snapshots are complete, for as long as that takes; logs the progress in percent.

    Belongs outside the freeze: the data is fixed when a snapshot is accepted, and the database need not wait.

    An outage of AWS, or throttling, is waited out. A snapshot that ends in the state ``error`` fails the task without
    retries.

    :param snapshot_ids: the snapshots: a list, or text that holds their ids. (templated)
    :param delete_failed: if one of them fails, delete them all: without the others they are of no use.
    :param poke_interval: how long, a timedelta, seconds or text such as ``1m``, between two looks: 30 s by default.
    :param timeout: after how long, likewise, to give up: a day by default. The first copy of a large volume takes
        hours.
    :param deferrable: wait in the triggerer, without a worker slot.
    :param aws_conn_id: the Airflow connection to AWS. (templated)
    :param region_name: the region, if not the connection's. (templated)
    """

    aws_hook_class = EC2Hook
    template_fields: Sequence[str] = ("snapshot_ids", "aws_conn_id", "region_name", "verify")
    operator_extra_links = (EbsSnapshotsLink(),)
    ui_color = "#e6f2ff"

    def __init__(
        self,
        *,
        snapshot_ids: Sequence[str] | str,
        delete_failed: bool = False,
        poke_interval: Duration = 30,
        timeout: Duration = 86400,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        check_given({"poke_interval": poke_interval, "timeout": timeout})  # Airflow's own errors say less
        super().__init__(
            poke_interval=duration("poke_interval", poke_interval), timeout=duration("timeout", timeout), **kwargs
        )
        self.snapshot_ids = snapshot_ids
        self.delete_failed = delete_failed
        self.deferrable = deferrable
        check_constants(self)

    @property
    def _hook_parameters(self) -> dict[str, Any]:
        return {**super()._hook_parameters, "api_type": "client_type"}

    def poke(self, context: Context) -> PokeReturnValue:
        """Look once; defer if so asked and something is still being copied.

        :raises AirflowFailException: if a snapshot has failed, is unknown, or AWS does not let us look.
        """
        with hopeless_fails_at_once():
            ids = snapshot_ids(self.snapshot_ids)
            EbsSnapshotsLink.persist(
                context=context,
                operator=self,
                region_name=self.hook.conn_region_name,
                aws_partition=self.hook.conn_partition,
                snapshot_ids=",".join(f":{one}" for one in ids),
            )
            try:
                now = copying(self.hook.conn, ids)
            except SnapshotRefused:
                raise
            except SnapshotFailed as error:
                self.log.warning("%s", error)
                now = None
        if now is not None:
            self.log.info("%s", now)
            if now.failed:
                self._fail("; ".join(map(str, now.failed)))
            if now.done:
                return PokeReturnValue(is_done=True, xcom_value={"snapshot_ids": ids})
        if self.deferrable:
            self.defer(
                trigger=EbsSnapshotCompletedTrigger(
                    snapshot_ids=ids,
                    poke_interval=self.poke_interval,
                    aws_conn_id=self.aws_conn_id,
                    region_name=self.region_name,
                    verify=self.verify,
                    botocore_config=self.botocore_config,
                ),
                method_name="execute_complete",
                timeout=timedelta(seconds=self.timeout),
            )
        return PokeReturnValue(is_done=False)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Take over from the trigger.

        :raises AirflowFailException: if a snapshot has failed, is unknown, or AWS does not let us look.
        """
        match event["status"]:
            case "completed":
                return {"snapshot_ids": snapshot_ids(self.snapshot_ids)}
            case "failed":
                self._fail(event["message"])
        raise AirflowFailException(event["message"])

    def _fail(self, failed: str) -> NoReturn:
        said = f"a snapshot failed and will never be complete: {failed}"
        if self.delete_failed:
            left = delete_snapshots(self.hook.conn, snapshot_ids(self.snapshot_ids))
            said += f". Not deleted: {', '.join(left)}" if left else ". The whole set was deleted"
        raise AirflowFailException(f"{said}. Take a new snapshot: clear the pause task with everything downstream")
