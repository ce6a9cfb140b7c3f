"""What a caller may ask for: checked here once, before anything is touched."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final, TypeVar

from pg_freeze import strategies
from pg_freeze.control import Control
from pg_freeze.durations import Duration, duration
from pg_freeze.errors import FreezeRefused, InvalidRequest
from pg_freeze.model import DRAIN_TIMEOUT, LEASE, LOCK, READ_ONLY, Admit, OnDrainTimeout

NO_TIME: Final = timedelta(0)
#: The journal has an index on holders, whose entries have room for about 2,700 bytes.
_LONGEST_HOLDER: Final = 1000
_Choice = TypeVar("_Choice", bound=StrEnum)


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeRequest:
    """A freeze, as asked for and found to make sense. Built once, at the edge, by :meth:`of`; then handed on whole.

    ``began`` is when the attempt began, by :func:`time.monotonic`.
    """

    databases: tuple[str, ...]
    holder: str
    strategy: str
    lease: timedelta
    drain_timeout: timedelta
    on_drain_timeout: OnDrainTimeout
    admit: Admit
    roles: tuple[str, ...]
    checkpoint: bool
    switch_wal: bool
    strict: bool
    dead_man: bool
    began: float

    @classmethod
    def of(
        cls,
        databases: Sequence[str],
        holder: str,
        *,
        strategy: str = READ_ONLY,
        lease: Duration = LEASE,
        drain_timeout: Duration = DRAIN_TIMEOUT,
        on_drain_timeout: OnDrainTimeout | str = OnDrainTimeout.TERMINATE,
        admit: Admit | str = Admit.READERS_ONCE_DRAINED,
        roles: Sequence[str] = (),
        checkpoint: bool = False,
        switch_wal: bool = False,
        strict: bool = False,
        dead_man: bool = True,
        age: timedelta = NO_TIME,
    ) -> FreezeRequest:
        """Return the request that these keywords mean.

        :param databases: the databases to freeze, in one transaction.
        :param holder: who owns the freeze.
        :param strategy: ``lock`` makes writers wait and ends nobody; ``read-only`` refuses writes and ends sessions;
            ``privileges`` revokes the privileges to write, in one database.
        :param lease: after this time the server thaws by itself; counted from the freeze, or its adoption.
        :param drain_timeout: how long a transaction that was open at the barrier, or is in the way, may go on.
        :param on_drain_timeout: what to do then: ``terminate`` what is left, or ``abort``: undo everything and fail.
        :param admit: for the strategy ``read-only``: who may connect meanwhile, ``readers-once-drained``, ``readers``
            or ``nobody``.
        :param roles: for the strategy ``privileges``: whose privileges to write to revoke; by default everybody's.
        :param checkpoint: make the final checkpoint as well.
        :param switch_wal: switch to a new WAL file after the final checkpoint; implies *checkpoint*.
        :param strict: refuse what preflight only warns of.
        :param dead_man: whether a dead-man switch must watch; without one only ``thaw_expired()`` enforces the lease.
        :param age: how long ago this attempt began. A resume of the same holder since then, or an attempt that began
            later, voids it.
        :raises InvalidRequest: if they make no sense.
        """
        began = time.monotonic() - age.total_seconds()
        chosen = strategies.named(str(strategy))
        admits = member(Admit, admit, "admit")
        if admits is not Admit.NOBODY and "admit" not in chosen.options:
            admits = Admit.READERS
        return cls(
            databases=names_of(databases, holder),
            holder=holder,
            strategy=chosen.name,
            lease=duration("lease", lease),
            drain_timeout=duration("drain_timeout", drain_timeout),
            on_drain_timeout=member(OnDrainTimeout, on_drain_timeout, "on_drain_timeout"),
            admit=admits,
            roles=tuple(dict.fromkeys([roles] if isinstance(roles, str) else roles)),
            checkpoint=checkpoint or switch_wal,
            switch_wal=switch_wal,
            strict=strict,
            dead_man=dead_man,
            began=began,
        )

    @classmethod
    def for_block(cls, databases: Sequence[str], holder: str, **options: Any) -> FreezeRequest:
        """Return :meth:`of` with the defaults of a block: the strategy ``lock``, and the final checkpoint."""
        return cls.of(databases, holder, **{"strategy": LOCK, "checkpoint": True, **options})

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        strategy = strategies.named(self.strategy)
        if self.roles and "roles" not in strategy.options:
            raise InvalidRequest(f"roles can only be chosen for the strategy privileges, not for {self.strategy}")
        if self.admit is Admit.NOBODY and "admit" not in strategy.options:
            raise InvalidRequest(
                f"admit=nobody closes the database, which the strategy {self.strategy} does not: use strategy=read-only"
            )
        if len(self.databases) > 1 and strategy.own_journal:
            raise InvalidRequest(
                f"the strategy {self.strategy} freezes one database, from inside: give one, or use another strategy"
            )
        check_positive(lease=self.lease, drain_timeout=self.drain_timeout)
        if self.lease <= self.drain_timeout:
            raise InvalidRequest(
                f"the lease ({self.lease.total_seconds():g} s) must be longer than the drain timeout "
                f"({self.drain_timeout.total_seconds():g} s), or it would end while the database drains"
            )


#: The keywords of :meth:`FreezeRequest.of` that are options of a freeze, as verbs and operators name them too.
OPTIONS: Final = frozenset(one.name for one in fields(FreezeRequest)) - {"databases", "holder", "began"}


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
