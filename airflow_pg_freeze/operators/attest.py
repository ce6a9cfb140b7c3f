"""Records what state a snapshot is taken in: one task just before it, one just after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airflow.providers.common.compat.sdk import AirflowFailException, BaseOperator, Context

from airflow_pg_freeze.core import FreezeRefused, LeaseLost, attest
from airflow_pg_freeze.core.attestation import ENOUGH, Attestation, Level
from airflow_pg_freeze.hooks import RUN, PgFreezeHook, refused_fails_at_once


class PgAttestOperator(BaseOperator):
    """Check a freeze just before a snapshot, or just after it, and keep the record in the journal.

    ::

        PgAttestOperator(task_id="attest_before", moment="before", **server) >> snapshot
        snapshot >> PgAttestOperator(task_id="attest_after", moment="after", **server)

    The second one compares, reads the WAL in between where ``pg_walinspect`` may be used, and says how far the snapshot
    can be trusted: ``strict`` (nobody could connect, nothing changed), ``read-only`` (writers were refused, nothing
    changed) or ``crash-only``. What breaks an attestation is listed with who, what and when.

    The XCom is the attestation: a dictionary with ``token``, ``level``, ``certified``, ``method`` (``wal`` or
    ``counters``), ``violations``, ``before_at``, ``after_at`` and more.

    :param moment: ``before`` or ``after`` the snapshot.
    :param require: after the snapshot, the level below which the task fails: ``read-only`` or ``strict``; None never
        fails. The record is kept in any case. (templated)
    :param postgres_conn_id: the Airflow connection to the server. (templated)
    :param database: the frozen database or databases; by default the connection's schema. (templated)
    :param maintenance_database: the database that the freeze is controlled from. (templated)
    :param holder: who owns the freeze; by default the DAG run. Within ``pg_frozen() as frozen`` it is
        ``frozen.holder``. (templated)
    """

    template_fields: Sequence[str] = ("require", "postgres_conn_id", "database", "maintenance_database", "holder")
    ui_color = "#e6d9ff"

    def __init__(
        self,
        *,
        moment: str,
        require: Level | str | None = "read-only",
        postgres_conn_id: str = "postgres_default",
        database: str | Sequence[str] | None = None,
        maintenance_database: str = "postgres",
        holder: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.moment = moment
        self.require = require
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.maintenance_database = maintenance_database
        self.holder = RUN if holder is None else holder

    def execute(self, context: Context) -> dict[str, Any]:  # noqa: ARG002  Airflow passes it
        """Attest, and return the attestation as JSON-ready values.

        :raises AirflowFailException: if there is no freeze to attest before, or the level is below the required one.
        """
        looks = {"before": attest.before, "after": attest.after}
        if self.moment not in looks:
            raise AirflowFailException(f"moment is {self.moment!r}: it must be one of {', '.join(looks)}")
        if self.require is not None and self.require not in ENOUGH:
            raise AirflowFailException(f"require is {self.require!r}: it must be one of {', '.join(ENOUGH)}, or None")
        with refused_fails_at_once():
            hook = PgFreezeHook(self.postgres_conn_id, maintenance_database=self.maintenance_database)
            try:
                found = looks[self.moment](hook.connect, databases=hook.databases(self.database), holder=self.holder)
            except LeaseLost as error:
                raise FreezeRefused(str(error)) from error  # a freeze that is gone does not come back by a retry
        self._report(found)
        if self.moment == "after" and self.require is not None and not found.reaches(Level(self.require)):
            raise AirflowFailException(
                f"the snapshot is {found.level}, and {self.require} is required: "
                f"{found.reasons or 'connections were admitted; freeze with admit=nobody'}. "
                "Clear the pause task with everything downstream"
            )
        return found.as_dict()

    def _report(self, found: Attestation) -> None:
        if found.level is None:
            self.log.info("Attestation %d of freeze %s is open, from WAL %s on", found.id, found.token, found.wal_from)
            return
        self.log.info(
            "Attestation %d of freeze %s: %s, by %s, WAL %s to %s",
            found.id,
            found.token,
            found.level,
            found.method,
            found.wal_from,
            found.wal_to,
        )
        for one in found.violations:
            self.log.warning("%s: %s (%s, %s)", one.code, one.what, one.who or "unknown", one.when or "time unknown")
