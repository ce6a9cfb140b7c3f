"""Task decorators."""

from __future__ import annotations

from airflow_pg_freeze.decorators.pg_frozen import pg_frozen_task

__all__ = ["pg_frozen_task"]
