"""Keeps a run red whose snapshot is not to be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airflow.providers.common.compat.sdk import AirflowFailException, BaseOperator, Context

from airflow_pg_freeze.wiring.guard import TOKEN_KEY


class PgFreezeGateOperator(BaseOperator):
    """Fail unless all snapshot tasks of a :func:`~airflow_pg_freeze.wiring.pg_frozen` ran under one freeze.

    They do, unless one of them was cleared later without the others: two volumes, or rows and the files they refer to,
    would then not match. The XCom is the token.

    :param snapshots: the ids of the snapshot tasks.
    """

    ui_color = "#e6e6e6"

    def __init__(self, *, snapshots: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.snapshots = list(snapshots)

    def execute(self, context: Context) -> str | None:
        """Compare, and return the token.

        :raises AirflowFailException: naming the tasks and their freezes, if there are several.
        """
        ti = context["ti"]
        index = ti.map_index if in_mapped_group(self) else None
        tasks: dict[str, list[str]] = {}
        for task_id in self.snapshots:
            found = ti.xcom_pull(task_ids=task_id, key=TOKEN_KEY, map_indexes=index)
            # All indexes of a mapped task come as a sequence, and of none as one value.
            for token in {found} if found is None or isinstance(found, str) else set(found):
                if token is not None:
                    tasks.setdefault(token, []).append(task_id)
        if len(tasks) > 1:
            listed = "; ".join(f"{', '.join(names)} under {token}" for token, names in tasks.items())
            raise AirflowFailException(
                f"the snapshot tasks ran under {len(tasks)} freezes, with writes in between: {listed}. Clear the pause "
                "task with everything downstream"
            )
        return next(iter(tasks), None)


def in_mapped_group(node: Any) -> bool:
    """Whether *node*, a task or a group, is expanded as part of a mapped task group."""
    return next(iter(node.iter_mapped_task_groups()), None) is not None
