"""Every cell of the crash matrix, on PostgreSQL 18: minutes. ``make crash-matrix`` writes docs/crash-matrix.md from it.

See tests/server/test_crash_matrix.py.
"""

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from devtools.pgserver import Server
from devtools.wire import Moment
from tests.exhaustive.crash_table import write
from tests.server.crash_lane import (
    INSIDE,
    OUTSIDE,
    PAUSES,
    SHORT,
    THE_TWO,
    Cell,
    Event,
    Lane,
    LaneInside,
    Outcome,
    check,
    is_poll,
    lanes,
    run,
)

pytestmark = [pytest.mark.pg("==18"), pytest.mark.timeout(900)]
LANES = 10


@pytest.fixture(scope="module")
def every_lane(server: Server) -> Iterator[dict[str, list[Lane]]]:
    with lanes(server, LANES) as outside, lanes(server, LANES, LaneInside) as inside:
        yield {**dict.fromkeys(OUTSIDE, outside), **dict.fromkeys(INSIDE, inside)}


@pytest.fixture(scope="module")
def table(server: Server) -> Iterator[list[Outcome]]:
    outcomes: list[Outcome] = []
    yield outcomes
    if where := os.environ.get("CRASH_MATRIX"):
        write(Path(where), outcomes, server.execute("SHOW server_version")[0][0].split()[0], SHORT)


@pytest.mark.parametrize("event", [Event.KILLED, Event.CUT, Event.TERMINATED])
@pytest.mark.parametrize("act", OUTSIDE + INSIDE)
def test_the_database_thaws_whatever_happens_at_any_statement(every_lane, table, act, event):
    them = every_lane[act]
    outcomes = run(them, [Cell(act, *rest, event) for rest in product(them[0].steps(act), Moment, THE_TWO)])

    table += outcomes
    check(outcomes)


@pytest.mark.parametrize("act", OUTSIDE + INSIDE)
def test_the_database_thaws_when_the_network_falls_silent_and_closes_nothing(every_lane, act):
    """The worst network: neither side hears that the other is gone, and the process hangs until it comes back."""
    them = every_lane[act]
    steps = [step for step in them[0].steps(act) if not is_poll(step)]

    check(run(them, [Cell(act, *rest, Event.SILENT) for rest in product(steps, [Moment.BEFORE], THE_TWO)]))


@pytest.mark.parametrize("act", [act for act in OUTSIDE + INSIDE if act not in ("checkpoint", "resume")])
def test_a_process_that_stands_still_for_longer_than_its_lease_is_not_believed(every_lane, act):
    """A laptop's lid, a paused virtual machine: it goes on later as if nothing had happened."""
    them = every_lane[act]
    steps = [step for step in them[0].steps(act) if not is_poll(step)]
    # The last thing that pause does is to ask whether its freeze stands: it did.
    steps = steps[:-1] if act in PAUSES else steps

    check(run(them, [Cell(act, *rest, Event.STOPPED) for rest in product(steps, [Moment.AFTER], THE_TWO)]))
