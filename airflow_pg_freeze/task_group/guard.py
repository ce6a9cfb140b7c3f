"""Lets a task run only while a freeze stands, whatever the task is."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from airflow.providers.common.compat.sdk import AirflowFailException, BaseOperator, Context

from airflow_pg_freeze.hooks.pg_freeze import PgFreezeHook, refused_fails_at_once
from pg_freeze import Freeze, LeaseLost, standing

#: XCom of each guarded task: the token of the freeze under which it began.
TOKEN_KEY: Final = "pg_freeze_token"  # noqa: S105  the name of a key
#: XCom of each guarded task: the same, once its work is done, if the freeze stood all along.
DONE_KEY: Final = "pg_freeze_done"

_NOW: Final = timedelta(0)


def guard(task: Any, target: dict[str, Any], lease_left: timedelta) -> None:
    """Let *task* begin only while the freeze of *target* stands, and succeed only if the same one stood all along.

    :param task: an operator, mapped or not.
    :param target: ``postgres_conn_id``, ``database``, ``maintenance_database`` and ``holder``, templated.
    :param lease_left: how much of the lease must be left for it to begin.
    """

    # A deferred task passes here again when it goes on, in another process, and its own XCom says under which freeze it
    # began. Airflow deletes that before a retry, which so begins afresh.
    def before(context: Context) -> None:
        token = _token(context)
        freeze = _standing(context, target, _NOW if token else lease_left, token)
        if token is None:
            context["ti"].xcom_push(key=TOKEN_KEY, value=str(freeze.token))

    def after(context: Context, _: Any = None) -> None:
        freeze = _standing(context, target, _NOW, _token(context))
        context["ti"].xcom_push(key=DONE_KEY, value=str(freeze.token))

    # The worker parses the DAG file anew, so these need not survive serialization. They are what Airflow's own run_if()
    # uses; overriding pre_execute() on the instance would bind an operator's own to the unrendered original.
    if isinstance(task, BaseOperator):
        hooks, first, last = vars(task), "_pre_execute_hook", "_post_execute_hook"
    else:
        hooks, first, last = task.partial_kwargs, "pre_execute", "post_execute"
    hooks[first] = _both(before, hooks.get(first))
    hooks[last] = _both(hooks.get(last), after)


def _both(first: Callable[..., None] | None, second: Callable[..., None] | None) -> Callable[..., None]:
    def both(*args: Any) -> None:
        for hook in (first, second):
            if hook is not None:
                hook(*args)

    return both


def _token(context: Context) -> UUID | None:
    ti = context["ti"]
    found = ti.xcom_pull(task_ids=ti.task_id, key=TOKEN_KEY, map_indexes=ti.map_index)
    return None if found is None else UUID(found)


def _standing(context: Context, target: dict[str, Any], lease_left: timedelta, token: UUID | None) -> Freeze:
    rendered = context["ti"].task.render_template(target, context)
    with refused_fails_at_once():
        hook = PgFreezeHook(rendered["postgres_conn_id"], maintenance_database=rendered["maintenance_database"])
        try:
            return standing(
                hook.connect,
                databases=hook.databases(rendered["database"]),
                holder=rendered["holder"],
                lease_left=lease_left,
                token=token,
                connect_to=hook.connect_to,
            )
        except LeaseLost as error:
            when = (
                "before this task began" if token is None else "all the while: what this task made is not to be trusted"
            )
            raise AirflowFailException(
                f"the freeze did not stand {when}. {error}. Clear the pause task with everything downstream"
            ) from error
