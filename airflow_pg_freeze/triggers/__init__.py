"""Triggers."""

from __future__ import annotations

from airflow_pg_freeze.triggers.ebs import EbsSnapshotCompletedTrigger
from airflow_pg_freeze.triggers.lingering_backends import PgLingeringBackendsTrigger

__all__ = ["EbsSnapshotCompletedTrigger", "PgLingeringBackendsTrigger"]
