"""What becomes of a database when a task is disturbed that freezes it for the time of its function."""

import json
import os
import signal

import pytest

from airflow_pg_freeze.snapshots import tags as tagging
from devtools import aws
from tests.airflow.cloud import make_volumes, snapshots_of
from tests.e2e.processes import SLOWNESS, eventually
from tests.e2e.scene import PATIENCE, SHORT_LEASE, gone

pytestmark = [
    pytest.mark.timeout(600 * SLOWNESS),
    pytest.mark.parametrize("strategy", ["lock", "read-only", "privileges"]),
]
#: What ends a freeze whose process is gone without a word.
BY_THE_SERVER = {"lock": "lock session ended", "read-only": "lease ended", "privileges": "lease ended"}


def told(strategy, reason):
    """Return what the journal may say of a task that ended its freeze for *reason*.

    Locks are let go first: the dead-man switch may be the first to see it, and journal it.
    """
    return (reason, "lock session ended") if strategy == "lock" else (reason,)


def journalled(scene):
    """Return what ended the freeze, which of locks is told a little after they are gone."""
    return eventually(scene.thawed_by, f"the end of the freeze of {scene}", PATIENCE)


def test_a_failed_function_is_thawed_at_once_and_a_retry_freezes_anew(play, tell, strategy):
    scene = play(f"{strategy}_retried", "the snapshot fails, and is retried").start()
    scene.until_snapshot()
    scene.order("fail")
    scene.until("snapshot", "up_for_retry")
    assert scene.writable()
    scene.order("ok")

    assert scene.end() == "success"
    assert scene.found() == ["frozen", "frozen"]
    failed, succeeded = (freeze["thawed_by"] for freeze in scene.freezes())
    assert failed in told(strategy, "undone: RuntimeError")
    assert succeeded in told(strategy, "end of the block")
    assert scene.can_write()
    tell(scene, writable="at once, by the task itself")


def test_a_task_killed_with_9_is_red_and_thawed_by_the_server(play, tell, strategy):
    scene = play(strategy, "the snapshot's process is killed (-9)", lease=SHORT_LEASE).start()
    scene.until_snapshot()
    scene.kill("snapshot")

    assert scene.end() == "failed"
    assert scene.writable()
    assert journalled(scene) == BY_THE_SERVER[strategy]
    tell(scene)


def test_a_task_killed_with_9_is_retried_with_a_freeze_that_stands(play, tell, strategy):
    scene = play(f"{strategy}_retried", "the snapshot's process is killed (-9), and retried").start()
    scene.until_snapshot()
    scene.kill("snapshot")
    scene.until("snapshot", "up_for_retry")
    scene.order("ok")

    assert scene.end() == "success"
    assert scene.found() == ["frozen", "frozen"]
    # A freeze that needs no process still stands, and is adopted.
    assert len(scene.freezes()) == (2 if strategy == "lock" else 1)
    assert scene.thawed_by() in told(strategy, "end of the block")
    assert scene.can_write()
    tell(scene)


def test_a_task_killed_with_its_supervisor_is_red_and_thawed_by_the_server(play, tell, strategy):
    scene = play(strategy, "the snapshot's process and supervisor are killed (-9)", lease=SHORT_LEASE).start()
    scene.until_snapshot()
    os.kill(scene.kill("snapshot", supervisor=True), signal.SIGKILL)

    assert scene.writable()
    assert journalled(scene) == BY_THE_SERVER[strategy]
    assert scene.end() == "failed"
    tell(scene)


def test_a_task_that_outlives_its_supervisor_is_red_and_ends_its_own_freeze(play, tell, strategy):
    scene = play(strategy, "the snapshot's supervisor is killed (-9)").start()
    scene.until_snapshot()
    orphan = scene.kill("snapshot", supervisor=True)

    assert scene.end() == "failed"
    assert not scene.can_write(), "the snapshot goes on, under its freeze"
    scene.event_now(" after the function's end")
    scene.order("ok")
    gone(orphan)
    assert scene.writable()
    assert scene.states()["snapshot"] == "failed"
    tell(scene)


