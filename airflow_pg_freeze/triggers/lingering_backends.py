"""Waits in the triggerer for lingering backends to go. Only looks, with the core's own query; never ends a session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent
from asgiref.sync import sync_to_async

from airflow_pg_freeze.hooks import PgFreezeHook
from pg_freeze import Backend, Fate, FreezeError, FreezeRefused, LeaseLost, lingering_of


def worth_waiting_for(backends: Iterable[Backend], *, wait_for_superusers: bool) -> tuple[Backend, ...]:
    """Return the lingering backends to wait for; a pause gives up in the same way on those that it may not end."""
    return tuple(backend for backend in backends if wait_for_superusers or backend.fate is not Fate.CANNOT_END)


class PgLingeringBackendsTrigger(BaseTrigger):
    """Fires when no lingering backend is left to wait for, or when waiting has no sense any more.

    The event is a dictionary: ``status`` is ``drained``, ``lost`` (the freeze is gone), ``refused`` or ``error``;
    ``lingering`` are the sessions that are left, ``message`` says what went wrong.

    :param postgres_conn_id: the Airflow connection to the server; looked up in the triggerer.
    :param maintenance_database: the database to control the freeze from.
    :param databases: the frozen databases.
    :param holder: who owns the freeze.
    :param poke_interval: seconds between two looks.
    :param wait_for_superusers: whether to wait for sessions that nobody but a superuser may end.
    """

    def __init__(
        self,
        *,
        postgres_conn_id: str,
        maintenance_database: str,
        databases: Sequence[str],
        holder: str,
        poke_interval: float,
        wait_for_superusers: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.postgres_conn_id = postgres_conn_id
        self.maintenance_database = maintenance_database
        self.databases = list(databases)
        self.holder = holder
        self.poke_interval = poke_interval
        self.wait_for_superusers = wait_for_superusers

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what the triggerer makes this trigger from again. It is stored in Airflow's database: no secrets."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "postgres_conn_id": self.postgres_conn_id,
                "maintenance_database": self.maintenance_database,
                "databases": self.databases,
                "holder": self.holder,
                "poke_interval": self.poke_interval,
                "wait_for_superusers": self.wait_for_superusers,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look until there is something to say, and say it once."""
        hook = PgFreezeHook(
            self.postgres_conn_id,
            maintenance_database=self.maintenance_database,
            connection=await PgFreezeHook.aget_connection(self.postgres_conn_id),
        )
        # asgiref rather than asyncio.to_thread(): from such a thread an IAM token's AWS connection can be looked up,
        # which on Airflow 3.1 needs to find its way back to the triggerer's event loop.
        look = sync_to_async(lingering_of, thread_sensitive=False)
        while True:
            try:
                left = await look(
                    hook.connect, databases=self.databases, holder=self.holder, connect_to=hook.connect_to
                )
            except FreezeError as error:
                yield _event(_status(error), (), str(error))
                return
            waiting = worth_waiting_for(left, wait_for_superusers=self.wait_for_superusers)
            if not waiting:
                yield _event("drained", left)
                return
            self.log.info("%d lingering: %s", len(waiting), "; ".join(map(str, waiting[:5])))
            await asyncio.sleep(self.poke_interval)


def _event(status: str, left: Sequence[Backend], message: str = "") -> TriggerEvent:
    payload = {"status": status, "message": message, "lingering": [backend.as_dict() for backend in left]}
    return TriggerEvent(payload)  # type: ignore[no-untyped-call]


def _status(error: FreezeError) -> str:
    match error:
        case LeaseLost():
            return "lost"
        case FreezeRefused():
            return "refused"
        case _:
            return "error"
