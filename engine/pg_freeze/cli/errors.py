"""From an error to an exit code, to a JSON object, and to words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from pg_freeze import DrainTimeout, FreezeError, FreezeRefused, InvalidRequest, ThawFailed
from pg_freeze.cli import show
from pg_freeze.cli.signals import Interrupted
from pg_freeze.names import visible

FAILED, USAGE, REFUSED, DRAIN_TIMEOUT, STILL_FROZEN = 1, 2, 3, 4, 5
#: Of ``status --check``, and of a ``resume`` that found no freeze to thaw.
UNEXPLAINED, FROZEN, UNKNOWN = 6, 7, 8
# InvalidRequest is a FreezeRefused, so it comes first.
_CODES: Mapping[type[FreezeError], int] = {
    InvalidRequest: USAGE,
    FreezeRefused: REFUSED,
    DrainTimeout: DRAIN_TIMEOUT,
    ThawFailed: STILL_FROZEN,
}


def exit_code(error: BaseException) -> int:
    """Return the exit code for *error*."""
    if isinstance(error, Interrupted):
        return error.exit_code
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), FAILED)


def document(error: BaseException, message: str) -> dict[str, Any]:
    """Return the JSON object for *error*."""
    made: dict[str, Any] = {"error": type(error).__name__, "message": message, "exit_code": exit_code(error)}
    if isinstance(error, FreezeRefused) and error.findings:
        made["findings"] = [finding.as_dict() for finding in error.findings]
    if isinstance(error, DrainTimeout):
        made["backends"] = [backend.as_dict() for backend in error.backends]
    return made


def shown(error: BaseException, message: str) -> list[RenderableType]:
    """Return *error* for people: findings and sessions as a list or table instead of one long line."""
    name = Text("pg-freeze: ")
    if isinstance(error, FreezeRefused) and error.findings:
        listed = show.findings(finding.as_dict() for finding in error.findings)
        return [*listed, name.append("refused; nothing was changed", style="bold red")]
    said: list[RenderableType] = [name.append(visible(message), style="bold red")]
    if isinstance(error, DrainTimeout) and error.backends:
        said += [Text("These were left:"), show.backends(error.backends, None)]
    return said
