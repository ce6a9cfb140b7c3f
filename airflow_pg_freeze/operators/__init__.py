"""The operators: pause, checkpoint, resume."""

from __future__ import annotations

from airflow_pg_freeze.operators.checkpoint import PgCheckpointOperator
from airflow_pg_freeze.operators.pause import PgPauseOperator
from airflow_pg_freeze.operators.resume import PgResumeOperator

__all__ = ["PgCheckpointOperator", "PgPauseOperator", "PgResumeOperator"]
