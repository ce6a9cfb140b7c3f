"""The operators: pause, checkpoint, attest, resume."""

from __future__ import annotations

from airflow_pg_freeze.operators.attest import PgAttestOperator
from airflow_pg_freeze.operators.checkpoint import PgCheckpointOperator
from airflow_pg_freeze.operators.pause import PgPauseOperator
from airflow_pg_freeze.operators.resume import PgResumeOperator

__all__ = ["PgAttestOperator", "PgCheckpointOperator", "PgPauseOperator", "PgResumeOperator"]
