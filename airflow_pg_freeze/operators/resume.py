"""Thaws."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from airflow.providers.common.compat.sdk import BaseOperator, Context, TriggerRule

from airflow_pg_freeze.constants import Checked, check_constants
from airflow_pg_freeze.hooks.pg_freeze import RUN, PgFreezeHook, refused_fails_at_once
from pg_freeze import resume
from pg_freeze.durations import Duration, duration


# No on_kill(): Airflow lets execute() go on after SIGTERM, and finishing is what a resume should do. It needs
# milliseconds, of the 5 s that are left before SIGKILL, to bring the settings back; only then does it wait for readers.
class PgResumeOperator(Checked, BaseOperator):
    """Thaw: every write is possible again, with exactly the settings from before.

    Runs whatever became of the tasks before it (``trigger_rule="all_done"``), is retried soon (three times, after 5 s)
    and has a high priority, since the database stands still until it has run; give any of these to change them.
    Succeeds, and says so, when nothing is frozen. A freeze of another holder is left alone and reported, unless
    *force*.

    Also voids every attempt to pause that this holder began earlier, so that a late one cannot freeze again.

    The XCom is a dictionary with ``thawed`` and ``held_by_others``, lists of freezes.

    :param postgres_conn_id: the Airflow connection to the server. (templated)
    :param database: the frozen database or databases; by default the connection's schema. (templated)
    :param maintenance_database: the database to control the freeze from. (templated)
    :param holder: who owns the freeze; by default the DAG run. (templated)
    :param reader_grace: how long, a timedelta or seconds, read-only sessions that run a query may go on before they are
        ended, for a session stays read-only. New sessions can write from the start. (templated)
    :param force: thaw whoever's freeze it is. For people, rarely for DAGs.
    """

    template_fields: Sequence[str] = ("postgres_conn_id", "database", "maintenance_database", "holder", "reader_grace")
    ui_color = "#c2f0c2"

    def __init__(
        self,
        *,
        postgres_conn_id: str = "postgres_default",
        database: str | Sequence[str] | None = None,
        maintenance_database: str = "postgres",
        holder: str | None = None,
        reader_grace: Duration = 0,
        force: bool = False,
        trigger_rule: TriggerRule | str = TriggerRule.ALL_DONE,
        retries: int = 3,
        retry_delay: timedelta | float = timedelta(seconds=5),
        priority_weight: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            trigger_rule=trigger_rule,
            retries=retries,
            retry_delay=retry_delay,
            priority_weight=priority_weight,
            **kwargs,
        )
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.maintenance_database = maintenance_database
        self.holder = RUN if holder is None else holder
        self.reader_grace = reader_grace
        self.force = force
        check_constants(self)

    def execute(self, context: Context) -> dict[str, Any]:  # noqa: ARG002  Airflow passes it
        """Thaw, and return what was thawed as JSON-ready values.

        :raises AirflowFailException: for an unknown database or a missing right.
        """
        with refused_fails_at_once():
            hook = PgFreezeHook(self.postgres_conn_id, maintenance_database=self.maintenance_database)
            resumed = resume(
                hook.connect,
                databases=hook.databases(self.database),
                holder=self.holder,
                reader_grace=duration("reader_grace", self.reader_grace),
                force=self.force,
                connect_to=hook.connect_to,
            )
        for freeze in resumed.thawed:
            self.log.info(
                "Thawed: %s (token %s), frozen since %s; ended %d read-only session(s)",
                ", ".join(map(repr, freeze.databases)),
                freeze.token,
                freeze.frozen_at,
                freeze.readers_ended,
            )
        for freeze in resumed.others:
            self.log.warning(
                "Left alone: %s, frozen by %r until %s; force=True would thaw it",
                ", ".join(map(repr, freeze.databases)),
                freeze.holder,
                freeze.lease_until,
            )
        if not resumed.thawed:
            self.log.info("Nothing of %r was frozen; earlier attempts of it are void", self.holder)
        return resumed.as_dict()
