"""``@task.pg_frozen``: a function that runs while databases stand still."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, cast

from airflow.providers.common.compat.sdk import Context, DecoratedOperator, TaskDecorator, task_decorator_factory
from airflow.providers.standard.operators.python import PythonOperator

from airflow_pg_freeze.constants import check_given
from airflow_pg_freeze.hooks.pg_freeze import TASK
from airflow_pg_freeze.indexes import IN_TURN, refuse_same_database
from airflow_pg_freeze.operators._one_task import FIELDS, OneTask
from pg_freeze import DRAIN_TIMEOUT, LEASE, LOCK, Admit, OnDrainTimeout
from pg_freeze.attestation import Level
from pg_freeze.durations import Duration

_FREEZE = "freeze"
_CHECKED = (*FIELDS, "checkpoint")


class PgFrozenDecoratedOperator(DecoratedOperator, PythonOperator):
    """Runs a function while databases are frozen. Made by :func:`pg_frozen_task`."""

    template_fields: Sequence[str] = (*PythonOperator.template_fields, *FIELDS)
    template_fields_renderers: ClassVar[dict[str, str]] = {**PythonOperator.template_fields_renderers}
    custom_operator_name: str = "@task.pg_frozen"
    ui_color = "#b3d9ff"

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Collection[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        postgres_conn_id: str = "postgres_default",
        database: str | Sequence[str] | None = None,
        maintenance_database: str = "postgres",
        holder: str | None = None,
        strategy: str = "lock",
        lease: Duration = LEASE,
        drain_timeout: Duration = DRAIN_TIMEOUT,
        on_drain_timeout: OnDrainTimeout | str = "terminate",
        admit: Admit | str = "readers-once-drained",
        checkpoint: bool = True,
        roles: Sequence[str] = (),
        require: Level | str | None = "quiesced",
        attestation_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        given = _with_freeze(python_callable, op_args or (), op_kwargs or {})
        upstream: dict[str, Any] = {"python_callable": python_callable, "op_args": op_args, "op_kwargs": given}
        super().__init__(kwargs_to_upstream=upstream, **upstream, **kwargs)
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.maintenance_database = maintenance_database
        self.holder = TASK if holder is None else holder
        self.strategy = strategy
        self.lease = lease
        self.drain_timeout = drain_timeout
        self.on_drain_timeout = on_drain_timeout
        self.admit = admit
        self.checkpoint = checkpoint
        self.roles = roles
        self.require = require
        self.attestation_file = attestation_file
        self._frozen = OneTask(self)

    def execute(self, context: Context) -> Any:
        """Freeze, call the function, thaw, attest; return what the function returned."""

        def call(hold: Any) -> Any:
            context[_FREEZE] = hold.freeze.as_dict()  # type: ignore[literal-required]
            # A value of the author's own stays: the context's is for who was given none.
            self.op_kwargs = {k: v for k, v in self.op_kwargs.items() if k != _FREEZE or v is not None}
            return super(PgFrozenDecoratedOperator, self).execute(context)

        returned, attestation = self._frozen.run(self, context, call)
        self._frozen.demand(self, attestation)
        return returned

    def on_kill(self) -> None:
        """End the function, thaw, and fail the task."""
        self._frozen.kill()


def _with_freeze(function: Callable[..., Any], args: Collection[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return *kwargs* with a placeholder, if the function asks for the freeze, which is not there before it runs."""
    parameters = inspect.signature(function).parameters
    if _FREEZE in parameters and _FREEZE not in [*parameters][: len(args)] and _FREEZE not in kwargs:
        return {**kwargs, _FREEZE: None}
    return dict(kwargs)


def pg_frozen_task(
    python_callable: Callable[..., Any] | None = None, multiple_outputs: bool | None = None, **kwargs: Any
) -> TaskDecorator:
    """Make a function a task that runs while databases are frozen, as ``@task.pg_frozen``.

    ::

        @task.pg_frozen(postgres_conn_id="gitlab", lease=timedelta(minutes=5))
        def snapshot(freeze):
            take_the_snapshot(name=freeze["token"])

    The databases are frozen just before the function begins and thawed as soon as it ends, however it ends. When a
    person ends the task, or it times out, the thaw comes first and the task fails. The function's result is the XCom;
    the attestation is another one, with the key ``attestation``. A function with a parameter ``freeze`` gets the freeze
    as a dictionary; it is in the context, too.

    :param python_callable: the function.
    :param multiple_outputs: as for ``@task``.
    :param postgres_conn_id: the Airflow connection to the server. (templated)
    :param database: the database, or a list of those to freeze at the same time; by default the connection's schema.
        (templated)
    :param maintenance_database: the database to control the freeze from. (templated)
    :param holder: who owns the freeze; by default the DAG run and the task. (templated)
    :param strategy: ``lock`` makes writers wait and ends nobody, ``read-only`` refuses writes and ends sessions,
        ``privileges`` revokes the privileges to write. (templated)
    :param lease: after this time, a timedelta or seconds, the server thaws by itself. (templated)
    :param drain_timeout: how long, a timedelta or seconds, to wait for transactions that are in the way. (templated)
    :param on_drain_timeout: what happens then: ``terminate`` ends what is left, ``abort`` undoes the freeze and fails.
        (templated)
    :param admit: for the strategy ``read-only``: who may connect meanwhile. (templated)
    :param checkpoint: write all that is in memory to the volume, before the freeze and in it. False where the role may
        not CHECKPOINT (PostgreSQL 14, RDS): the copy is as good and takes longer to recover.
    :param roles: for the strategy ``privileges``: whose privileges to write to revoke; by default everybody's.
        (templated)
    :param require: the level below which the task fails after the function: ``quiesced`` or ``strict``; None never
        fails. (templated)
    :param attestation_file: a file to write the attestation to, for ``pg-freeze verify-copy``. (templated)
    """
    made: Any = task_decorator_factory(
        python_callable=python_callable,
        multiple_outputs=multiple_outputs,
        decorated_operator_class=PgFrozenDecoratedOperator,
        **kwargs,
    )
    return cast("TaskDecorator", _looking(made) if python_callable else lambda function: _looking(made(function)))


def _looking(decorated: Any) -> Any:
    """Have a decorated function look at what it is mapped with. Airflow has no hook for that."""
    kind: Any = type(decorated)

    class Looking(kind):  # type: ignore[misc]
        def _expand(self, *args: Any, **kwargs: Any) -> Any:
            made = super()._expand(*args, **kwargs)
            given = made.operator.partial_kwargs
            wish = {"strategy": LOCK, "admit": Admit.READERS_ONCE_DRAINED, "lease": LEASE, **given}
            check_given({name: wish[name] for name in _CHECKED if name in wish}, FIELDS, made.operator.dag)
            # What is mapped are the function's arguments, never a keyword of the operator.
            where = {name: given.get(name) for name in ("database", "postgres_conn_id")}
            in_turn = 1 in (given.get("max_active_tis_per_dagrun"), given.get("max_active_tis_per_dag"))
            refuse_same_database(made.operator.task_id, where, in_turn=in_turn, remedy=IN_TURN)
            return made

    decorated.__class__ = Looking
    return decorated
