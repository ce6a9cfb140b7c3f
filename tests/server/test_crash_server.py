"""A frozen database thaws even if the server goes down, its disk fills up, or the network fails during the undo."""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pg_freeze as core
from devtools import asking
from devtools.binaries import temp_root
from devtools.pgserver import Server
from devtools.wire import Moment, Step
from tests.server.clients import settings_of, wait_until
from tests.server.crash_lane import INSIDE, SHORT, Aftermath, Event, Lane, LaneInside, check, lanes, run

# What is tested here does not differ between the versions; the oldest and the newest are enough.
pytestmark = pytest.mark.pg("!=15,!=16,!=17")
ACTS = ("pause", "checkpoint", "resume")


@contextmanager
def servers_with_a_lane(server_factory: Callable[..., Server], kind: type[Lane]) -> Iterator[list[Lane]]:
    with ExitStack() as stack:
        yield [stack.enter_context(lanes(server_factory(), 1, kind))[0] for _ in range(3)]


crashes = pytest.mark.parametrize(
    ("event", "aftermath"), [(Event.CRASHED, Aftermath.RESUME), (Event.BOTH, Aftermath.GUARD)], ids=["resume", "guard"]
)


@pytest.mark.thorough
@pytest.mark.timeout(300)
@crashes
def test_a_server_that_crashes_at_any_statement_thaws_after_its_restart(server_factory, event, aftermath):
    """A dead-man switch does not survive that; the holder's resume does, and so does the guard when the lease ends."""
    with servers_with_a_lane(server_factory, Lane) as them:
        cells = them[0].representatives(ACTS, [event])

        check(run(them, [replace(cell, moment=Moment.AFTER, aftermath=aftermath) for cell in cells]))


@pytest.mark.thorough
@pytest.mark.timeout(300)
@crashes
def test_a_server_that_crashes_while_privileges_are_revoked_gives_them_back_after_its_restart(
    server_factory, event, aftermath
):
    """Neither resume nor guard is told that the journal is in the database itself: the mark leads there."""
    with servers_with_a_lane(server_factory, LaneInside) as them:
        cells = them[0].representatives(INSIDE, [event])
        frozen = next(number for number, cell in enumerate(cells) if "begin_freeze" in cell.step.text)

        check(run(them, [replace(cell, moment=Moment.AFTER, aftermath=aftermath) for cell in cells[frozen - 3 :]]))


@pytest.fixture(scope="module")
def all_lanes(server) -> Iterator[list[Lane]]:
    with lanes(server, 6) as them:
        yield them


def _abort(lane: Lane, holder: str, trap: tuple[Step, Moment, bool] | None = None) -> tuple[str | None, list[Step]]:
    """Let a pause run into its drain timeout, so that it undoes everything; return its error, and what it sent."""
    options = {**lane.options("pause", holder, SHORT), "drain_timeout": 0.2, "on_drain_timeout": "abort"}
    with lane.server.connect_factory("app", lane.databases[0])() as busy, busy.transaction():
        busy.execute("INSERT INTO t VALUES (1)")
        lane.proxy.reset()
        if trap is not None:
            step, moment, for_good = trap

            def cut() -> bool:
                lane.proxy.cut()
                if not for_good:
                    lane.proxy.mend()
                return False

            lane.proxy.trap(step, moment, cut)
        lane.warm.start("pause", lane.dsn, **options)
        return lane.warm.wait().error, list(lane.proxy.steps)


