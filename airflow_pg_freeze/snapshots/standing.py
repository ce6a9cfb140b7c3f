"""How long a snapshot may take: asked of the server just before it, since what is left of the lease is all there is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from airflow_pg_freeze.hooks.pg_freeze import PgFreezeHook
from pg_freeze import Freeze, LeaseLost, standing, status

#: Kept back of the lease: to look once more whether the freeze stands, and to clean up if it does not.
MARGIN: Final = timedelta(seconds=5)


def standing_until(
    hook: PgFreezeHook, *, databases: Sequence[str], holder: str, max_wait: timedelta
) -> tuple[Freeze, float]:
    """Return the freeze that *holder* has of these databases, and when to give up, on the monotonic clock.

    That is after *max_wait*, and always before the lease ends.

    :raises LeaseLost: if there is none that stands, or too little of its lease is left to begin.
    """
    # The answer is older than its arrival, never younger: count from the question.
    asked = time.monotonic()
    now = status(hook.connect, databases=databases).server_time
    freeze = standing(hook.connect, databases=databases, holder=holder, lease_left=MARGIN, connect_to=hook.connect_to)
    return freeze, asked + min(max_wait, freeze.lease_until - now - MARGIN).total_seconds()


def server_time(hook: PgFreezeHook, freeze: Freeze) -> datetime:
    """Return the time by the server's clock, which is also that of the looks of an attestation."""
    return status(hook.connect, databases=freeze.databases).server_time


def wait_until(hook: PgFreezeHook, freeze: Freeze, moment: datetime, at_most: timedelta) -> None:
    """Wait until it is *moment* by the server's clock, but not for longer than *at_most*."""
    left = min(moment - server_time(hook, freeze), at_most)
    if left > timedelta(0):
        time.sleep(left.total_seconds())


def still_standing(hook: PgFreezeHook, before: Freeze) -> None:
    """Look once more, after the snapshot, whether the same freeze stood all along.

    :raises LeaseLost: if not: what was snapshotted may be torn.
    """
    try:
        standing(
            hook.connect,
            databases=before.databases,
            holder=before.holder,
            token=before.token,
            connect_to=hook.connect_to,
        )
    except LeaseLost as error:
        raise LeaseLost(
            f"the freeze did not stand until the snapshot was taken, which may be torn: {error}. Give a longer lease, "
            "and see `pg-freeze history` for who thawed"
        ) from error
