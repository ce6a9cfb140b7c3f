"""A frozen database always thaws: whatever happens, at whichever statement, and whether or not anybody does anything.

A real process runs pause, checkpoint or resume through a proxy (``devtools.wire``) that counts what it sends. At each
statement, before it reaches the server and after its answer has left it, the process is killed, or loses its network,
or its sessions are terminated. Then its holder resumes from elsewhere, or nobody does anything until the lease ends.
"""

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from devtools.pgserver import Server
from devtools.wire import Moment, Step
from tests.server.crash_lane import SHORT, THE_TWO, Aftermath, Cell, Event, Lane, Outcome, check, lanes, run
from tests.server.crash_table import write

ACTS = ("pause", "checkpoint", "resume")
LANES = 10


@pytest.fixture(scope="module")
def all_lanes(server: Server) -> Iterator[list[Lane]]:
    with lanes(server, LANES) as them:
        yield them


@pytest.fixture(scope="module")
def table(server: Server) -> Iterator[list[Outcome]]:
    outcomes: list[Outcome] = []
    yield outcomes
    if where := os.environ.get("CRASH_MATRIX"):
        write(Path(where), outcomes, server.version, SHORT)


def cells(steps: list[Step], act: str, event: Event) -> list[Cell]:
    return [Cell(act, *rest) for rest in product(steps, Moment, [event], THE_TWO)]


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
@pytest.mark.parametrize("act", ACTS)
def test_the_database_thaws_by_itself_when_the_process_is_killed_at_any_statement(all_lanes, act):
    steps = all_lanes[0].steps(act)

    check(run(all_lanes, [Cell(act, step, Moment.AFTER, Event.KILLED, Aftermath.NOTHING) for step in steps]))


@pytest.mark.pg("!=15,!=16,!=17")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("act", ACTS)
def test_the_database_thaws_when_the_network_falls_silent_and_closes_nothing(all_lanes, act):
    """The worst network: neither side hears that the other is gone, and the process hangs until it comes back."""
    steps = all_lanes[0].steps(act)
    some = steps[:: max(1, len(steps) // 8)] + steps[-2:]

    check(run(all_lanes, [Cell(act, step, Moment.BEFORE, Event.SILENT, then) for step in some for then in THE_TWO]))
