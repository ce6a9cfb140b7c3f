"""A server that crashes after any statement, on PostgreSQL 18. See tests/server/test_crash_server.py."""

import pytest

from devtools.wire import Moment
from tests.server.crash_lane import INSIDE, Cell, Lane, LaneInside, check, is_poll, run
from tests.server.test_crash_server import ACTS, crashes, servers_with_a_lane

pytestmark = [pytest.mark.pg("==18"), pytest.mark.timeout(900)]


@crashes
@pytest.mark.parametrize(("kind", "acts"), [(Lane, ACTS), (LaneInside, INSIDE)], ids=["outside", "inside"])
def test_the_database_thaws_after_the_restart(server_factory, kind, acts, event, aftermath):
    with servers_with_a_lane(server_factory, kind) as them:
        steps = [(act, step) for act in acts for step in them[0].steps(act) if not is_poll(step)]

        check(run(them, [Cell(act, step, Moment.AFTER, aftermath, event) for act, step in steps]))
