"""What the core returns: frozen dataclasses and string enums, each with one door from row to object."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from pg_freeze.names import visible

if TYPE_CHECKING:
    from pg_freeze.unknown import Doubt

LEASE = timedelta(minutes=15)
DRAIN_TIMEOUT = timedelta(seconds=20)

#: The names of the strategies that are ours: see ``strategies/``.
LOCK: Final = "lock"
READ_ONLY: Final = "read-only"
PRIVILEGES: Final = "privileges"


class Admit(StrEnum):
    """Who may connect while the database is frozen."""

    READERS_ONCE_DRAINED = "readers-once-drained"
    READERS = "readers"
    NOBODY = "nobody"


class OnDrainTimeout(StrEnum):
    """What to do with sessions that are left at the drain timeout."""

    TERMINATE = "terminate"
    ABORT = "abort"


class State(StrEnum):
    """Where a freeze stands in its life. `THAWING` is writable already: only read-only sessions are left to end."""

    DRAINING = "draining"
    FROZEN = "frozen"
    THAWING = "thawing"
    THAWED = "thawed"


class Fate(StrEnum):
    """What will happen to a lingering backend, and why."""

    IDLE = "idle"
    AFTER_BARRIER = "began-after-barrier"
    WAITS = "in-transaction"
    CANNOT_END = "superuser"


class Severity(StrEnum):
    """Whether a finding keeps a freeze from being tried."""

    REFUSE = "refuse"
    WARN = "warn"


def iso(moment: datetime | None) -> str | None:
    """Return *moment* as ISO 8601 in UTC, or None."""
    return None if moment is None else moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that would make a freeze fail or leak, and what to do about it."""

    severity: Severity
    code: str
    message: str
    remedy: str

    def as_dict(self) -> dict[str, str]:
        """Return the finding as JSON-ready values."""
        said = {"message": visible(self.message), "remedy": visible(self.remedy)}
        return {"severity": self.severity.value, "code": self.code, **said}


@dataclass(frozen=True, slots=True)
class Backend:
    """A lingering backend: a session of a frozen database that began before the barrier.

    Never holds the session's query, which may hold secrets. What is hidden from us is None.
    """

    pid: int
    database: str
    role: str | None
    application: str | None
    state: str | None
    backend_type: str | None
    backend_start: datetime | None
    transaction_age: timedelta | None
    fate: Fate

    def as_dict(self) -> dict[str, Any]:
        """Return the backend as JSON-ready values; ages in seconds."""
        return {
            "pid": self.pid,
            "database": self.database,
            "role": self.role,
            "application": self.application,
            "state": self.state,
            "backend_type": self.backend_type,
            "backend_start": iso(self.backend_start),
            "transaction_age": None if self.transaction_age is None else self.transaction_age.total_seconds(),
            "fate": self.fate.value,
        }

    def __str__(self) -> str:
        """Return one line for logs and errors."""
        age = (
            ""
            if self.transaction_age is None
            else f", transaction open for {self.transaction_age.total_seconds():.1f} s"
        )
        who = f"{self.role or 'unknown role'}, {self.application or self.backend_type or 'unknown'}"
        state = "has not finished starting" if self.state == "starting" else self.state or "state hidden"
        return visible(f"pid {self.pid} of {self.database!r} ({who}): {state}{age}")


