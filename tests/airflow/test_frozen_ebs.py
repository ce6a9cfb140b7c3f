"""Freeze, snapshot, thaw and certify in one task, on a real PostgreSQL and a moto server."""

import os
from datetime import timedelta

import pytest

from airflow_pg_freeze.operators.frozen_ebs import PgFrozenEbsSnapshotOperator
from airflow_pg_freeze.snapshots import tags as tagging
from devtools.aws import Fault
from devtools.rights import checkpointer
from pg_freeze import history, resume, status
from tests.airflow.cloud import snapshots_of, volumes_of
from tests.airflow.running import eventually

STRATEGIES = pytest.mark.parametrize("strategy", ["lock", "read-only"])


@pytest.fixture
def frozen_snapshot(connection, server, app_database, app_connect, new_dag):
    """A DAG of one task, and a table to write to."""
    app_connect(app_database).execute("CREATE TABLE things (name text)")
    server.execute("GRANT app TO freezer")
    conn_id = connection(app_database)

    def create(**arguments):
        with new_dag() as dag:
            PgFrozenEbsSnapshotOperator(
                task_id="snapshots", postgres_conn_id=conn_id, **{"max_wait": 45, "delete_partial": True, **arguments}
            )
        return dag

    return create


def freezes_of(connect, database):
    return [freeze for freeze in history(connect) if database in freeze.databases]


def tags_of(snapshot):
    return tagging.as_dict(snapshot["Tags"])


@pytest.mark.parametrize("strategy", ["lock", "read-only", "privileges"])
def test_one_task_freezes_snapshots_thaws_and_certifies(
    strategy, frozen_snapshot, connect, server, app_database, run, proxy, instance, moto_port, can_write
):
    wrote = []

    def told(action):
        if action in ("CreateSnapshots", "CreateTags"):
            wrote.append((action, can_write()))

    proxy.told = told

    finished = run(frozen_snapshot(instance_id=instance, exclude_boot_volume=True, strategy=strategy))

    assert finished.states == {"snapshots": "success"}
    assert wrote == [("CreateSnapshots", False), ("CreateTags", True)]
    made = finished.xcoms["snapshots"]
    assert (made["certified"], made["level"]) == (True, "quiesced")
    inside = server.connect_factory(checkpointer(server.version), app_database)
    (freeze,) = freezes_of(inside if strategy == "privileges" else connect, app_database)
    assert freeze.strategy == strategy
    for snapshot in snapshots_of(moto_port, volumes_of(moto_port, instance)):
        tags = tags_of(snapshot)
        assert (tags["certified"], tags["pg-freeze:level"]) == ("true", "quiesced")
        assert tags["pg-freeze:token"] == str(freeze.token) == made["token"]
        assert tags["pg-freeze:checkpoint-lsn"] == freeze.checkpoint_lsn


def test_when_aws_fails_the_database_is_thawed_and_nothing_is_left(
    frozen_snapshot, connect, app_database, run, proxy, volumes, moto_port, can_write
):
    proxy.faults = [Fault("CreateSnapshot", "refuse", 99, code="InternalError", status=500, skip=1)]

    finished = run(frozen_snapshot(volume_ids=volumes, max_wait=6))

    assert finished.states == {"snapshots": "failed"}
    assert snapshots_of(moto_port, volumes) == []
    assert status(connect, databases=[app_database]).freezes == ()
    assert can_write()


def test_a_snapshot_of_a_database_that_was_written_to_is_not_certified(
    frozen_snapshot, server, app_database, run, proxy, volumes, moto_port, capfd
):
    def told(action):
        if action == "CreateSnapshot":
            with server.control(app_database) as intruder, intruder.transaction():
                intruder.execute("SET TRANSACTION READ WRITE")
                intruder.execute("INSERT INTO things VALUES ('intruder')")

    proxy.told = told

    finished = run(frozen_snapshot(volume_ids=volumes[:1], strategy="read-only"))

    assert finished.states == {"snapshots": "failed"}
    assert "quiesced is required" in "".join(capfd.readouterr())
    (snapshot,) = snapshots_of(moto_port, volumes[:1])
    assert (tags_of(snapshot)["certified"], tags_of(snapshot)["pg-freeze:level"]) == ("false", "crash-only")


@STRATEGIES
def test_a_freeze_that_did_not_last_is_made_anew_by_the_retry(
    strategy, frozen_snapshot, connect, app_database, run, proxy, volumes, moto_port
):
    def told(action):
        if action == "CreateSnapshot" and len(proxy.actions("CreateSnapshot")) == 1:
            (freeze,) = freezes_of(connect, app_database)
            resume(connect, databases=[app_database], holder=freeze.holder)

    proxy.told = told

    finished = run(
        frozen_snapshot(volume_ids=volumes[:1], strategy=strategy, retries=1, retry_delay=timedelta(seconds=0))
    )

    assert (finished.states, finished.tries) == ({"snapshots": "success"}, {"snapshots": 2})
    (snapshot,) = snapshots_of(moto_port, volumes[:1])
    assert tags_of(snapshot)["pg-freeze:token"] == finished.xcoms["snapshots"]["token"]
    assert len(freezes_of(connect, app_database)) == 2


def test_a_task_that_is_told_to_end_thaws_and_leaves_no_snapshot(
    task_process, frozen_snapshot, connection, connect, app_database, proxy, volumes, moto_port, request, can_write
):
    proxy.faults = [Fault("CreateSnapshot", "refuse", 999, code="RequestLimitExceeded", status=503, skip=1)]
    connection(app_database, conn_id="killed")
    environment = {name: os.environ[name] for name in ("AIRFLOW_CONN_KILLED", "AIRFLOW_CONN_AWS_DEFAULT")}
    task_process.begin(
        "airflow_pg_freeze.operators.frozen_ebs.PgFrozenEbsSnapshotOperator",
        request.node.name,
        environment,
        postgres_conn_id="killed",
        volume_ids=volumes,
        delete_partial=True,
    )
    eventually(lambda: len(proxy.actions("CreateSnapshot")) >= 2, within=timedelta(seconds=90))
    assert not can_write()
    task_process.terminate()

    assert task_process.state() == "failed", task_process.log
    assert snapshots_of(moto_port, volumes) == []
    # The dead-man switch may be the first to see that the locks are gone.
    (freeze,) = freezes_of(connect, app_database)
    assert freeze.thawed_by in ("undone: Terminated", "lock session ended")
    assert can_write()
