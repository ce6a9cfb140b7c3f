"""What becomes of a database when Airflow itself goes down. Each of these tests has Airflow to itself."""

import pytest

from tests.e2e.processes import COMPONENTS, SLOWNESS
from tests.e2e.scene import SHORT_LEASE

pytestmark = pytest.mark.timeout(900 * SLOWNESS)


def test_freezes_are_thawed_after_the_scheduler_was_killed_and_restarted(alone, play, tell):
    """Its executor dies with it, and with that the supervisors; the tasks' own processes may go on."""
    pausing = play(
        "frozen", "the scheduler is killed (-9) during the pause, and restarted", drain_timeout=120 * SLOWNESS
    )
    writer = pausing.writer_in_transaction()
    snapshotting = play("frozen", "the scheduler is killed (-9) during the snapshot, and restarted")
    resuming = play(
        "frozen", "the scheduler is killed (-9) during the resume, and restarted", reader_grace=20 * SLOWNESS
    )
    for scene in (pausing, snapshotting, resuming):
        scene.start()
    pausing.until_draining()
    snapshotting.until_snapshot()
    resuming.until_snapshot()
    resuming.reader_at_work()
    resuming.order("ok")
    resuming.until("resume", "running")
    for scene in (pausing, snapshotting, resuming):
        scene.event_now()
    alone.kill("scheduler")
    alone.start("scheduler")
    alone.until_healthy()
    writer.execute("ROLLBACK")
    for scene in (pausing, snapshotting):
        scene.order("ok")

    for scene in (pausing, snapshotting, resuming):
        scene.end()
        assert scene.writable(), scene
        assert "writable" not in scene.found()
        tell(scene)


def test_freezes_are_thawed_after_the_api_server_was_killed_and_restarted(alone, play, tell):
    scene = play("frozen", "the API server is killed (-9) during the snapshot, and restarted").start()
    scene.until_snapshot()
    scene.event_now()
    alone.kill("api-server")
    scene.order("ok")
    alone.start("api-server")
    alone.until_healthy()

    scene.end()
    assert scene.writable()
    tell(scene)


def test_a_freeze_is_thawed_by_the_lease_while_nothing_of_airflow_is_left(alone, play, tell):
    scene = play("frozen", "every process of Airflow is killed (-9) during the snapshot", lease=SHORT_LEASE).start()
    scene.until_snapshot()
    scene.event_now()
    alone.kill_all()

    assert scene.writable()
    assert scene.thawed_by() == "lease ended"
    for component in COMPONENTS:
        alone.start(component)
    alone.until_healthy()
    scene.order("ok")
    assert scene.end() == "failed"
    tell(scene)
