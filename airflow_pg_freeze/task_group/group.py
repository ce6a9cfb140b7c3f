"""The task group itself: makes its own tasks, and wires and guards those of the author."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from itertools import pairwise
from types import TracebackType
from typing import Any, Final, Literal

from airflow.providers.common.compat.sdk import MappedOperator, TaskGroup, TriggerRule, XComArg
from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.providers.standard.sensors.time_delta import WaitSensor

from airflow_pg_freeze.hooks.pg_freeze import RUN
from airflow_pg_freeze.indexes import refuse_same_database
from airflow_pg_freeze.operators import PgCheckpointOperator, PgPauseOperator, PgResumeOperator
from airflow_pg_freeze.task_group.gate import PgFreezeGateOperator, in_mapped_group
from airflow_pg_freeze.task_group.guard import guard

Checkpoint = Literal["task", "in-pause", "none"]

# A task that waits for a slot while the database stands still is outage. Absolute, since by default a task's priority
# grows with all that is downstream of it, and resume has nothing there.
_PRIORITY: Final = 10_000
_FIRST_OF_ALL: Final = 1_000_000
# Airflow's own delay before a retry is five minutes.
_SOON: Final = timedelta(seconds=5)
_DEFAULTS: Final[Mapping[str, Any]] = {
    "priority_weight": _PRIORITY,
    "weight_rule": "absolute",
    # Whoever waits for the run before this one must do so before the pause: in the group he would wait frozen.
    "depends_on_past": False,
    "wait_for_downstream": False,
}


class PgFrozen(TaskGroup):
    """The group of a :func:`~airflow_pg_freeze.task_group.pg_frozen`: what is made in its ``with`` block runs frozen.

    ``frozen >> after`` waits for the snapshot and for the thaw.
    """

    pause: PgPauseOperator
    checkpoint: PgCheckpointOperator | None = None
    resume: PgResumeOperator
    gate: PgFreezeGateOperator
    #: The holder, as a template.
    holder: str
    _wired = False

    def __init__(
        self,
        group_id: str,
        *,
        target: Mapping[str, Any],
        pause_args: Mapping[str, Any],
        resume_args: Mapping[str, Any],
        checkpoint: Checkpoint,
        switch_wal: bool,
        lease_left: timedelta,
        pool: str | None,
        default_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        defaults: Any = {**_DEFAULTS, **(default_args or {})}
        super().__init__(group_id=group_id, default_args=defaults, **kwargs)
        if in_mapped_group(self):
            refuse_same_database(
                group_id, target, in_turn=False, remedy="map a task of the block, and not the group around it"
            )
        self.holder = target["holder"] or f"{RUN}/{self.group_id}"
        if target["holder"] is None and in_mapped_group(self):
            self.holder += "/{{ ti.map_index }}"
        self._target = {**target, "holder": self.holder}
        self._where: dict[str, Any] = {"task_group": self, "dag": self.dag, **({"pool": pool} if pool else {})}
        self._pause_args, self._resume_args = pause_args, resume_args
        self._checkpoint, self._switch_wal, self._lease_left = checkpoint, switch_wal, lease_left

    @property
    def freeze(self) -> XComArg:
        """The freeze, as the pause reports it in a dictionary: for a ``@task`` function or a templated field."""
        return XComArg(self.pause)

    @property
    def token(self) -> str:
        """The token of the freeze, as a template."""
        index = ", map_indexes=ti.map_index" if in_mapped_group(self) else ""
        return f"{{{{ ti.xcom_pull(task_ids='{self.pause.task_id}'{index})['token'] }}}}"

    def add(self, task: Any) -> Any:
        """Take in a task or a group, as Airflow does when one is made within the ``with`` block."""
        if self._wired:
            raise ValueError(f"{task.node_id!r} came to {self.group_id!r} after its with block: nothing would guard it")
        return super().add(task)

    def get_leaves(self) -> Iterator[Any]:  # type: ignore[override]  # TaskGroup says Generator; nobody sends to it
        """Yield what ``frozen >> after`` waits for. Airflow leaves teardowns out, and would not wait for the thaw."""
        if self._wired:
            yield from (self.resume, self.gate)
        else:
            yield from super().get_leaves()

    def __enter__(self) -> PgFrozen:
        """Make pause and checkpoint, so that the tasks of the block can refer to them."""
        super().__enter__()
        try:
            self._begin()
        except BaseException:
            # Airflow calls __exit__ only for a block that has begun. Left open, the group would take in the tasks of
            # the next DAG file that this process parses.
            super().__exit__(*sys.exc_info())  # type: ignore[no-untyped-call]
            raise
        return self

    def _begin(self) -> None:
        in_pause = self._checkpoint == "in-pause"
        # Whoever would freeze one more database comes after those that wait frozen.
        own = {"checkpoint": in_pause, "switch_wal": self._switch_wal and in_pause, "priority_weight": 1}
        self.pause = PgPauseOperator(task_id="pause", **{**self._target, **self._where, **own, **self._pause_args})
        if self._checkpoint == "task":
            self.checkpoint = PgCheckpointOperator(
                task_id="checkpoint",
                switch_wal=self._switch_wal,
                retries=2,
                retry_delay=_SOON,
                **self._target,
                **self._where,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wire and guard the tasks of the block, unless it has raised."""
        try:
            if kind is None:
                self._wire()
        finally:
            super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # Airflow's has no annotations

    def _wire(self) -> None:
        setups = [self.pause] if self.checkpoint is None else [self.pause, self.checkpoint]
        body = [task for task in self if not any(task is setup for setup in setups)]
        # A teardown of the block is somebody's clean-up: it must run whatever the freeze does, and nobody waits for it.
        work = [task for task in body if not task.is_teardown]
        if not work:
            raise ValueError(f"pg_frozen {self.group_id!r} has no task to run while the database is frozen")
        for task in work:
            _refuse_what_cannot_be_safe(task)

        self.resume = PgResumeOperator(
            task_id="resume",
            # The rule that counts is set below; a DAG with fail_fast takes no other here.
            trigger_rule=TriggerRule.ALL_SUCCESS,
            retries=3,
            retry_delay=_SOON,
            priority_weight=_FIRST_OF_ALL,
            **{**self._target, **self._where, **self._resume_args},
        )
        for first, second in pairwise(setups):
            first >> second
        body_ids, work_ids = {task.task_id for task in body}, {task.task_id for task in work}
        last = [task for task in work if task.downstream_task_ids.isdisjoint(work_ids)]
        self.gate = PgFreezeGateOperator(
            task_id="gate",
            pause=self.pause.task_id,
            # The scheduler marks empty operators success, and nothing runs: there is no end to be seen.
            snapshots=[task.task_id for task in work if not task.inherits_from_empty_operator],
            last=[task.task_id for task in (*setups, *last)],
            trigger_rule=TriggerRule.ALL_SUCCESS,
            task_group=self,
            dag=self.dag,
        )
        for task in body:
            if task.upstream_task_ids.isdisjoint(body_ids):
                setups[-1] >> task
        for task in work:
            # From every task, not the last ones only: those may be done, by their trigger rule or since one before them
            # failed, while another still copies.
            task >> [self.resume, self.gate]
            guard(task, self._target, self._lease_left)
        for end in (self.resume, self.gate):
            end.as_teardown(setups=setups, on_failure_fail_dagrun=True)
            end.trigger_rule = TriggerRule.ALL_DONE  # as_teardown() has set all_done_setup_success
        self._wired = True


