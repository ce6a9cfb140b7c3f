"""Keeps a run red whose snapshot is not to be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from airflow.providers.common.compat.sdk import AirflowFailException, AirflowSkipException, BaseOperator, Context

from airflow_pg_freeze.wiring.guard import TOKEN_KEY

_BAD: Final = ("failed", "upstream_failed")


class PgFreezeGateOperator(BaseOperator):
    """Fail unless the snapshot tasks of a :func:`~airflow_pg_freeze.wiring.pg_frozen` succeeded, under one freeze.

    It looks for itself, as a teardown that always runs: a person who marks a run failed has every ordinary task skipped
    that has not begun, and a run that ends with skipped tasks and a successful resume would be green.

    Different freezes are seen when one of the tasks was cleared later without the others: two volumes, or rows and the
    files they refer to, would then not match. The XCom is the token.

    :param snapshots: the ids of all snapshot tasks.
    :param last: the ids of those that nothing in the group follows, and of pause and checkpoint: none may have failed.
    """

    ui_color = "#e6e6e6"

    def __init__(self, *, snapshots: Sequence[str], last: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.snapshots = list(snapshots)
        self.last = list(last)

    def execute(self, context: Context) -> str:
        """Look, and return the token.

        :raises AirflowFailException: naming the tasks that failed, or those that ran under different freezes.
        :raises AirflowSkipException: if all snapshot tasks were skipped.
        """
        ti = context["ti"]
        index = ti.map_index if in_mapped_group(self) else None
        found = ti.get_task_states(
            dag_id=ti.dag_id, run_ids=[ti.run_id], map_index=index, task_ids=sorted({*self.snapshots, *self.last})
        )
        # An index of a mapped task comes as "snapshot_3".
        states: dict[str, str | None] = {name: state for run in found.values() for name, state in run.items()}
        failed = {
            name: state
            for name, state in states.items()
            if state in _BAD and (name in self.last or name.rpartition("_")[0] in self.last)
        }
        if failed:
            listed = ", ".join(f"{name} {state}" for name, state in failed.items())
            raise AirflowFailException(f"there is no snapshot to be trusted: {listed}")
        tokens = self._tokens(ti, index)
        if len(tokens) > 1:
            listed = "; ".join(f"{', '.join(names)} under {token}" for token, names in tokens.items())
            raise AirflowFailException(
                f"the snapshot tasks ran under {len(tokens)} freezes, with writes in between: {listed}. Clear pause "
                "with everything downstream"
            )
        if not tokens:
            raise AirflowSkipException("nothing ran while the database was frozen")
        return next(iter(tokens))

    def _tokens(self, ti: Any, index: int | None) -> dict[str, list[str]]:
        tokens: dict[str, list[str]] = {}
        for task_id in self.snapshots:
            pulled = ti.xcom_pull(task_ids=task_id, key=TOKEN_KEY, map_indexes=index)
            # All indexes of a mapped task come as a sequence, and of none as one value.
            for token in {pulled} if pulled is None or isinstance(pulled, str) else set(pulled):
                if token is not None:
                    tokens.setdefault(token, []).append(task_id)
        return tokens


def in_mapped_group(node: Any) -> bool:
    """Whether *node*, a task or a group, is expanded as part of a mapped task group."""
    return next(iter(node.iter_mapped_task_groups()), None) is not None