@dataclass(frozen=True, slots=True)
class Freeze:
    """One freeze, as the journal has it. Times are the server's.

    ``roles`` are those whose privileges are revoked, by the strategy privileges; none means everybody's.
    ``locked`` is False for a freeze by the strategy lock whose sessions are gone: it is over, though nobody has closed
    it yet. ``left_over`` is what a thaw could not restore, and why; ``in_the_way`` are the sessions that kept it
    waiting, and whether they were ended; ``dropped`` are those of its databases that are no more.
    """

    token: UUID
    ticket: int
    holder: str
    databases: tuple[str, ...]
    admit: Admit
    state: State
    requested_at: datetime
    lease_until: datetime
    strategy: str = READ_ONLY
    roles: tuple[str, ...] = ()
    locked: bool = True
    barrier_at: datetime | None = None
    drained_at: datetime | None = None
    frozen_at: datetime | None = None
    checkpoint_at: datetime | None = None
    checkpoint_lsn: str | None = None
    restored_at: datetime | None = None
    thawed_at: datetime | None = None
    thawed_by: str | None = None
    terminated: dict[str, int] = field(default_factory=dict)
    lingering: tuple[dict[str, Any], ...] = ()
    warnings: tuple[dict[str, str], ...] = ()
    readers_ended: int = 0
    left_over: tuple[dict[str, str], ...] = ()
    in_the_way: tuple[dict[str, Any], ...] = ()
    dropped: tuple[str, ...] = ()
    dead_man_pid: int | None = None

    @property
    def holds(self) -> bool:
        """Whether writes are refused now, or made to wait."""
        return self.state in (State.DRAINING, State.FROZEN) and self.locked and len(self.dropped) < len(self.databases)

    def as_dict(self) -> dict[str, Any]:
        """Return the freeze as in XComs and ``--json``: ISO 8601 UTC times, LSN in text form."""
        return {
            "token": str(self.token),
            "holder": self.holder,
            "databases": list(self.databases),
            "strategy": self.strategy,
            "roles": list(self.roles),
            "state": self.state.value,
            "admit": self.admit.value,
            "requested_at": iso(self.requested_at),
            "barrier_at": iso(self.barrier_at),
            "drained_at": iso(self.drained_at),
            "frozen_at": iso(self.frozen_at),
            "lease_until": iso(self.lease_until),
            "checkpoint_at": iso(self.checkpoint_at),
            "checkpoint_lsn": self.checkpoint_lsn,
            "restored_at": iso(self.restored_at),
            "thawed_at": iso(self.thawed_at),
            "thawed_by": self.thawed_by,
            "terminated": dict(self.terminated),
            "lingering": list(self.lingering),
            "warnings": list(self.warnings),
            "readers_ended": self.readers_ended,
            "left_over": list(self.left_over),
            "in_the_way": list(self.in_the_way),
            "dropped": list(self.dropped),
            "dead_man_pid": self.dead_man_pid,
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """How a drain goes: the sessions left, the time since the barrier and the time that is left."""

    elapsed: timedelta
    remaining: timedelta
    lingering: tuple[Backend, ...]


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a resume did.

    ``thawed`` are the freezes that it ended; ``others`` those it left alone, since they are not this holder's.
    """

    holder: str
    databases: tuple[str, ...]
    thawed: tuple[Freeze, ...]
    others: tuple[Freeze, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        return {
            "holder": self.holder,
            "databases": list(self.databases),
            "thawed": [freeze.as_dict() for freeze in self.thawed],
            "held_by_others": [freeze.as_dict() for freeze in self.others],
        }


@dataclass(frozen=True, slots=True)
class Status:
    """What is frozen now, the sessions that linger, and what no freeze accounts for.

    ``unexplained`` are closed, or read-only by default; of those in ``unknown`` it cannot be said who froze them.
    """

    freezes: tuple[Freeze, ...]
    backends: tuple[Backend, ...]
    unexplained: tuple[str, ...]
    server_time: datetime
    unknown: tuple[Doubt, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the status as JSON-ready values; with exactly one freeze, its fields stand at the top too."""
        one = self.freezes[0].as_dict() if len(self.freezes) == 1 else {}
        return {
            **one,
            "freezes": [freeze.as_dict() for freeze in self.freezes],
            "lingering": [backend.as_dict() for backend in self.backends],
            "unexplained": list(self.unexplained),
            "unknown": [doubt.as_dict() for doubt in self.unknown],
            "server_time": iso(self.server_time),
        }


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What became of the freezes that were thawed more than some age ago.

    :ivar freezes: how many were forgotten. The others are how many were kept.
    :ivar still_open: because something of them is not thawed after all.
    :ivar leased: because their lease has not ended yet, and their dead-man switch may still read them.
    :ivar attested: because they were attested since.
    """

    freezes: int = 0
    still_open: int = 0
    leased: int = 0
    attested: int = 0
