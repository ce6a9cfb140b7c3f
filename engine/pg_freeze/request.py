"""What a caller may ask for: checked here once, before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final, TypeVar

from pg_freeze.control import Control
from pg_freeze.durations import Duration, duration
from pg_freeze.errors import FreezeRefused, InvalidRequest
from pg_freeze.model import Admit, Kind, OnDrainTimeout, Strategy

NO_TIME: Final = timedelta(0)
#: The journal has an index on holders, whose entries have room for about 2,700 bytes.
_LONGEST_HOLDER: Final = 1000
_Choice = TypeVar("_Choice", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class PauseRequest:
    """A pause, as asked for and found to make sense."""

    databases: tuple[str, ...]
    holder: str
    lease: timedelta
    drain_timeout: timedelta
    on_drain_timeout: OnDrainTimeout
    admit: Admit
    checkpoint: bool
    switch_wal: bool
    strict: bool
    dead_man: bool
    strategy: Strategy
    roles: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        """What kind of freeze is asked for."""
        return Kind(self.strategy, self.admit, frozenset(self.roles))

    @classmethod
    def of(
        cls,
        databases: Sequence[str],
        holder: str,
        *,
        lease: Duration,
        drain_timeout: Duration,
        on_drain_timeout: OnDrainTimeout | str,
        admit: Admit | str,
        checkpoint: bool,
        switch_wal: bool,
        strict: bool,
        dead_man: bool,
        strategy: Strategy | str = Strategy.READ_ONLY,
        roles: Sequence[str] = (),
    ) -> PauseRequest:
        """Return the request that a caller's keywords mean; raise InvalidRequest if they make no sense."""
        return cls(
            databases=names_of(databases, holder),
            holder=holder,
            lease=duration("lease", lease),
            drain_timeout=duration("drain_timeout", drain_timeout),
            on_drain_timeout=member(OnDrainTimeout, on_drain_timeout, "on_drain_timeout"),
            # Privileges keep nobody from connecting.
            admit=Admit.READERS if strategy == Strategy.PRIVILEGES else member(Admit, admit, "admit"),
            checkpoint=checkpoint or switch_wal,
            switch_wal=switch_wal,
            strict=strict,
            dead_man=dead_man,
            strategy=member(Strategy, strategy, "strategy"),
            roles=tuple(dict.fromkeys([roles] if isinstance(roles, str) else roles)),
        )

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.roles and self.strategy is not Strategy.PRIVILEGES:
            raise InvalidRequest(f"roles can only be chosen for the strategy privileges, not for {self.strategy}")
        if len(self.databases) > 1 and self.strategy is Strategy.PRIVILEGES:
            raise InvalidRequest(
                "the strategy privileges freezes one database, from inside: give one, or use another strategy"
            )
        if self.admit is Admit.NOBODY and self.strategy is not Strategy.READ_ONLY:
            raise InvalidRequest(
                f"admit=nobody closes the database, which the strategy {self.strategy} does not: use strategy=read-only"
            )
        check_positive(lease=self.lease, drain_timeout=self.drain_timeout)
        if self.lease <= self.drain_timeout:
            raise InvalidRequest(
                f"the lease ({self.lease.total_seconds():g} s) must be longer than the drain timeout "
                f"({self.drain_timeout.total_seconds():g} s), or it would end while the database drains"
            )


def names_of(databases: Sequence[str], holder: str) -> tuple[str, ...]:
    """Return the databases without repetitions.

    :raises InvalidRequest: for no database, an empty name, a character that PostgreSQL cannot have, or no holder.
    """
    if isinstance(databases, str):
        databases = [databases]
    names = tuple(dict.fromkeys(databases))
    if not names:
        raise InvalidRequest("no database was named: give at least one")
    for name in (*names, holder):
        # Lone surrogates are what Python makes of bytes that are not text.
        if not name or not name.strip() or "\0" in name or any("\ud800" <= char <= "\udfff" for char in name):
            raise InvalidRequest(f"{name!r} is not a name: databases and holder must be non-empty, valid text")
    if len(holder.encode()) > _LONGEST_HOLDER:
        raise InvalidRequest(f"the holder is longer than {_LONGEST_HOLDER} bytes: {holder[:60]!r}…")
    return names


def check_known(conn: Control, names: Sequence[str]) -> None:
    """Raise FreezeRefused for a database that the server does not have."""
    rows = conn.execute("SELECT datname::text FROM pg_database WHERE datname::text = ANY (%s)", (list(names),))
    missing = sorted(set(names) - {row[0] for row in rows})
    if missing:
        raise FreezeRefused(f"there is no database {', '.join(map(repr, missing))} on this server; psql -l lists them")


def check_positive(**durations: timedelta) -> None:
    """Raise InvalidRequest for a zero or negative time."""
    for name, value in durations.items():
        if value <= NO_TIME:
            raise InvalidRequest(f"{name} is {value.total_seconds():g} s: it must be more than zero")


def check_not_negative(**durations: timedelta) -> None:
    """Raise InvalidRequest for a negative time."""
    for name, value in durations.items():
        if value < NO_TIME:
            raise InvalidRequest(f"{name} is {value.total_seconds():g} s: it must not be negative")


def member(kind: type[_Choice], value: str, name: str) -> _Choice:
    """Return *value* as a member of *kind*.

    :raises InvalidRequest: naming the choices.
    """
    try:
        return kind(value)
    except ValueError:
        raise InvalidRequest(f"{name} is {value!r}: it must be one of {', '.join(kind)}") from None
