"""The task group that composes a freeze safely around whatever makes the snapshot.

::

    pause ─▶ checkpoint ─▶ snapshot tasks ─┬─▶ resume   both are teardowns of pause and checkpoint,
                                           └─▶ gate     and run when everything before them is done

Each piece answers something that was seen to go wrong on a real Airflow:

* As a teardown, resume also runs after a person has marked the run failed or success, and is cleared together with
  any task of the group. Being setups, pause and checkpoint are cleared along as well.
* ``all_done`` instead of a teardown's own rule lets resume run when pause has failed, or was ended from outside.
* A run is as red as its last tasks. With resume as the only one a failed snapshot would leave it green, and with an
  ordinary task beside it a person's *mark failed* would: that skips the task. So the gate is a teardown that looks
  for itself what became of the snapshot.
* What is cleared with "only failed" is cleared alone. So a snapshot task asks the server itself, before and after its
  work, whether the freeze stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from difflib import get_close_matches
from inspect import signature
from typing import Any

from airflow.providers.common.compat.sdk import BaseOperator, XComArg

from airflow_pg_freeze.constants import check_given
from airflow_pg_freeze.operators import PgPauseOperator
from airflow_pg_freeze.task_group.gate import PgFreezeGateOperator
from airflow_pg_freeze.task_group.group import Checkpoint, PgFrozen
from pg_freeze.durations import Duration, duration

__all__ = ["PgFreezeGateOperator", "PgFrozen", "pg_frozen"]


def pg_frozen(
    group_id: str = "frozen",
    *,
    postgres_conn_id: str = "postgres_default",
    database: str | Sequence[str] | XComArg | None = None,
    maintenance_database: str = "postgres",
    holder: str | None = None,
    checkpoint: Checkpoint = "task",
    switch_wal: bool = False,
    lease_left: Duration = timedelta(seconds=5),
    pool: str | None = None,
    resume_args: Mapping[str, Any] | None = None,
    group_args: Mapping[str, Any] | None = None,
    **pause_args: Any,
) -> PgFrozen:
    """Run the tasks of a ``with`` block while databases are frozen, and thaw whatever becomes of them.

    ::

        with pg_frozen(postgres_conn_id="gitlab", database="gitlabhq", lease=timedelta(minutes=5)):
            BashOperator(task_id="snapshot", bash_command="btrfs subvolume snapshot -r /data /snapshots/{{ run_id }}")

    Any operator may stand in the block: decorated, mapped, deferrable, sensors, groups, in any order. Each of them
    fails before it begins if the freeze does not stand, and after its work if the freeze did not stand all along. Tasks
    upstream of the group run before the pause, tasks downstream of it after the thaw.

    :param group_id: the id of the task group, a part of the holder: two groups never take over each other's freeze.
    :param postgres_conn_id: the Airflow connection to the server. (templated)
    :param database: the database or databases to freeze; by default the connection's schema. (templated)
    :param maintenance_database: the database to control the freeze from. (templated)
    :param holder: who owns the freeze; by default ``dag_id/run_id/group_id``. (templated)
    :param checkpoint: ``task`` makes the final checkpoint in a task of its own, ``in-pause`` at the end of the pause,
        which saves a hop of outage, ``none`` leaves it out: the copy then takes longer to recover.
    :param switch_wal: switch to a new WAL file after the final checkpoint.
    :param lease_left: how much of the lease must be left for a task of the block to begin.
    :param pool: the pool for pause, checkpoint and resume, with room for two tasks of each run, and for nothing else.
    :param resume_args: more for :class:`~airflow_pg_freeze.operators.PgResumeOperator`, such as ``reader_grace``.
    :param group_args: more for the task group, such as ``tooltip`` or ``default_args``.
    :param pause_args: everything else goes to :class:`~airflow_pg_freeze.operators.PgPauseOperator`: ``lease``,
        ``drain_timeout``, ``on_drain_timeout``, ``strategy``, ``admit``, ``roles``, ``strict``, ``retries`` …
    :returns: the group, with its tasks ``pause``, ``checkpoint``, ``resume`` and ``gate``, and for use by the tasks in
        the block ``freeze``, ``token`` and ``holder``.
    :raises TypeError: for a keyword that neither this function nor the pause has, with the nearest one.
    :raises ValueError: at the end of the block, if it is empty or holds a task that cannot be made safe.
    """
    if checkpoint not in ("task", "in-pause", "none"):
        raise ValueError(f"checkpoint is {checkpoint!r}: it must be 'task', 'in-pause' or 'none'")
    if switch_wal and checkpoint == "none":
        raise ValueError("switch_wal comes after a checkpoint: it cannot be had with checkpoint='none'")
    _check_known(pause_args)
    check_given({"lease_left": lease_left, "switch_wal": switch_wal})
    target = {
        "postgres_conn_id": postgres_conn_id,
        "database": database,
        "maintenance_database": maintenance_database,
        "holder": holder,
    }
    return PgFrozen(
        group_id,
        target=target,
        pause_args=pause_args,
        resume_args=resume_args or {},
        checkpoint=checkpoint,
        switch_wal=switch_wal,
        lease_left=duration("lease_left", lease_left),
        pool=pool,
        **(group_args or {}),
    )


def _check_known(pause_args: Mapping[str, Any]) -> None:
    """Refuse a keyword that is mistyped: Airflow would name the pause, which the author has not written.

    :raises TypeError: naming it, and the nearest one that there is.
    """
    kinds = (pg_frozen, PgPauseOperator.__init__, BaseOperator.__init__)
    known = {name for kind in kinds for name in signature(kind).parameters} - {"self", "args", "kwargs", "pause_args"}
    for name in pause_args.keys() - known:
        near = get_close_matches(name, known, n=1)
        meant = f": did you mean {near[0]!r}?" if near else "; the pause has none of this name either"
        raise TypeError(f"pg_frozen() has no keyword {name!r}{meant}")
