"""Sensors."""

from __future__ import annotations

from airflow_pg_freeze.sensors.ebs import EbsSnapshotCompletedSensor
from airflow_pg_freeze.sensors.lingering_backends import PgLingeringBackendsSensor

__all__ = ["EbsSnapshotCompletedSensor", "PgLingeringBackendsSensor"]
