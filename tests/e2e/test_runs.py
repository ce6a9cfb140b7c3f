"""What becomes of a database when a run is disturbed, with pg_frozen and with three operators in a row.

The plain wiring is played where it differs: those tests hold the limits that the documentation tells.
"""

import time
from datetime import timedelta

import psycopg
import pytest

from devtools.asking import pause
from tests.e2e.processes import SLOWNESS, eventually
from tests.e2e.scene import PATIENCE, SHORT_LEASE, gone

pytestmark = pytest.mark.timeout(600 * SLOWNESS)
both = pytest.mark.parametrize("wiring", ["frozen", "plain"])


@pytest.mark.parametrize("wiring", ["frozen", "plain", "lock", "read-only", "privileges"])
def test_all_goes_well(play, tell, wiring):
    scene = play(wiring, "all goes well").start()
    scene.until_snapshot()
    assert not scene.can_write()
    scene.order("ok")

    assert scene.end() == "success"
    assert scene.found() == ["frozen"]
    assert scene.can_write()
    tell(scene)


def test_a_failed_snapshot_keeps_the_run_red_and_is_thawed_at_once(play, tell):
    scene = play("frozen", "the snapshot fails").start()
    scene.until_snapshot()
    scene.event_now()
    scene.order("fail")

    assert scene.end() == "failed"
    assert scene.thawed_by().startswith("resume by")
    tell(scene)


def test_a_failed_snapshot_leaves_the_plain_run_green(play, tell):
    scene = play("plain", "the snapshot fails").start()
    scene.until_snapshot()
    scene.event_now()
    scene.order("fail")

    assert scene.end() == "success"
    assert scene.thawed_by().startswith("resume by")
    tell(scene, run="**green**")


def test_a_snapshot_killed_with_9_keeps_the_run_red_and_is_thawed_at_once(play, tell):
    scene = play("frozen", "the snapshot's process is killed (-9)").start()
    scene.until_snapshot()
    scene.kill("snapshot")

    assert scene.end() == "failed"
    assert scene.thawed_by().startswith("resume by")
    tell(scene)


def test_a_snapshot_whose_supervisor_is_killed_is_thawed_when_the_scheduler_misses_it(play, tell):
    scene = play("frozen", "the snapshot's supervisor is killed (-9)").start()
    scene.until_snapshot()
    orphan = scene.kill("snapshot", supervisor=True)

    assert scene.end() == "failed"
    assert scene.thawed_by().startswith("resume by")
    tell(scene)
    scene.order("ok")  # the snapshot itself has gone on all the time
    gone(orphan)
    assert scene.states()["snapshot"] == "failed"


@both
def test_a_pause_that_fails_leaves_nothing_frozen_and_a_red_run(play, tell, wiring):
    scene = play(wiring, "the pause fails", on_drain_timeout="abort", drain_timeout=1)
    scene.writer_in_transaction()
    scene.start()
    scene.order("ok")

    # The plain wiring's resume is its only leaf, and succeeds.
    assert scene.end() == ("failed" if wiring == "frozen" else "success")
    assert scene.states()["pause"] == "failed"
    assert scene.found() == []
    assert scene.can_write()
    tell(scene, writable="undone by itself", run="red" if wiring == "frozen" else "**green**")


@pytest.mark.parametrize("state", ["failed", "success"])
def test_a_run_marked_during_the_snapshot_is_thawed_by_the_resume(play, tell, state):
    scene = play("frozen", f"a person marks the run {state} during the snapshot").start()
    scene.until_snapshot()
    scene.mark_run(state)

    # Nobody has seen the end of the copy, whatever the person says.
    assert scene.end() == "failed"
    assert scene.writable()
    assert scene.thawed_by().startswith("resume by")
    tell(scene)