def _refuse_what_cannot_be_safe(task: Any) -> None:
    """Refuse what would keep a database frozen for nothing, or slip past the guard.

    :raises ValueError: with what to write instead.
    """
    if task.depends_on_past or task.wait_for_downstream:
        raise ValueError(
            f"{task.task_id!r} has depends_on_past: after a failure the next run would wait for it frozen, until the "
            "lease ends. Put a task with depends_on_past before the group instead"
        )
    if task.trigger_rule == TriggerRule.ALWAYS:
        raise ValueError(f"{task.task_id!r} has trigger_rule='always': it would run before the database is frozen")
    kind = task.operator_class if isinstance(task, MappedOperator) else type(task)
    settings = task.partial_kwargs if isinstance(task, MappedOperator) else vars(task)
    setting = settings.get
    if getattr(task, "start_from_trigger", False):
        raise ValueError(
            f"{task.task_id!r} has start_from_trigger: it would begin in the triggerer, which does not ask whether the "
            "database is frozen. Set start_from_trigger=False"
        )
    if setting("end_from_trigger"):
        raise ValueError(
            f"{task.task_id!r} has end_from_trigger: it would end in the triggerer, which does not ask whether the "
            "database was frozen all along. Set end_from_trigger=False"
        )
    # A deferrable WaitSensor has the same, and no setting for it.
    if issubclass(kind, WaitSensor) and setting("deferrable"):
        raise ValueError(
            f"{task.task_id!r} would end in the triggerer, which does not ask whether the database was frozen all "
            "along. Set deferrable=False, or use a TimeDeltaSensor"
        )
    # Airflow triggers the run after execute(), and calls no hook then, unless the task is deferred.
    if issubclass(kind, TriggerDagRunOperator) and not (setting("wait_for_completion") and setting("deferrable")):
        raise ValueError(
            f"{task.task_id!r} triggers a run, and nobody would see whether the database was frozen until that has "
            "ended. Set wait_for_completion=True and deferrable=True"
        )
