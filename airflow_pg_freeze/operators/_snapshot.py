"""What the operators that make snapshots have in common."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from airflow.providers.amazon.aws.hooks.base_aws import AwsGenericHook
from airflow.providers.common.compat.sdk import AirflowFailException, Context
from botocore.config import Config

from airflow_pg_freeze.snapshots import SnapshotRefused
from airflow_pg_freeze.snapshots.aws import ONE_TRY
from pg_freeze import FreezeRefused, LeaseLost

_NO_RETRIES: Final = Config(retries={"total_max_attempts": 1})


class Terminated(BaseException):
    """The task was told to end (SIGTERM) while it made a snapshot. No library may take it for an error of its own."""


@contextmanager
def hopeless_fails_at_once() -> Iterator[None]:
    """Fail the task without retries for what no retry can cure; a freeze that is gone does not come back either.

    :raises AirflowFailException: for :class:`SnapshotRefused`, :class:`FreezeRefused` and :class:`LeaseLost`.
    """
    try:
        yield
    except (SnapshotRefused, FreezeRefused, LeaseLost) as error:
        raise AirflowFailException(str(error)) from error


def origin(context: Context) -> dict[str, str]:
    """Return where a snapshot comes from, for its tags."""
    ti: Any = context["ti"]
    return {"dag": ti.dag_id, "run": ti.run_id}


def task_key(context: Context) -> str:
    """Return what names this task in its run, the same for each of its tries."""
    ti: Any = context["ti"]
    return "/".join((ti.dag_id, ti.run_id, ti.task_id, str(ti.map_index)))


def impatient_client(hook: AwsGenericHook[Any], deadline: float | None = None) -> Any:
    """Return a boto3 client that leaves every repetition to us; timeouts may come from the connection.

    :param deadline: on the monotonic clock. An answer is waited for so long that half of what is left remains, to look
        what became of the request.
    """
    config = ONE_TRY.merge(hook.config).merge(_NO_RETRIES)
    if deadline is not None:
        config = config.merge(Config(read_timeout=max(1.0, min(30.0, (deadline - time.monotonic()) / 2))))
    return hook.get_client_type(region_name=hook.region_name, config=config)
