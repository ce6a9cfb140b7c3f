"""What ``pg-freeze --conn-id`` asks for: an Airflow connection, by the entry point ``pg_freeze.connections``."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pg_freeze import Control, InvalidRequest


def connections(conn_id: str, maintenance_database: str | None) -> Callable[[str | None], Control]:
    """Return what connects to a database of an Airflow connection's server, or, for None, to the maintenance database.

    :param conn_id: of a connection in Airflow's database, its environment or a secrets backend.
    :param maintenance_database: the one to use instead of ``postgres``.
    :raises InvalidRequest: when it is called, if the connection cannot be found or used.
    """
    with _quietly(), _as_airflow():
        from airflow_pg_freeze.hooks.pg_freeze import PgFreezeHook  # noqa: PLC0415 - quietly, and only when asked for

        override: dict[str, Any] = (
            {} if maintenance_database is None else {"maintenance_database": maintenance_database}
        )
        hook = PgFreezeHook(postgres_conn_id=conn_id, **override)
        unknown: Exception | None = None
        try:
            # Airflow has chosen its own filters of warnings while it was loaded.
            with _quietly():
                hook.connection  # noqa: B018 - looked up here, in the main thread: guard connects in others
        except Exception as error:  # noqa: BLE001 - of whatever secrets backend there is; raised when we connect
            unknown = error

    def connect(database: str | None) -> Control:
        if unknown is not None:
            raise InvalidRequest(f"the Airflow connection {conn_id!r} cannot be used: {unknown}") from unknown
        return hook.connect() if database is None else hook.connect_to(database)

    return connect


@contextmanager
def _as_airflow() -> Iterator[None]:
    """Have Airflow look at what is stored in its database, too, as `airflow connections` does.

    Without it Airflow looks at environment variables and secrets backends only. What loading it changes of the
    environment is put back: a command that is run while frozen gets the environment that it was meant to have.
    """
    before = dict(os.environ)
    os.environ["_AIRFLOW_PROCESS_CONTEXT"] = "server"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep to itself what Airflow says while it is loaded, such as of its own database's migrations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
