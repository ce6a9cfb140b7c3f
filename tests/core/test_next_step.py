"""The state machine of a pause, replayed at every interruption. No server."""

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from pg_freeze import Admit, Freeze, State
from pg_freeze.backends import Drained
from pg_freeze.freeze import Seen, Step, next_step

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def freeze(ticket: int, state: State = State.DRAINING, barrier: bool = True) -> Freeze:
    return Freeze(
        token=UUID(int=1),
        ticket=ticket,
        holder="test",
        databases=("app",),
        admit=Admit.READERS,
        state=state,
        requested_at=NOW,
        lease_until=NOW + timedelta(minutes=15),
        barrier_at=NOW if barrier else None,
    )


class World:
    """The journal's row, and what each step would make of it if it succeeded."""

    def __init__(self) -> None:
        self.row: Freeze | None = None

    def apply(self, step: Step, seen: Seen) -> Seen:
        ticket = seen.ticket
        if step is Step.BEGIN:
            self.row = replace(self.row, ticket=ticket) if self.row else freeze(ticket, barrier=False)
        elif step is Step.MARK_BARRIER:
            assert self.row is not None
            self.row = replace(self.row, barrier_at=NOW)
        elif step is Step.DRAIN:
            seen = replace(seen, drained=Drained())
        elif step is Step.RECORD:
            assert self.row is not None
            self.row = replace(self.row, state=State.FROZEN)
        elif step is Step.CHECKPOINT:
            seen = replace(seen, checkpointed=True)
        return replace(seen, freeze=self.row)


def steps(world: World, ticket: int, stop_after: int | None = None, wants_checkpoint: bool = True) -> list[Step]:
    """Run one attempt, dying after so many steps."""
    seen = Seen(ticket, world.row, wants_checkpoint=wants_checkpoint)
    taken: list[Step] = []
    while stop_after is None or len(taken) < stop_after:
        step = next_step(seen)
        taken.append(step)
        assert len(taken) < 20, taken
        if step in (Step.DONE, Step.LOST, Step.ABORT):
            break
        seen = world.apply(step, seen)
    return taken


ALL = [Step.BEGIN, Step.MARK_BARRIER, Step.DRAIN, Step.RECORD, Step.CHECKPOINT, Step.DONE]


def test_an_undisturbed_pause_takes_each_step_once():
    assert steps(World(), 1) == ALL


def test_without_checkpoint_that_step_is_left_out():
    assert steps(World(), 1, wants_checkpoint=False) == [step for step in ALL if step is not Step.CHECKPOINT]


@pytest.mark.parametrize("died_after", range(len(ALL)))
def test_after_a_death_at_any_step_the_next_attempt_adopts_and_drains_again(died_after):
    world = World()
    steps(world, 1, died_after)

    taken = steps(world, 2)

    assert taken[0] is Step.BEGIN
    assert Step.DRAIN in taken
    assert taken[-1] is Step.DONE
    assert world.row is not None
    assert (world.row.ticket, world.row.state) == (2, State.FROZEN)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(range(len(ALL)), repeat=2)))
def test_after_two_deaths_the_third_attempt_still_comes_to_its_end(first, second):
    world = World()
    steps(world, 1, first)
    steps(world, 2, second)

    assert steps(world, 3)[-1] is Step.DONE


@pytest.mark.parametrize("taken_over_at", range(1, len(ALL)))
def test_an_attempt_that_is_taken_over_at_any_step_is_lost(taken_over_at):
    world = World()
    seen = Seen(1, None, wants_checkpoint=True)
    for _ in range(taken_over_at):
        seen = world.apply(next_step(seen), seen)
    assert world.row is not None
    world.row = replace(world.row, ticket=2)

    assert next_step(replace(seen, freeze=world.row)) is Step.LOST


@pytest.mark.parametrize("state", [State.THAWING, State.THAWED])
@pytest.mark.parametrize("thawed_at", range(1, len(ALL)))
def test_an_attempt_whose_freeze_is_thawed_at_any_step_is_lost_and_never_done(thawed_at, state):
    world = World()
    seen = Seen(1, None, wants_checkpoint=True)
    for _ in range(thawed_at):
        seen = world.apply(next_step(seen), seen)
    assert world.row is not None

    assert next_step(replace(seen, freeze=replace(world.row, state=state))) is Step.LOST


def test_a_row_that_is_gone_after_the_drain_is_lost():
    assert next_step(Seen(1, None, drained=Drained())) is Step.LOST


def test_nothing_is_recorded_or_done_before_the_drain_and_no_drain_begins_before_the_barrier():
    seen = [
        Seen(2, row, drained, wants, checkpointed)
        for row, drained, wants, checkpointed in itertools.product(
            [
                None,
                *(
                    freeze(ticket, state, barrier)
                    for ticket, state, barrier in itertools.product((1, 2, 3), State, (False, True))
                ),
            ],
            [None, Drained(), Drained(timed_out=True)],
            [False, True],
            [False, True],
        )
    ]
    for one in seen:
        step = next_step(one)
        if step in (Step.RECORD, Step.CHECKPOINT, Step.DONE):
            assert one.drained is not None
            assert not one.drained.timed_out
        if step in (Step.DRAIN, Step.RECORD, Step.CHECKPOINT, Step.DONE, Step.ABORT):
            assert one.freeze is not None
            assert one.freeze.holds
            assert one.freeze.ticket == one.ticket
            assert one.freeze.barrier_at is not None
        if step is Step.DONE:
            assert one.freeze is not None
            assert one.freeze.state is State.FROZEN
            assert one.checkpointed or not one.wants_checkpoint


def test_a_drain_that_timed_out_aborts():
    assert next_step(Seen(1, freeze(1), Drained(timed_out=True))) is Step.ABORT
