"""The core: freezing with psycopg 3 and SQL, without Airflow."""

from __future__ import annotations

from airflow_pg_freeze.core.control import Connect, ConnectTo, Control, connector
from airflow_pg_freeze.core.errors import (
    DrainTimeout,
    FreezeError,
    FreezeRefused,
    InvalidRequest,
    LeaseLost,
    ServerLost,
    ThawFailed,
)
from airflow_pg_freeze.core.freeze import checkpoint, pause, resume
from airflow_pg_freeze.core.guard import thaw_expired
from airflow_pg_freeze.core.hold import Hold, frozen
from airflow_pg_freeze.core.model import (
    DRAIN_TIMEOUT,
    LEASE,
    Admit,
    Backend,
    Fate,
    Finding,
    Freeze,
    OnDrainTimeout,
    Progress,
    Resumed,
    Severity,
    State,
    Status,
    Strategy,
)
from airflow_pg_freeze.core.observe import history, install, lingering_of, preflight, standing, status
from airflow_pg_freeze.core.preflight import Preflight

__all__ = [
    "DRAIN_TIMEOUT",
    "LEASE",
    "Admit",
    "Backend",
    "Connect",
    "ConnectTo",
    "Control",
    "DrainTimeout",
    "Fate",
    "Finding",
    "Freeze",
    "FreezeError",
    "FreezeRefused",
    "Hold",
    "InvalidRequest",
    "LeaseLost",
    "OnDrainTimeout",
    "Preflight",
    "Progress",
    "Resumed",
    "ServerLost",
    "Severity",
    "State",
    "Status",
    "Strategy",
    "ThawFailed",
    "checkpoint",
    "connector",
    "frozen",
    "history",
    "install",
    "lingering_of",
    "pause",
    "preflight",
    "resume",
    "standing",
    "status",
    "thaw_expired",
]
