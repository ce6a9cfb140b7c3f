"""Keeps a run red whose snapshot is not to be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from airflow.providers.common.compat.sdk import AirflowFailException, AirflowSkipException, BaseOperator, Context
from airflow.providers.standard.utils.skipmixin import XCOM_SKIPMIXIN_KEY

from airflow_pg_freeze.task_group.guard import DONE_KEY, TOKEN_KEY

_NOT_MAPPED: Final = -1
_WITHOUT_WORK: Final = ("skipped", "removed")


@dataclass(frozen=True, slots=True)
class _Instance:
    """A task of this run, or one index of a mapped task."""

    task_id: str
    index: int
    state: str | None

    def __str__(self) -> str:
        return self.task_id if self.index == _NOT_MAPPED else f"{self.task_id}[{self.index}]"


class PgFreezeGateOperator(BaseOperator):
    """Fail unless the snapshot tasks of a :func:`~airflow_pg_freeze.task_group.pg_frozen` succeeded, under one freeze.

    It looks for itself, as a teardown that always runs: a person who marks a run failed has every ordinary task skipped
    that has not begun, and a run that ends with skipped tasks and a successful resume would be green.

    Every index of a mapped task counts for itself. A success counts only if the task has itself noted, after its work,
    that its freeze stood all along: a person who marks a task success ends it in the middle of its copy.

    Different freezes are seen when one of the tasks was cleared later without the others: two volumes, or rows and the
    files they refer to, would then not match. The XCom is the token.

    :param pause: the id of the pause, whose freeze it must be.
    :param snapshots: the ids of all snapshot tasks.
    :param last: the ids of those that nothing in the group follows, and of pause and checkpoint: all of these must have
        succeeded, or have been skipped.
    """

    ui_color = "#e6e6e6"

    def __init__(self, *, pause: str, snapshots: Sequence[str], last: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pause = pause
        self.snapshots = list(snapshots)
        self.last = list(last)

    def execute(self, context: Context) -> str:
        """Look, and return the token.

        :raises AirflowFailException: naming the tasks that failed, that were marked success by somebody else, or that
            ran under different freezes.
        :raises AirflowSkipException: if all snapshot tasks were skipped.
        """
        ti: Any = context["ti"]
        only = ti.map_index if in_mapped_group(self) else None
        found = {name: list(_instances(ti, name, only)) for name in dict.fromkeys((*self.snapshots, *self.last))}
        failed = [
            f"{one} {one.state or 'has no state'}"
            for name in self.last
            for one in found[name]
            if one.state not in ("success", *_WITHOUT_WORK)
        ]
        if failed:
            raise AirflowFailException(f"there is no snapshot to be trusted: {', '.join(failed)}")
        tokens: dict[str, list[str]] = {}
        unseen = []
        for one in (one for name in self.snapshots for one in found[name] if one.state == "success"):
            token = _seen_under(ti, one)
            if token is None:
                unseen.append(str(one))
            else:
                tokens.setdefault(token, []).append(str(one))
        if unseen:
            raise AirflowFailException(
                f"nobody saw the end of {', '.join(unseen)}: marked success by hand, or ended outside of a worker. "
                "What was made is not to be trusted. Clear pause with everything downstream"
            )
        if not tokens:
            raise AirflowSkipException("nothing ran while the database was frozen")
        paused = ti.xcom_pull(task_ids=self.pause, map_indexes=_NOT_MAPPED if only is None else only)
        if paused:
            tokens.setdefault(paused["token"], []).append(self.pause)
        if len(tokens) > 1:
            listed = "; ".join(f"{', '.join(names)} under {token}" for token, names in tokens.items())
            raise AirflowFailException(
                f"the tasks ran under {len(tokens)} freezes, with writes in between: {listed}. Clear pause with "
                "everything downstream"
            )
        return next(iter(tokens))


def in_mapped_group(node: Any) -> bool:
    """Whether *node*, a task or a group, is expanded as part of a mapped task group."""
    return next(iter(node.iter_mapped_task_groups()), None) is not None


def _instances(ti: Any, task_id: str, only: int | None) -> Iterator[_Instance]:
    """Yield what there is of a task in this run: one, or each index that it was expanded to.

    :param only: the one index to look at, within a mapped task group.
    """
    # One task at a time: index 3 of "copy" comes as "copy_3", which may be the name of another task.
    states = ti.get_task_states(dag_id=ti.dag_id, run_ids=[ti.run_id], map_index=only, task_ids=[task_id])
    for name, state in states.get(ti.run_id, {}).items():
        index = name.removeprefix(task_id).removeprefix("_")
        yield _Instance(task_id, int(index) if index else _NOT_MAPPED, None if state is None else str(state))


def _seen_under(ti: Any, one: _Instance) -> str | None:
    """Return the token under which a task ran from its beginning to its end; None if nobody saw its end."""

    # With map_indexes=None only what is not mapped would be found.
    def pull(key: str) -> Any:
        return ti.xcom_pull(task_ids=one.task_id, key=key, map_indexes=one.index)

    token = pull(DONE_KEY)
    # A branch or short circuit ends by an exception, after which Airflow calls no hook. What it has decided it notes
    # before.
    if token is None and pull(XCOM_SKIPMIXIN_KEY) is not None:
        token = pull(TOKEN_KEY)
    return None if token is None else str(token)
