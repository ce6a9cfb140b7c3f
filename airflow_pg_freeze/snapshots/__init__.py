"""Snapshots of what lies under a frozen server: EBS and local volumes, without Airflow."""

from __future__ import annotations

from pg_freeze.volumes.errors import SnapshotFailed, SnapshotRefused

__all__ = ["SnapshotFailed", "SnapshotRefused"]
