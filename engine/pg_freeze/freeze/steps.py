"""The state machine of a pause: from what was seen to the next step, with no side effect."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pg_freeze.backends import Drained
from pg_freeze.model import Freeze, State


class Step(StrEnum):
    """What a pause does next."""

    BEGIN = "begin"
    MARK_BARRIER = "mark the barrier"
    DRAIN = "drain"
    ABORT = "abort"
    RECORD = "record"
    CHECKPOINT = "checkpoint"
    DONE = "done"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a pause knows when it decides: the journal's row, and what this attempt has done itself."""

    ticket: int
    freeze: Freeze | None
    drained: Drained | None = None
    wants_checkpoint: bool = False
    checkpointed: bool = False


def next_step(seen: Seen) -> Step:  # noqa: PLR0911 - one line a rule
    """Return the next step of a pause.

    A row of an older ticket is one to adopt, which `BEGIN` does. A row that no longer holds, or that a newer ticket
    has taken over, is lost.
    """
    freeze = seen.freeze
    if freeze is None or freeze.ticket < seen.ticket:
        return Step.BEGIN if seen.drained is None else Step.LOST
    if not freeze.holds or freeze.ticket > seen.ticket:
        return Step.LOST
    if freeze.barrier_at is None:
        return Step.MARK_BARRIER
    if seen.drained is None:
        return Step.DRAIN
    if seen.drained.timed_out:
        return Step.ABORT
    if freeze.state is State.DRAINING:
        return Step.RECORD
    if seen.wants_checkpoint and not seen.checkpointed:
        return Step.CHECKPOINT
    return Step.DONE
