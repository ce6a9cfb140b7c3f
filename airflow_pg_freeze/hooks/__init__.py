"""Hooks."""

from __future__ import annotations

from airflow_pg_freeze.hooks.pg_freeze import PgFreezeHook

__all__ = ["PgFreezeHook"]
