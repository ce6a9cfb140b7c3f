"""What is said of a freeze that depends on its strategy, each strategy by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from pg_freeze import Freeze, State, Strategy
from pg_freeze.names import visible

#: What a freeze does to its database, and the style in which that is shown.
Said = tuple[str, str]

STATES: Final[Mapping[State, Said]] = {
    State.DRAINING: ("is being frozen: sessions that may still write are made to go", "bold yellow"),
    State.FROZEN: ("is FROZEN", "bold red"),
    State.THAWING: ("is writable again; sessions that are still read-only are being ended", "bold green"),
    State.THAWED: ("is not frozen", "bold green"),
}


@dataclass(frozen=True, slots=True)
class Words:
    """How a strategy speaks.

    :param headline: what a freeze does to its database.
    :param facts: names and values, beside those that all freezes have.
    :param journal: the database to connect to in psql, to thaw it.
    """

    headline: Callable[[Freeze], Said]
    facts: Callable[[Freeze], dict[str, str]]
    journal: Callable[[Freeze], str] = lambda _: "the maintenance database"


def _state(freeze: Freeze) -> Said:
    return STATES[freeze.state]


def _locked(freeze: Freeze) -> Said:
    if freeze.state is State.THAWED:
        return STATES[freeze.state]
    if freeze.holds:
        return ("is LOCKED: writers wait, readers go on", "bold red")
    return ("is not frozen any more: the sessions that held its locks are gone", "bold green")


def _locks(freeze: Freeze) -> dict[str, str]:
    kept = "the server ends the session that holds them when its client dies, or the lease ends"
    return {"locks": kept} if freeze.holds else {}


def _dead_man(freeze: Freeze) -> dict[str, str]:
    if not freeze.holds:
        return {}
    alive = f"alive (pid {freeze.dead_man_pid}): the server thaws by itself when the lease ends"
    unseen = "none seen by this role; unless another role has one there, only `pg-freeze guard` enforces the lease"
    return {"dead-man switch": unseen if freeze.dead_man_pid is None else alive}


def _read_only(freeze: Freeze) -> dict[str, str]:
    return {**_dead_man(freeze), **({"admits": freeze.admit.value} if freeze.holds else {})}


def _privileges(freeze: Freeze) -> dict[str, str]:
    if freeze.state is State.THAWING:
        return {"privileges": "not all given back: whoever thawed may not grant them; thaw it as a role that may"}
    revoked = f"revoked from {', '.join(freeze.roles) or 'everybody but superusers'}"
    return {**({"privileges": revoked} if freeze.holds else {}), **_dead_man(freeze)}


WORDS: Final[Mapping[Strategy, Words]] = {
    Strategy.READ_ONLY: Words(_state, _read_only),
    Strategy.LOCK: Words(_locked, _locks),
    Strategy.PRIVILEGES: Words(_state, _privileges, lambda freeze: ", ".join(map(visible, freeze.databases))),
}