@pytest.mark.timeout(300)
def test_a_network_that_fails_during_the_undo_keeps_nothing_frozen(all_lanes):
    error, steps = _abort(all_lanes[0], "dry run")
    assert error == "DrainTimeout"
    undo = steps[max(number for number, step in enumerate(steps) if step.text == "connect") :]
    assert len(undo) >= 5
    places = [(step, moment, for_good) for step in undo for moment in Moment for for_good in (False, True)]

    def play(lane: Lane, place: tuple[Step, Moment, bool]) -> str | None:
        holder = f"undo {lane.databases[0]}"
        error, _ = _abort(lane, holder, place)
        assert lane.proxy.sprung.is_set(), place
        if not place[2] and (error != "DrainTimeout" or lane.open()):
            return f"{place}: tried again, but ended with {error}; {lane.open()}"
        # Once it is thawed, a statement may take no longer than usual again: of that nothing depends.
        undone = place[0].text.startswith("SET statement_timeout = '60s'")
        if place[2] and error != ("DrainTimeout" if undone else "ThawFailed"):
            return f"{place}: could not be undone, but ended with {error}"
        wait_until(lambda: not lane.open())
        return None if lane.settings() == lane.prior else f"{place}: settings were {lane.prior}, are {lane.settings()}"

    with ThreadPoolExecutor(len(all_lanes)) as pool:
        shares = [places[number :: len(all_lanes)] for number in range(len(all_lanes))]
        done = pool.map(lambda pair: [play(pair[0], place) for place in pair[1]], zip(all_lanes, shares, strict=True))
        assert [wrong for share in done for wrong in share if wrong] == []


@pytest.fixture
def small_volume() -> Iterator[Path]:
    """A file system of its own, which can really be filled up."""
    with tempfile.TemporaryDirectory(prefix="pgf-", dir=temp_root()) as name:
        where = Path(name)
        where.chmod(0o711)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m,mode=755", "tmpfs", str(where)], check=True)
        try:
            yield where
        finally:
            subprocess.run(["umount", "--lazy", str(where)], check=True)


def fill(volume: Path) -> Path:
    """Leave no room on the volume; return the file that takes it."""
    ballast = volume / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


def exhausted(connect: core.Connect, database: str, *acts: Callable[..., Any], length: int = 450) -> core.FreezeError:
    """Repeat *acts* until the journal's pages have no room left; return the error of the first that finds none."""
    while True:
        # Random, so that it cannot be compressed.
        holder = os.urandom(length).hex()
        try:
            for act in acts:
                act(connect, databases=[database], holder=holder)
        except core.FreezeError as error:
            return error


@pytest.fixture
def server_on_a_small_volume(server_factory, small_volume) -> Server:
    server: Server = server_factory(
        data=small_volume / "data", settings={"max_wal_size": "48MB", "min_wal_size": "32MB"}
    )
    return server


def test_a_full_disk_is_named_and_leaves_nothing_frozen(
    server_on_a_small_volume, small_volume, connect_to, new_database, app_connect
):
    server, connect = server_on_a_small_volume, connect_to(server_on_a_small_volume)
    database = new_database(server)
    core.install(connect)
    prior = settings_of(server)
    ballast = fill(small_volume)
    refused = exhausted(connect, database, asking.pause, core.resume)

    assert "No space left on device" in str(refused)
    server.execute("CALL pgfreeze.thaw_all()")
    assert settings_of(server) == prior
    ballast.unlink()
    asking.pause(connect, databases=[database], holder="next")
    core.resume(connect, databases=[database], holder="next")
    assert settings_of(server) == prior
    app_connect(database, server=server).execute("CREATE TABLE t ()")


def test_a_full_disk_does_not_keep_a_database_frozen(server_on_a_small_volume, small_volume, connect_to, new_database):
    """A resume that cannot note that it came thaws all the same, and then says what it could not do."""
    server, connect = server_on_a_small_volume, connect_to(server_on_a_small_volume)
    database, other = new_database(server), new_database(server)
    core.install(connect)
    prior = settings_of(server)
    asking.pause(connect, databases=[database], holder="nightly")
    fill(small_volume)
    for length in (450, 4):
        exhausted(connect, other, core.resume, length=length)

    with pytest.raises(core.FreezeError, match="No space left on device") as failed:
        core.resume(connect, databases=[database], holder="nightly")

    assert not isinstance(failed.value, core.ThawFailed)
    assert settings_of(server) == prior