def test_a_plain_run_marked_failed_during_the_snapshot_stays_frozen_until_the_lease_ends(play, tell):
    scene = play("plain", "a person marks the run failed during the snapshot", lease=SHORT_LEASE).start()
    scene.until_snapshot()
    scene.mark_run("failed")

    assert scene.end() == "failed"
    assert scene.writable()
    assert scene.states()["resume"] == "skipped"
    assert scene.thawed_by() == "lease ended"
    tell(scene)


@pytest.mark.parametrize("state", ["failed", "success"])
@both
def test_a_run_marked_during_the_pause_does_not_freeze_late(play, tell, wiring, state):
    scene = play(wiring, f"a person marks the run {state} during the pause", drain_timeout=120 * SLOWNESS)
    writer = scene.writer_in_transaction()
    scene.start()
    scene.until_draining()
    scene.mark_run(state)
    assert scene.writable()
    writer.execute("ROLLBACK")

    assert scene.end() == state
    assert scene.found() == []
    assert scene.can_write()
    assert all(freeze["state"] == "thawed" for freeze in scene.freezes())
    tell(scene)


def test_a_run_marked_failed_during_the_resume_is_thawed_all_the_same(play, tell):
    scene = play("frozen", "a person marks the run failed during the resume", reader_grace=8 * SLOWNESS).start()
    scene.until_snapshot()
    scene.reader_at_work()
    scene.order("ok")
    scene.until("resume", "running")
    scene.mark_run("failed")

    scene.end()
    assert scene.writable()
    assert scene.thawed_by().startswith("resume by")
    tell(scene)


def test_clearing_the_pause_alone_thaws_again(play, tell):
    scene = play("frozen", "a person clears the pause alone, after the run").start()
    scene.order("ok")
    assert scene.end() == "success"
    scene.clear("pause")

    eventually(lambda: len(scene.freezes()) == 2, "the second freeze", PATIENCE)
    scene.end()
    assert scene.writable()
    assert scene.thawed_by().startswith("resume by")
    tell(scene)


def test_clearing_the_pause_alone_leaves_a_plain_run_frozen_until_the_lease_ends(play, tell):
    scene = play("plain", "a person clears the pause alone, after the run", lease=SHORT_LEASE).start()
    scene.order("ok")
    assert scene.end() == "success"
    scene.clear("pause")

    eventually(lambda: len(scene.freezes()) == 2, "the second freeze", PATIENCE)
    assert scene.end() == "success"
    assert not scene.can_write()
    assert scene.writable()
    assert scene.thawed_by() == "lease ended"
    tell(scene)


def test_clearing_the_snapshot_alone_freezes_for_it_again(play, tell):
    scene = play("frozen", "a person clears the snapshot alone, after it failed").start()
    scene.order("fail")
    assert scene.end() == "failed"
    scene.order("ok")
    scene.clear("snapshot")

    scene.until("snapshot", "success", "failed", tries=2)
    assert scene.end() == "success"
    assert scene.found() == ["frozen", "frozen"]
    assert scene.writable()
    tell(scene)


def test_clearing_the_snapshot_alone_snapshots_a_writable_database_in_a_plain_run(play, tell):
    scene = play("plain", "a person clears the snapshot alone, after it failed").start()
    scene.order("fail")
    scene.end()
    scene.order("ok")
    scene.clear("snapshot")

    scene.until("snapshot", "success", tries=2)
    assert scene.end() == "success"
    assert scene.found() == ["frozen", "writable"]
    tell(scene)


def test_clearing_only_what_failed_does_not_snapshot_a_writable_database(play, tell):
    scene = play("frozen", "a person clears only what failed, after the run").start()
    scene.order("fail")
    assert scene.end() == "failed"
    scene.order("ok")
    scene.clear_failed()

    scene.until("snapshot", "success", "failed", tries=2)
    state = scene.end()
    # Whether Airflow clears the setups too or not: never a snapshot of a writable database.
    assert "writable" not in scene.found()
    assert state == ("success" if scene.found() == ["frozen", "frozen"] else "failed")
    assert scene.writable()
    tell(scene)


