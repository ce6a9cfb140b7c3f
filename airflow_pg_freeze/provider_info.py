"""Registers the provider with Airflow."""

from typing import Any

from airflow_pg_freeze import __version__


def get_provider_info() -> dict[str, Any]:
    """Return what Airflow's provider manager reads at its start."""
    return {
        "package-name": "airflow-provider-pg-freeze",
        "name": "PostgreSQL Freeze",
        "description": "Freeze a PostgreSQL database for as long as a snapshot takes, and never longer.",
        "versions": [__version__],
    }
