"""Refuses, when a DAG is parsed, indexes of a mapped task or group that would freeze the same database at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from airflow.providers.common.compat.sdk import XComArg
from jinja2 import Environment, TemplateError, meta

from pg_freeze import InvalidRequest

#: What is the same for every task of a run. Whatever else a template names may differ from index to index.
_OF_THE_RUN: Final = frozenset(
    {"conn", "dag", "dag_run", "data_interval_end", "data_interval_start", "ds", "ds_nodash", "logical_date", "macros"}
    | {"params", "run_id", "ts", "ts_nodash", "ts_nodash_with_tz", "var"}
)
_WHERE: Final = ("database", "postgres_conn_id")


def refuse_same_database(node_id: str, where: Mapping[str, Any], *, in_turn: bool, remedy: str) -> None:
    """Refuse indexes that would freeze the same database, and so refuse each other.

    :param node_id: the mapped task or group.
    :param where: ``database`` and ``postgres_conn_id``, as given.
    :param in_turn: whether never two indexes run at once.
    :param remedy: what to do besides mapping over databases.
    :raises InvalidRequest: if that is certain.
    """
    if in_turn or any(_may_differ(where.get(name)) for name in _WHERE):
        return
    raise InvalidRequest(
        f"{node_id!r} is mapped, and each index would freeze the same database: while one has it, the others are "
        f"refused. Map over databases, or {remedy}"
    )


def refuse_same_database_of_mapped(operator: Any) -> None:
    """Refuse a mapped task of which each index would freeze the same database.

    :param operator: the mapped operator.
    :raises InvalidRequest: if that is certain.
    """
    mapped = operator.expand_input.value
    if not isinstance(mapped, Mapping):
        return  # what expand_kwargs() is given may name a database
    defaults = (operator.dag.default_args if operator.dag else None) or {}
    where = {name: operator.partial_kwargs.get(name, defaults.get(name)) for name in _WHERE}
    if where.keys() & mapped.keys():
        return
    refuse_same_database(operator.task_id, where, in_turn=_in_turn(operator.partial_kwargs.get), remedy=IN_TURN)


IN_TURN: Final = "set max_active_tis_per_dagrun=1, so that one index freezes after the other"


def refuse_same_database_in_group(operator: Any) -> None:
    """Refuse a task of a mapped task group, if it would freeze the same database in each index of the group.

    :param operator: the operator, within its group.
    :raises InvalidRequest: if that is certain.
    """
    if next(iter(operator.iter_mapped_task_groups()), None) is not None:
        where = {name: getattr(operator, name) for name in _WHERE}
        refuse_same_database(operator.task_id, where, in_turn=_in_turn(vars(operator).get), remedy=IN_TURN)


def _in_turn(setting: Any) -> bool:
    return 1 in (setting("max_active_tis_per_dagrun"), setting("max_active_tis_per_dag"))


def _may_differ(value: Any) -> bool:
    if isinstance(value, str):
        try:
            named = meta.find_undeclared_variables(Environment(autoescape=True).parse(value))
        except TemplateError:
            return True  # Airflow will say what is wrong with it
        return not named <= _OF_THE_RUN
    if isinstance(value, (list, tuple)):
        return any(map(_may_differ, value))
    if isinstance(value, XComArg):
        return any(next(iter(one.iter_mapped_task_groups()), None) is not None for one, _ in value.iter_references())
    return value is not None
