"""Makes a frozen database complete on its volume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airflow.providers.common.compat.sdk import BaseOperator, Context

from airflow_pg_freeze.constants import Checked, check_constants
from airflow_pg_freeze.hooks.pg_freeze import RUN, PgFreezeHook, refused_fails_at_once
from pg_freeze import checkpoint


class PgCheckpointOperator(Checked, BaseOperator):
    """Write all that the server has in memory to the volume, and record the checkpoint in the freeze.

    A copy is consistent without it, by crash recovery; the checkpoint makes that recovery short. Fails if the freeze
    does not stand, before or after: a snapshot of a database that is not frozen must not begin. The XCom is the freeze,
    with ``checkpoint_lsn``.

    ``PgPauseOperator(checkpoint=True)`` does the same without a task of its own, which shortens the outage by one hop.

    :param postgres_conn_id: the Airflow connection to the server. (templated)
    :param database: the frozen database or databases; by default the connection's schema. (templated)
    :param maintenance_database: the database to control the freeze from. (templated)
    :param holder: who owns the freeze; by default the DAG run. (templated)
    :param switch_wal: switch to a new WAL file as well, as is good for very busy servers.
    :param required: whether a missing right to CHECKPOINT is an error. If not, the task succeeds with a warning and
        ``checkpoint_lsn`` is that of the server's last checkpoint.
    """

    template_fields: Sequence[str] = ("postgres_conn_id", "database", "maintenance_database", "holder")
    ui_color = "#cce6ff"

    def __init__(
        self,
        *,
        postgres_conn_id: str = "postgres_default",
        database: str | Sequence[str] | None = None,
        maintenance_database: str = "postgres",
        holder: str | None = None,
        switch_wal: bool = False,
        required: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.maintenance_database = maintenance_database
        self.holder = RUN if holder is None else holder
        self.switch_wal = switch_wal
        self.required = required
        check_constants(self)

    def execute(self, context: Context) -> dict[str, Any]:  # noqa: ARG002  Airflow passes it
        """Checkpoint, and return the freeze as JSON-ready values.

        :raises AirflowFailException: without the right to.
        """
        with refused_fails_at_once():
            hook = PgFreezeHook(self.postgres_conn_id, maintenance_database=self.maintenance_database)
            freeze = checkpoint(
                hook.connect,
                connect_to=hook.connect_to,
                databases=hook.databases(self.database),
                holder=self.holder,
                switch_wal=self.switch_wal,
                required=self.required,
            )
        self.log.info("Checkpoint of %s at LSN %s", ", ".join(map(repr, freeze.databases)), freeze.checkpoint_lsn)
        return freeze.as_dict()
