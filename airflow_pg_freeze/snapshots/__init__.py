"""Snapshots of what lies under a frozen server: EBS and local volumes, without Airflow."""

from __future__ import annotations

from airflow_pg_freeze.snapshots.errors import SnapshotFailed, SnapshotRefused

__all__ = ["SnapshotFailed", "SnapshotRefused"]
