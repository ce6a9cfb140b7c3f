"""Records what state a snapshot is taken in: one task just before it, one just after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from airflow.providers.common.compat.sdk import AirflowFailException, BaseOperator, Context

from airflow_pg_freeze.constants import Checked, check_constants
from airflow_pg_freeze.hooks.pg_freeze import RUN, PgFreezeHook, refused_fails_at_once
from pg_freeze import FreezeError, FreezeRefused, LeaseLost, attest
from pg_freeze.attestation import ENOUGH, Attestation, Level
from pg_freeze.names import visible


class PgAttestOperator(Checked, BaseOperator):
    """Check a freeze just before a snapshot, or just after it, and keep the record in the journal.

    ::

        PgAttestOperator(task_id="attest_before", moment="before", **server) >> snapshot
        snapshot >> PgAttestOperator(task_id="attest_after", moment="after", **server)

    The second one compares, reads the WAL in between where ``pg_walinspect`` may be used, and says how far the snapshot
    can be trusted: ``strict`` (nobody could connect, nothing changed), ``quiesced`` (writers were refused, nothing
    changed) or ``crash-only``. What breaks an attestation is listed with who, what and when.

    The XCom is the attestation: a dictionary with ``token``, ``level``, ``certified``, ``method`` (``wal``,
    ``transaction-ids`` or ``none``), ``violations``, ``sequences``, ``unseen``, ``advice`` and more.

    :param moment: ``before`` or ``after`` the snapshot.
    :param require: after the snapshot, the level below which the task fails: ``quiesced`` or ``strict``; None never
        fails. The record is kept in any case. (templated)
    :param attestation_file: after the snapshot, a file to write the attestation to, for ``pg-freeze verify-copy``: in
        the copy itself it is never closed yet. (templated)
    :param postgres_conn_id: the Airflow connection to the server. (templated)
    :param database: the frozen database or databases; by default the connection's schema. (templated)
    :param maintenance_database: the database that the freeze is controlled from. (templated)
    :param holder: who owns the freeze; by default the DAG run. Within ``pg_frozen() as frozen`` it is
        ``frozen.holder``. (templated)
    """

    template_fields: Sequence[str] = (
        "require",
        "attestation_file",
        "postgres_conn_id",
        "database",
        "maintenance_database",
        "holder",
    )
    ui_color = "#e6d9ff"

    def __init__(
        self,
        *,
        moment: str,
        require: Level | str | None = "quiesced",
        attestation_file: str | None = None,
        postgres_conn_id: str = "postgres_default",
        database: str | Sequence[str] | None = None,
        maintenance_database: str = "postgres",
        holder: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.moment = moment
        self.require = require
        self.attestation_file = attestation_file
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.maintenance_database = maintenance_database
        self.holder = RUN if holder is None else holder
        check_constants(self)

    def execute(self, context: Context) -> dict[str, Any]:  # noqa: ARG002  Airflow passes it
        """Attest, and return the attestation as JSON-ready values.

        :raises AirflowFailException: if there is no freeze to attest before, or the level is below the required one.
        """
        looks = {"before": attest.before, "after": attest.after}
        if self.require is not None and self.require not in ENOUGH:
            raise AirflowFailException(f"require is {self.require!r}: it must be one of {', '.join(ENOUGH)}, or None")
        with refused_fails_at_once():
            hook = PgFreezeHook(self.postgres_conn_id, maintenance_database=self.maintenance_database)
            try:
                found = looks[self.moment](
                    hook.connect,
                    databases=hook.databases(self.database),
                    holder=self.holder,
                    connect_to=hook.connect_to,
                )
            except LeaseLost as error:
                raise FreezeRefused(str(error)) from error  # a freeze that is gone does not come back by a retry
        self._report(found)
        if self.moment == "after" and self.attestation_file:
            try:
                found.write(Path(self.attestation_file))
            except FreezeError as error:  # the record is closed: a retry would find none that is open
                raise AirflowFailException(str(error)) from error
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
            self.log.warning("%s", one)
        for said in (*found.sequences, *found.unseen):
            self.log.info("%s", visible(said))
        if found.advice is not None:
            self.log.info("To have better: %s", visible(found.advice))
