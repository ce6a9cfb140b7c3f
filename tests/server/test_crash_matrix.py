"""A frozen database always thaws: whatever happens, at whichever statement, and whether or not anybody does anything.

A real process runs pause, checkpoint or resume, or a block that is frozen by one of the strategies, through a proxy
(``devtools.wire``) that counts what it sends. At each statement, before it reaches the server or after its answer has
left it, the process is killed or stopped, or loses its network, or its sessions are terminated. Then its holder resumes
from elsewhere, or nobody does anything until the lease ends.

Here: one cell for each (statement, state of the journal, event, strategy). ``make crash-matrix`` takes every cell.
"""

import pytest

from tests.server.crash_lane import INSIDE, OUTSIDE, Event, Lane, LaneInside, check, lanes, run

LANES = 8
pytestmark = pytest.mark.timeout(900)


@pytest.mark.pg("==18")
@pytest.mark.parametrize(("kind", "acts"), [(Lane, OUTSIDE), (LaneInside, INSIDE)], ids=["outside", "inside"])
@pytest.mark.parametrize(
    "events",
    [
        pytest.param([Event.KILLED], id="killed"),
        pytest.param(
            [Event.CUT, Event.TERMINATED, Event.SILENT, Event.STOPPED], id="otherwise", marks=pytest.mark.thorough
        ),
    ],
)
def test_the_database_thaws_whatever_happens_at_any_kind_of_statement(server, kind, acts, events):
    with lanes(server, LANES, kind) as them:
        check(run(them, them[0].representatives(acts, events)))


# The server's side of a lost client has not changed since 14.
@pytest.mark.pg("!=18")
@pytest.mark.every_version
def test_the_database_thaws_when_the_process_is_killed_at_any_kind_of_statement(server):
    with lanes(server, LANES) as them:
        check(run(them, them[0].representatives(("pause", "checkpoint", "resume"), [Event.KILLED])))