def test_clearing_only_what_failed_snapshots_a_writable_database_in_a_plain_run(play, tell):
    scene = play("plain", "a person clears only what failed, after the run").start()
    scene.order("fail")
    scene.end()
    scene.order("ok")
    scene.clear_failed()

    scene.until("snapshot", "success", tries=2)
    assert scene.end() == "success"
    assert scene.found() == ["frozen", "writable"]
    tell(scene)


def test_clearing_the_resume_alone_does_no_harm(play, tell):
    scene = play("frozen", "a person clears the resume alone, after the run").start()
    scene.order("ok")
    assert scene.end() == "success"
    scene.clear("resume")

    scene.until("resume", "success", tries=2)
    assert scene.end() == "success"
    assert scene.writable()
    tell(scene)


@both
def test_a_dag_paused_during_the_run_is_thawed_by_the_lease(play, tell, wiring):
    scene = play(f"{wiring}_paused", "the DAG is paused during the snapshot", lease=SHORT_LEASE).start()
    scene.until_snapshot()
    scene.pause_dag(True)
    scene.order("ok")

    assert scene.writable()
    assert scene.thawed_by() == "lease ended"
    scene.pause_dag(False)
    # Unpaused, the plain run goes on as if nothing had been.
    scene.end()
    assert scene.can_write()
    tell(scene)


@both
def test_a_run_that_times_out_is_thawed_by_the_lease(play, tell, wiring):
    scene = play(f"{wiring}_timeout", "dagrun_timeout passes during the snapshot", lease=SHORT_LEASE).start()
    scene.until_snapshot()
    scene.event_now()

    assert scene.end() == "failed"
    assert scene.writable()
    assert scene.thawed_by() == "lease ended"
    tell(scene)


def test_of_two_runs_at_once_the_second_is_refused_and_the_first_undisturbed(play, tell):
    first = play("frozen", "two runs at once: the first").start()
    first.until_snapshot()
    second = play("frozen", "two runs at once: the second", database=first.database).start()
    second.order("ok")
    assert second.end() == "failed"
    assert second.found() == []
    assert not first.can_write(), "the second run thawed the first one's freeze"
    first.order("ok")

    assert first.end() == "success"
    assert first.can_write()
    tell(first)
    tell(second, writable="is refused")


def test_a_pause_killed_with_9_is_thawed_by_the_resume(play, tell):
    scene = play("frozen", "the pause's process is killed (-9)", drain_timeout=120 * SLOWNESS)
    scene.writer_in_transaction()
    scene.start()
    scene.until_draining()
    scene.kill("pause")

    assert scene.end() == "failed"
    assert scene.found() == []
    assert scene.thawed_by().startswith("resume by")
    assert scene.can_write()
    tell(scene)


def test_a_pause_that_outlives_its_supervisor_does_not_freeze_late(play, tell):
    scene = play("frozen", "the pause's supervisor is killed (-9)", drain_timeout=120 * SLOWNESS)
    writer = scene.writer_in_transaction()
    scene.start()
    scene.until_draining()
    orphan = scene.kill("pause", supervisor=True)

    assert scene.end() == "failed"
    writer.execute("ROLLBACK")
    gone(orphan)
    # The orphan itself gives up as soon as it has something to log: its supervisor was the other end.
    assert scene.thawed_by().startswith(("resume by", "undone"))
    assert scene.can_write()
    tell(scene)


def test_a_resume_killed_with_9_is_retried(play, tell):
    scene = play("frozen", "the resume's process is killed (-9)", reader_grace=6 * SLOWNESS).start()
    scene.until_snapshot()
    scene.reader_at_work()
    scene.order("ok")
    scene.until("resume", "running")
    scene.kill("resume")

    assert scene.end() == "success"
    assert scene.task("resume")["try_number"] == 2
    assert scene.can_write()
    tell(scene)


