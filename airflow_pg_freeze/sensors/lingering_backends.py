"""Waits until nobody is left who may still write to a frozen database."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

from airflow.providers.common.compat.sdk import (
    AirflowException,
    AirflowFailException,
    AirflowSensorTimeout,
    BaseSensorOperator,
    Context,
    PokeReturnValue,
    conf,
)

from airflow_pg_freeze.constants import Checked, check_constants, check_given
from airflow_pg_freeze.hooks.pg_freeze import RUN, PgFreezeHook
from airflow_pg_freeze.triggers.lingering_backends import PgLingeringBackendsTrigger, worth_waiting_for
from pg_freeze import Backend, FreezeError, FreezeRefused, LeaseLost, lingering_of
from pg_freeze.durations import Duration, duration


class PgLingeringBackendsSensor(Checked, BaseSensorOperator):
    """Wait until no lingering backend is left: no session that began before the freeze and may still write.

    :class:`PgPauseOperator` has drained the database already, so this usually succeeds at the first look. It is there
    to be sure of it at the moment the snapshot begins: it fails, without retries, if the freeze is gone by then, since
    a lost freeze does not come back. Clear the pause task with everything downstream.

    Sessions that our role may not end, which are superusers', are treated as the pause treats them: it gives up on
    them and reports them, and so does this sensor, unless *wait_for_superusers*. Then somebody has to end them.

    The XCom is a dictionary with ``lingering``, the sessions that were not waited for.

    :param postgres_conn_id: the Airflow connection to the server. (templated)
    :param database: the frozen database or databases; by default the connection's schema. (templated)
    :param maintenance_database: the database to control the freeze from. (templated)
    :param holder: who owns the freeze; by default the DAG run. (templated)
    :param wait_for_superusers: whether to wait for sessions that our role may not end, too.
    :param poke_interval: how long, a timedelta, seconds or text such as ``2s``, between two looks, during which the
        database stands still: 1 s by default.
    :param deferrable: wait in the triggerer, without a worker slot.
    """

    template_fields: Sequence[str] = ("postgres_conn_id", "database", "maintenance_database", "holder")
    ui_color = "#e6f2ff"

    def __init__(
        self,
        *,
        postgres_conn_id: str = "postgres_default",
        database: str | Sequence[str] | None = None,
        maintenance_database: str = "postgres",
        holder: str | None = None,
        wait_for_superusers: bool = False,
        poke_interval: Duration = 1,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        check_given({"poke_interval": poke_interval})  # Airflow's own error would not say what is allowed
        super().__init__(poke_interval=duration("poke_interval", poke_interval), **kwargs)
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.maintenance_database = maintenance_database
        self.holder = RUN if holder is None else holder
        self.wait_for_superusers = wait_for_superusers
        self.deferrable = deferrable
        check_constants(self)

    def execute(self, context: Context) -> Any:
        """Wait; return the sessions that were not waited for.

        :raises AirflowFailException: if the freeze is gone, or a right is missing.
        :raises AirflowSensorTimeout: naming the sessions that linger.
        """
        try:
            return super().execute(context)
        except AirflowSensorTimeout as error:
            self._time_out(error)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Go on after a deferral, as :meth:`execute` does."""
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except AirflowSensorTimeout as error:
            self._time_out(error)

    def poke(self, context: Context) -> PokeReturnValue:  # noqa: ARG002  Airflow passes it
        """Look once; defer if so asked and there is somebody to wait for."""
        hook = self._hook()
        try:
            databases = hook.databases(self.database)
            left = _left(hook, databases, self.holder)
        except (LeaseLost, FreezeRefused) as error:
            raise AirflowFailException(str(error)) from error
        waiting = worth_waiting_for(left, wait_for_superusers=self.wait_for_superusers)
        if not waiting:
            return PokeReturnValue(is_done=True, xcom_value=self._reported([backend.as_dict() for backend in left]))
        self.log.info("%d session(s) may still write: %s", len(waiting), _listed(waiting))
        if self.deferrable:
            self.defer(
                trigger=PgLingeringBackendsTrigger(
                    postgres_conn_id=self.postgres_conn_id,
                    maintenance_database=self.maintenance_database,
                    databases=databases,
                    holder=self.holder,
                    poke_interval=self.poke_interval,
                    wait_for_superusers=self.wait_for_superusers,
                ),
                method_name="execute_complete",
                timeout=timedelta(seconds=self.timeout),
            )
        return PokeReturnValue(is_done=False)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Take over from the trigger.

        :raises AirflowFailException: if the freeze is gone, or a right is missing.
        :raises AirflowException: for what a retry may cure.
        """
        match event["status"]:
            case "drained":
                return self._reported(event["lingering"])
            case "lost" | "refused":
                raise AirflowFailException(event["message"])
            case _:
                raise AirflowException(event["message"])

    def _hook(self) -> PgFreezeHook:
        return PgFreezeHook(self.postgres_conn_id, maintenance_database=self.maintenance_database)

    def _reported(self, left: list[dict[str, Any]]) -> dict[str, Any]:
        for backend in left:
            self.log.warning(
                "Not waited for: pid %s of %r (%r, %r), which our role may not end and which may still write",
                backend["pid"],
                backend["database"],
                backend["role"],
                backend["application"],
            )
        return {"lingering": left}

    def _time_out(self, error: AirflowSensorTimeout) -> NoReturn:
        hook = self._hook()
        try:
            left = _left(hook, hook.databases(self.database), self.holder)
            waiting = worth_waiting_for(left, wait_for_superusers=self.wait_for_superusers)
            who = f"{len(waiting)} session(s) may still write: {_listed(waiting)}"
        except FreezeError as unknown:
            who = f"who lingers cannot be said: {unknown}"
        raise AirflowSensorTimeout(f"{error}. {who}") from error


def _left(hook: PgFreezeHook, databases: Sequence[str], holder: str) -> tuple[Backend, ...]:
    return lingering_of(hook.connect, databases=databases, holder=holder, connect_to=hook.connect_to)


def _listed(backends: Sequence[Backend]) -> str:
    return "; ".join(map(str, backends[:5])) + ("; …" if len(backends) > 5 else "")
