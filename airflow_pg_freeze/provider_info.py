"""Registers the provider with Airflow."""

from __future__ import annotations

from typing import Any

from airflow_pg_freeze import __version__

_INTEGRATION = "PostgreSQL Freeze"


def get_provider_info() -> dict[str, Any]:
    """Return what Airflow's provider manager reads at its start: the hook reuses the connection type ``postgres``."""
    return {
        "package-name": "airflow-provider-pg-freeze",
        "name": _INTEGRATION,
        "description": "Freeze a PostgreSQL database for as long as a snapshot takes, and never longer.",
        "versions": [__version__],
        "integrations": [
            {
                "integration-name": _INTEGRATION,
                "external-doc-url": "https://www.postgresql.org/docs/current/runtime-config-client.html",
                "tags": ["software"],
            }
        ],
        "hooks": _modules("hooks.pg_freeze"),
        "operators": _modules(
            "operators.pause",
            "operators.checkpoint",
            "operators.attest",
            "operators.resume",
            "operators.ebs",
            "operators.frozen_ebs",
            "operators.rds",
            "operators.volume",
        ),
        "sensors": _modules("sensors.lingering_backends", "sensors.ebs"),
        "task-decorators": [{"name": "pg_frozen", "class-name": "airflow_pg_freeze.decorators.pg_frozen_task"}],
        "triggers": _modules("triggers.lingering_backends", "triggers.ebs"),
        "extra-links": ["airflow_pg_freeze.operators.ebs.EbsSnapshotsLink"],
    }


def _modules(*names: str) -> list[dict[str, Any]]:
    return [{"integration-name": _INTEGRATION, "python-modules": [f"airflow_pg_freeze.{name}" for name in names]}]