def test_a_snapshot_marked_success_while_it_runs_is_thawed_and_red(play, tell):
    scene = play("frozen", "a person marks the snapshot success while it runs").start()
    scene.until_snapshot()
    scene.mark_task("snapshot", "success")

    assert scene.end() == "failed"
    assert scene.states()["gate"] == "failed"
    assert scene.writable()
    assert scene.thawed_by().startswith("resume by")
    tell(scene)


def test_one_index_that_is_cleared_later_makes_the_run_red(play):
    scene = play("frozen_mapped", "a person clears one index of a mapped snapshot, after the run").start()
    scene.order("ok")
    assert scene.end() == "success"
    assert scene.states()["gate"] == "success"
    scene.clear("snapshot", index=1)

    eventually(lambda: len(scene.freezes()) == 2, "the second freeze", PATIENCE)
    assert scene.end() == "failed"
    assert scene.states()["gate"] == "failed"
    assert scene.writable()


def test_a_pause_marked_success_while_it_drains_lets_no_snapshot_begin(play, tell):
    scene = play("frozen", "a person marks the pause success while it drains", drain_timeout=120 * SLOWNESS)
    writer = scene.writer_in_transaction()
    scene.start()
    scene.until_draining()
    scene.order("ok")
    scene.mark_task("pause", "success")

    assert scene.end() == "failed"
    assert scene.found() == []
    writer.execute("ROLLBACK")
    assert scene.writable()
    tell(scene)


def test_a_snapshot_that_outlives_the_lease_is_red(play, tell):
    scene = play("frozen", "the lease ends during the snapshot", lease=SHORT_LEASE).start()
    scene.until_snapshot()
    assert scene.writable()
    scene.order("ok")

    assert scene.end() == "failed"
    assert scene.states()["snapshot"] == "failed"
    tell(scene, writable="at once, by the lease")


def test_a_snapshot_that_outlives_the_lease_is_green_in_a_plain_run(play, tell):
    scene = play("plain", "the lease ends during the snapshot", lease=SHORT_LEASE).start()
    scene.until_snapshot()
    assert scene.writable()
    scene.order("ok")

    assert scene.end() == "success"
    tell(scene, writable="at once, by the lease", run="**green**")


def test_the_guard_thaws_what_no_dead_man_switch_watches(play, airflow, freezer):
    scene = play("frozen", "the guard")
    # One of its two connections leads to a server that is not there.
    pause(
        freezer,
        databases=[scene.database],
        holder="somebody",
        lease=timedelta(seconds=2),
        drain_timeout=timedelta(seconds=1),
        dead_man=False,
    )
    time.sleep(3)
    assert not scene.can_write()
    airflow.call("PATCH", "/dags/pg_freeze_guard", {"is_paused": False})

    assert scene.writable()
    assert scene.thawed_by() == "lease ended"
    airflow.call("PATCH", "/dags/pg_freeze_guard", {"is_paused": True})


def test_a_deferred_snapshot_goes_on_under_its_freeze_after_the_triggerer_was_killed(play, tell, airflow):
    scene = play("frozen_deferred", "the triggerer is killed while the snapshot is deferred").start()
    scene.until("snapshot", "deferred")
    scene.event_now()
    airflow.kill("triggerer")
    airflow.start("triggerer")

    assert scene.end() == "success"
    assert scene.can_write()
    tell(scene, snapshot="deferred, and went on")


def test_a_deferred_sensor_goes_on_waiting_after_the_triggerer_was_killed(play, tell, airflow):
    scene = play("plain_deferred", "the triggerer is killed while the sensor is deferred")
    with psycopg.connect(scene.superuser, dbname=scene.database, autocommit=True):
        scene.start()
        scene.until("sensor", "deferred")
        scene.event_now()
        airflow.kill("triggerer")
        airflow.start("triggerer")
        time.sleep(5)
        assert not scene.can_write()

    assert scene.end() == "success"
    assert scene.can_write()
    tell(scene)
