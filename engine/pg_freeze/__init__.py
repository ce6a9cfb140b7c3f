"""Freeze a PostgreSQL database for as long as a snapshot takes, and never longer: with psycopg 3 and SQL.

What is named here is loaded when it is asked for: to load psycopg takes longer than to print a help text.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pg_freeze.control import Connect, ConnectTo, Control, connector
    from pg_freeze.errors import (
        DrainTimeout,
        FreezeError,
        FreezeRefused,
        InvalidRequest,
        LeaseLost,
        ServerLost,
        ThawFailed,
    )
    from pg_freeze.freeze.block import Hold, frozen
    from pg_freeze.freeze.checkpoint import checkpoint
    from pg_freeze.freeze.pause import pause
    from pg_freeze.freeze.thaw import resume
    from pg_freeze.guard import thaw_expired
    from pg_freeze.installation import forget, install, uninstall
    from pg_freeze.model import (
        DRAIN_TIMEOUT,
        LEASE,
        LOCK,
        PRIVILEGES,
        READ_ONLY,
        Admit,
        Backend,
        Fate,
        Finding,
        Forgotten,
        Freeze,
        OnDrainTimeout,
        Progress,
        Resumed,
        Severity,
        State,
        Status,
    )
    from pg_freeze.observe import has_journal, history, lingering_of, preflight, standing, status
    from pg_freeze.preflight_checks import Preflight
    from pg_freeze.request import FreezeRequest
    from pg_freeze.unknown import Doubt, doubts

__version__ = "0.1.0"

__all__ = [
    "DRAIN_TIMEOUT",
    "LEASE",
    "LOCK",
    "PRIVILEGES",
    "READ_ONLY",
    "Admit",
    "Backend",
    "Connect",
    "ConnectTo",
    "Control",
    "Doubt",
    "DrainTimeout",
    "Fate",
    "Finding",
    "Forgotten",
    "Freeze",
    "FreezeError",
    "FreezeRefused",
    "FreezeRequest",
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
    "ThawFailed",
    "checkpoint",
    "connector",
    "doubts",
    "forget",
    "frozen",
    "has_journal",
    "history",
    "install",
    "lingering_of",
    "pause",
    "preflight",
    "resume",
    "standing",
    "status",
    "thaw_expired",
    "uninstall",
]

# No module beside this one may have the name of something here: once loaded, it would stand in its place.
_MODULES: Final = {
    "control": ("Connect", "ConnectTo", "Control", "connector"),
    "errors": (
        "DrainTimeout",
        "FreezeError",
        "FreezeRefused",
        "InvalidRequest",
        "LeaseLost",
        "ServerLost",
        "ThawFailed",
    ),
    "freeze.checkpoint": ("checkpoint",),
    "freeze.block": ("Hold", "frozen"),
    "freeze.pause": ("pause",),
    "freeze.thaw": ("resume",),
    "guard": ("thaw_expired",),
    "installation": ("forget", "install", "uninstall"),
    "observe": ("has_journal", "history", "lingering_of", "preflight", "standing", "status"),
    "preflight_checks": ("Preflight",),
    "request": ("FreezeRequest",),
    "unknown": ("Doubt", "doubts"),
}
_MODULE_OF: Final = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULE_OF.get(name, 'model')}"), name)
    globals()[name] = found
    return found
