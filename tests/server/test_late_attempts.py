"""A pause that comes late, because it or one of its statements was held up, neither freezes nor reports success.

Deterministic: ``devtools.wire`` holds up each statement of a real process in turn, on its way to the server or with its
answer on the way back (there the process itself is stopped), lets something happen, and then lets it go on.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import pytest

import pg_freeze as core
from devtools.warm import Ended
from devtools.wire import Moment, Step
from tests.server.clients import is_alive
from tests.server.crash_lane import LONG, Lane, is_poll, lanes

# What is tested here does not differ between the versions; the oldest and the newest are enough.
pytestmark = [pytest.mark.pg("!=15,!=16,!=17"), pytest.mark.timeout(300)]

TOO_LATE = ("LeaseLost", "Overtaken")


@pytest.fixture(scope="module")
def all_lanes(server) -> Iterator[list[Lane]]:
    with lanes(server, 8) as them:
        yield them


@contextmanager
def held_up(lane: Lane, step: Step, moment: Moment, holder: str) -> Iterator[Callable[[], Ended]]:
    """Start a pause and hold it up at *step*; yields what lets it go on and returns how it ended."""
    go_on = threading.Event()

    def hold() -> bool:
        if moment is Moment.AFTER:
            lane.warm.signal(signal.SIGSTOP)
        else:
            go_on.wait(60)
        return True

    def release() -> Ended:
        # Long beside the time that the attempt has taken itself, so that its age cannot hide how late it is.
        time.sleep(0.5)
        go_on.set()
        lane.warm.signal(signal.SIGCONT)
        return lane.warm.wait()

    lane.proxy.reset()
    lane.proxy.trap(step, moment, hold)
    lane.warm.start("pause", lane.dsn, **lane.options("pause", holder, LONG))
    try:
        assert lane.proxy.sprung.wait(30), "the step never came"
        yield release
    finally:
        go_on.set()
        if lane.warm.pid:
            lane.warm.signal(signal.SIGKILL)
            lane.warm.wait()


def everywhere(all_lanes: list[Lane], scene: Callable[[Lane, Step, Moment, str, bool], str | None]) -> list[str]:
    """Play *scene* at every statement of a pause; return what went wrong."""
    steps = [step for step in all_lanes[0].steps("pause") if not is_poll(step)]
    places = [(step, moment) for step in steps for moment in Moment]
    free: SimpleQueue[Lane] = SimpleQueue()
    for lane in all_lanes:
        free.put(lane)

    def play(number: int) -> str | None:
        lane, (step, moment) = free.get(), places[number]
        where = f"held up {moment} step {step.occurrence} of {step.text[:80]!r}"
        try:
            wrong = scene(lane, step, moment, f"late {number} {lane.databases[0]}", number == len(places) - 1)
            return wrong and f"{where}: {wrong}"
        except (AssertionError, core.FreezeError) as error:
            return f"{where}: {error!r}"
        finally:
            core.resume(lane.connect, databases=lane.databases, holder="clean-up", force=True)
            free.put(lane)

    with ThreadPoolExecutor(len(all_lanes)) as pool:
        return [wrong for wrong in pool.map(play, range(len(places))) if wrong]


def _open_reader(lane: Lane) -> Any:
    session = lane.application()
    assert session is not None
    return session


def test_a_pause_held_up_while_its_holder_resumes_can_neither_freeze_nor_report_success(all_lanes):
    def scene(lane: Lane, step: Step, moment: Moment, holder: str, last: bool) -> str | None:
        with held_up(lane, step, moment, holder) as let_go_on:
            lane.resume(holder)
            with _open_reader(lane) as session:
                ended = let_go_on()
                if lane.open() or lane.settings() != lane.prior:
                    return f"froze after the resume: {lane.freezes()[-1]}"
                if not is_alive(session):
                    return "a session was ended after the resume"
        if ended.succeeded and last:
            # The journal's answer was true when it was given. Whoever builds on it asks again.
            with pytest.raises(core.LeaseLost):
                core.checkpoint(lane.connect, databases=lane.databases, holder=holder)
            return None
        return None if ended.error in TOO_LATE else f"it {ended}"

    assert everywhere(all_lanes, scene) == []


@pytest.mark.thorough
def test_a_pause_held_up_while_a_newer_attempt_freezes_leaves_that_freeze_alone(all_lanes):
    def scene(lane: Lane, step: Step, moment: Moment, holder: str, last: bool) -> str | None:
        with held_up(lane, step, moment, holder) as let_go_on:
            # An attempt knows when it began to as much as the answer to its first question takes.
            time.sleep(1)
            newer = lane.pause(holder)
            with _open_reader(lane) as session:
                ended = let_go_on()
                if not is_alive(session):
                    return "a session was ended after the newer attempt had drained"
            if [(row[0], row[2]) for row in lane.open()] != [(str(newer.token), "frozen")]:
                return f"the newer freeze is gone: {lane.freezes()[-1]}"
            core.checkpoint(lane.connect, databases=lane.databases, holder=holder)
            lane.resume(holder)
        if lane.settings() != lane.prior:
            return f"settings were {lane.prior}, are {lane.settings()}"
        return None if ended.error in TOO_LATE or (ended.succeeded and last) else f"it {ended}"

    assert everywhere(all_lanes, scene) == []
