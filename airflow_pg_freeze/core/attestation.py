"""An attestation: the record of what was checked around one snapshot, and the level that follows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from airflow_pg_freeze.core.errors import InvalidRequest
from airflow_pg_freeze.core.model import Admit, Strategy, iso


class Level(StrEnum):
    """How much a snapshot can be trusted."""

    STRICT = "strict"
    READ_ONLY = "read-only"
    CRASH_ONLY = "crash-only"


_ORDER: Final = (Level.CRASH_ONLY, Level.READ_ONLY, Level.STRICT)


class Method(StrEnum):
    """How it was found that no row changed."""

    WAL = "wal"
    LOCKS = "locks"
    PRIVILEGES = "privileges"
    COUNTERS = "counters"


#: What may be required of a snapshot.
ENOUGH: Final = (Level.READ_ONLY, Level.STRICT)


def required(require: Level | str | None, strategy: Strategy | str, admit: Admit | str) -> Level | None:
    """Return the level that is required of a snapshot; None if any will do.

    :raises InvalidRequest: for one that cannot be reached.
    """
    if require is None:
        return None
    if require not in ENOUGH:
        raise InvalidRequest(f"require is {require!r}: it must be one of {', '.join(ENOUGH)}, or None")
    level = Level(require)
    if level is Level.STRICT and not (strategy == Strategy.DATABASE and admit == Admit.NOBODY):
        raise InvalidRequest(
            f"strict means that nobody can connect, but strategy is {strategy!s} and admit {admit!s}: "
            "give strategy=database and admit=nobody, or require=read-only"
        )
    return level


@dataclass(frozen=True, slots=True)
class Violation:
    """What breaks an attestation: who, what, when (server time, as exact as it is known)."""

    code: str
    what: str
    who: str | None
    when: str | None

    def as_dict(self) -> dict[str, str | None]:
        """Return the violation as JSON-ready values."""
        return {"code": self.code, "what": self.what, "who": self.who, "when": self.when}


@dataclass(frozen=True, slots=True)
class Attestation:
    """One record: open (no level yet) after the first check, closed after the second."""

    id: int
    token: UUID
    holder: str
    databases: tuple[str, ...]
    before_at: datetime
    after_at: datetime | None
    wal_from: str
    wal_to: str | None
    checkpoint_lsn: str | None
    method: Method | None
    level: Level | None
    violations: tuple[Violation, ...]

    @property
    def certified(self) -> bool:
        """Whether the snapshot between the two checks is consistent."""
        return self.level in (Level.STRICT, Level.READ_ONLY)

    def reaches(self, level: Level) -> bool:
        """Whether the snapshot can be trusted as much as *level* says."""
        return self.level is not None and _ORDER.index(self.level) >= _ORDER.index(level)

    @property
    def reasons(self) -> str:
        """What breaks the attestation, in one line; empty if nothing does."""
        return "; ".join(
            f"{one.what} ({one.who or 'unknown'}, {one.when or 'time unknown'})" for one in self.violations
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the attestation as JSON-ready values."""
        return {
            "id": self.id,
            "token": str(self.token),
            "holder": self.holder,
            "databases": list(self.databases),
            "before_at": iso(self.before_at),
            "after_at": iso(self.after_at),
            "wal_from": self.wal_from,
            "wal_to": self.wal_to,
            "checkpoint_lsn": self.checkpoint_lsn,
            "method": None if self.method is None else self.method.value,
            "level": None if self.level is None else self.level.value,
            "certified": self.certified,
            "violations": [violation.as_dict() for violation in self.violations],
        }