@pytest.mark.parametrize("what", ["task", "run"])
def test_a_task_or_run_marked_failed_is_thawed_by_the_task(play, tell, strategy, what):
    scene = play(strategy, f"a person marks the {what} failed during the snapshot").start()
    scene.until_snapshot()
    if what == "run":
        scene.mark_run("failed")
    else:
        scene.mark_task("snapshot", "failed")

    assert scene.end() == "failed"
    assert scene.writable()
    assert journalled(scene) in told(strategy, "undone: Terminated")
    tell(scene)


def test_a_task_cleared_while_it_runs_is_thawed_and_freezes_anew(play, tell, strategy):
    scene = play(strategy, "a person clears the snapshot while it runs").start()
    scene.until_snapshot()
    scene.clear("snapshot")
    scene.until_snapshot(2)
    assert not scene.can_write()
    scene.order("ok")

    assert scene.end() == "success"
    assert scene.found() == ["frozen", "frozen"]
    assert scene.thawed_by() in told(strategy, "end of the block")
    assert scene.can_write()
    tell(scene)


def test_of_two_runs_at_once_the_second_is_refused_and_the_first_undisturbed(play, tell, strategy):
    first = play(strategy, "two runs at once: the first").start()
    first.until_snapshot()
    second = play(strategy, "two runs at once: the second", database=first.database).start()
    second.order("ok")
    assert second.end() == "failed"
    assert second.found() == []
    assert not first.can_write(), "the second run thawed the first one's freeze"
    first.order("ok")

    assert first.end() == "success"
    assert first.can_write()
    tell(first)
    tell(second, writable="is refused")


def test_a_function_that_outlasts_the_lease_is_red(play, tell, strategy):
    scene = play(strategy, "the lease ends during the snapshot", lease=SHORT_LEASE).start()
    scene.until_snapshot()
    assert scene.writable(within=PATIENCE)
    scene.order("ok")

    assert scene.end() == "failed"
    assert scene.states()["snapshot"] == "failed"
    tell(scene, writable="at once, by the lease")


@pytest.fixture
def moto(airflow, request):
    """A port of moto, a proxy before it, and the id of an Airflow connection to that."""
    with aws.moto() as port, aws.proxy(port) as proxy:
        connection = json.loads(proxy.connection())
        name = f"aws_{port}"
        body = {"connection_id": name, **connection, "extra": json.dumps(connection["extra"])}
        airflow.call("POST", "/connections", body)
        yield port, proxy, name


def test_ebs_snapshots_killed_with_9_before_aws_has_answered_are_retried(play, moto, strategy):
    port, proxy, name = moto
    volumes = make_volumes(port, 2)
    # Both are made, and of the second the task never hears.
    proxy.faults = [aws.Fault("CreateSnapshot", "cut-after", skip=1, seconds=30)]
    scene = play(f"{strategy}-ebs", "killed (-9) in CreateSnapshot", volumes=volumes, aws=name).start()
    eventually(lambda: len(proxy.actions("CreateSnapshot")) == 2, f"the second request of {scene}", PATIENCE)
    assert not scene.can_write()
    scene.kill("snapshot")

    assert scene.end() == "success"
    assert scene.task("snapshot")["try_number"] == 2
    assert scene.can_write()
    made = [tagging.as_dict(snapshot["Tags"]) for snapshot in snapshots_of(port, volumes)]
    token = str(scene.freezes()[-1]["token"])
    assert [tags["certified"] for tags in made if tags["pg-freeze:token"] == token] == ["true", "true"]
    # A freeze that needs no process still stood: it was adopted, and so were its snapshots. The locks were gone.
    others = [tags["certified"] for tags in made if tags["pg-freeze:token"] != token]
    assert others == (["false", "false"] if strategy == "lock" else [])
