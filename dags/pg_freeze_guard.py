"""Thaws what has outlived its lease, every minute, on every server it is told of.

A session on each server does this already, the dead-man switch. The guard is for what that does not survive: a restart
of the server, or somebody who ends the session. It needs no more rights than the freeze itself, and does nothing where
nothing is frozen.

Tell it in an Airflow variable, or in the environment of Airflow's processes, and give it a pool of its own, so that it
never waits behind other tasks::

    airflow variables set pg_freeze_guard gitlab,billing    # or AIRFLOW_VAR_PG_FREEZE_GUARD=gitlab,billing
    airflow pools set pg_freeze_guard 4 "thaws what has outlived its lease"
    export PG_FREEZE_GUARD_POOL=pg_freeze_guard

Each item is a connection id; ``billing/control`` says that the maintenance database of ``billing`` is ``control``.
"""

import logging
import os
from datetime import timedelta
from typing import Any

from airflow.providers.common.compat.sdk import DAG, AirflowFailException, Variable, task

from airflow_pg_freeze.hooks.pg_freeze import PgFreezeHook, refused_fails_at_once
from pg_freeze import thaw_expired

VARIABLE = "pg_freeze_guard"
log = logging.getLogger(__name__)

with DAG(
    "pg_freeze_guard",
    description="Thaw what has outlived its lease",
    doc_md=__doc__,
    schedule=timedelta(minutes=1),
    catchup=False,
    max_active_runs=1,
    tags=["pg-freeze"],
    default_args={
        "pool": os.environ.get("PG_FREEZE_GUARD_POOL", "default_pool"),
        "priority_weight": 1_000_000,
        "weight_rule": "absolute",
        "execution_timeout": timedelta(seconds=30),
        "retries": 0,  # the next run is the retry
    },
) as dag:

    @task
    def connections() -> list[str]:
        """Return whom to look after."""
        listed = [item.strip() for item in (Variable.get(VARIABLE, default="") or "").split(",")]
        found = [item for item in listed if item]
        if not found:
            raise AirflowFailException(
                f"nobody to look after: airflow variables set {VARIABLE} CONNECTION[,CONNECTION…], or pause this DAG"
            )
        return found

    # One task for each: a server that cannot be reached keeps no other from being thawed.
    @task(map_index_template="{{ task.op_kwargs['connection'] }}")
    def thaw(connection: str) -> list[dict[str, Any]]:
        """Thaw what has outlived its lease on one server, and return those freezes."""
        conn_id, _, maintenance_database = connection.partition("/")
        with refused_fails_at_once():
            hook = PgFreezeHook(conn_id, maintenance_database=maintenance_database or "postgres")
            thawed = thaw_expired(hook.connect, hook.connect_to)
        for freeze in thawed:
            log.warning(
                "Thawed %s: its lease ended at %s, and nobody had thawed it. Holder: %s",
                ", ".join(map(repr, freeze.databases)),
                freeze.lease_until,
                freeze.holder,
            )
        return [freeze.as_dict() for freeze in thawed]

    thaw.expand(connection=connections())
