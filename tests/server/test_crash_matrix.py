"""A frozen database always thaws: whatever happens, at whichever statement, and whether or not anybody does anything.

A real process runs pause, checkpoint or resume, or a block that is frozen by one of the strategies, through a proxy
(``devtools.wire``) that counts what it sends. At each statement, before it reaches the server and after its answer has
left it, the process is killed, or loses its network, or its sessions are terminated. Then its holder resumes from
elsewhere, or nobody does anything until the lease ends.
"""

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from devtools.pgserver import Server
from devtools.wire import Moment, Step
from tests.server.crash_lane import (
    HOLDS,
    SHORT,
    THE_TWO,
    Aftermath,
    Cell,
    Event,
    Lane,
    LaneInside,
    Outcome,
    check,
    lanes,
    run,
    some_of,
)
from tests.server.crash_table import write

ACTS = ("pause", "checkpoint", "resume", *HOLDS)
LANES = 10


@pytest.fixture(scope="module")
def every_lane(server: Server) -> Iterator[dict[type[Lane], list[Lane]]]:
    with lanes(server, LANES) as outside, lanes(server, LANES, LaneInside) as inside:
        yield {Lane: outside, LaneInside: inside}


@pytest.fixture
def all_lanes(every_lane: dict[type[Lane], list[Lane]], act: str) -> list[Lane]:
    return every_lane[LaneInside if act == "hold by privileges" else Lane]


@pytest.fixture(scope="module")
def table(server: Server) -> Iterator[list[Outcome]]:
    outcomes: list[Outcome] = []
    yield outcomes
    if where := os.environ.get("CRASH_MATRIX"):
        write(Path(where), outcomes, server.version, SHORT)


def cells(steps: list[Step], act: str, event: Event) -> list[Cell]:
    every = [Cell(act, *rest) for rest in product(steps, Moment, [event], THE_TWO)]
    if act in HOLDS and not os.environ.get("CRASH_MATRIX"):
        # Their statements are many. Each of them, one aftermath in turn; the table has both.
        return [cell for number, cell in enumerate(every) if number % 4 in (0, 3)]
    return every


# The other versions get a part of it: the server's side of a lost client has not changed since 14.
@pytest.mark.pg("==18")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("event", [Event.KILLED, Event.CUT, Event.TERMINATED])
@pytest.mark.parametrize("act", ACTS)
def test_the_database_thaws_whatever_happens_at_any_statement(all_lanes, table, act, event):
    outcomes = run(all_lanes, cells(all_lanes[0].steps(act), act, event))

    table += outcomes
    check(outcomes)


@pytest.mark.pg("!=18")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("act", [act for act in ACTS if act not in HOLDS])
def test_the_database_thaws_by_itself_when_the_process_is_killed_at_any_statement(all_lanes, act):
    steps = all_lanes[0].steps(act)

    check(run(all_lanes, [Cell(act, step, Moment.AFTER, Event.KILLED, Aftermath.NOTHING) for step in steps]))


@pytest.mark.pg("!=15,!=16,!=17")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("act", ACTS)
def test_the_database_thaws_when_the_network_falls_silent_and_closes_nothing(all_lanes, act):
    """The worst network: neither side hears that the other is gone, and the process hangs until it comes back."""
    steps = all_lanes[0].steps(act)

    check(
        run(all_lanes, [Cell(act, *rest) for rest in product(some_of(steps), [Moment.BEFORE], [Event.SILENT], THE_TWO)])
    )


@pytest.mark.pg("!=15,!=16,!=17")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("act", ["pause", *HOLDS])
def test_a_process_that_stands_still_for_longer_than_its_lease_is_not_believed(all_lanes, act):
    """A laptop's lid, a paused virtual machine: it goes on later as if nothing had happened."""
    steps = all_lanes[0].steps(act)
    # The last thing that pause does is to ask whether its freeze stands: it did.
    steps = steps[:-1] if act == "pause" else steps

    check(
        run(all_lanes, [Cell(act, *rest) for rest in product(some_of(steps), [Moment.AFTER], [Event.STOPPED], THE_TWO)])
    )
