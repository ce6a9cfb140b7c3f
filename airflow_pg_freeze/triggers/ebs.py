"""Waits in the triggerer for EBS snapshots to be copied."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from airflow.providers.amazon.aws.hooks.ec2 import EC2Hook
from airflow.triggers.base import BaseTrigger, TriggerEvent
from asgiref.sync import sync_to_async

from airflow_pg_freeze.snapshots import SnapshotFailed, SnapshotRefused
from airflow_pg_freeze.snapshots.ebs import copying


class EbsSnapshotCompletedTrigger(BaseTrigger):
    """Fires when every snapshot is complete, or one will never be.

    The event is a dictionary: ``status`` is ``completed``, ``failed`` (with ``failed``, the snapshots' ids) or
    ``refused``; ``message`` says what went wrong.

    :param snapshot_ids: the snapshots.
    :param poke_interval: seconds between two looks.
    :param aws_conn_id: the Airflow connection to AWS; looked up in the triggerer.
    :param region_name: the region, if not the connection's.
    :param verify: whether to check AWS's certificate, or against which.
    :param botocore_config: more of botocore's configuration.
    """

    def __init__(
        self,
        *,
        snapshot_ids: Sequence[str],
        poke_interval: float,
        aws_conn_id: str | None = "aws_default",
        region_name: str | None = None,
        verify: bool | str | None = None,
        botocore_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.snapshot_ids = list(snapshot_ids)
        self.poke_interval = poke_interval
        self.aws_conn_id = aws_conn_id
        self.region_name = region_name
        self.verify = verify
        self.botocore_config = botocore_config

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what the triggerer makes this trigger from again. It is stored in Airflow's database: no secrets."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "snapshot_ids": self.snapshot_ids,
                "poke_interval": self.poke_interval,
                "aws_conn_id": self.aws_conn_id,
                "region_name": self.region_name,
                "verify": self.verify,
                "botocore_config": self.botocore_config,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look until there is something to say, and say it once. What AWS cannot answer now is asked again later."""
        # asgiref rather than asyncio.to_thread(): the connection is looked up in there, which needs to find its way
        # back to the triggerer's event loop.
        client = None
        connect = sync_to_async(self._client, thread_sensitive=False)
        look = sync_to_async(copying, thread_sensitive=False)
        while True:
            try:
                client = client or await connect()
                now = await look(client, self.snapshot_ids)
            except SnapshotRefused as error:
                yield _event({"status": "refused", "message": str(error)})
                return
            except SnapshotFailed as error:
                self.log.warning("%s", error)
            else:
                self.log.info("%s", now)
                if now.failed:
                    message = "; ".join(map(str, now.failed))
                    yield _event({"status": "failed", "failed": [one.id for one in now.failed], "message": message})
                    return
                if now.done:
                    yield _event({"status": "completed"})
                    return
            await asyncio.sleep(self.poke_interval)

    def _client(self) -> Any:
        hook = EC2Hook(
            aws_conn_id=self.aws_conn_id,
            region_name=self.region_name,
            verify=self.verify,
            config=self.botocore_config,
            api_type="client_type",
        )
        return hook.conn


def _event(payload: dict[str, Any]) -> TriggerEvent:
    return TriggerEvent(payload)  # type: ignore[no-untyped-call]
