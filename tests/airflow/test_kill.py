"""What ends a pause early, done to a real process that runs the task."""

import os
import time

import pytest

from devtools.asking import pause
from pg_freeze import history, resume, status
from tests.airflow.running import eventually


@pytest.fixture
def begin(task_process, request, connection, app_database):
    connection(app_database, conn_id="killed")

    def begin(operator, **arguments):
        environment = {"AIRFLOW_CONN_KILLED": os.environ["AIRFLOW_CONN_KILLED"]}
        task_process.begin(
            operator, request.node.name, environment, postgres_conn_id="killed", holder="me", **arguments
        )

    return begin


@pytest.fixture
def open_transaction(app_database, app_connect):
    client = app_connect(app_database)
    client.execute("BEGIN")
    client.execute("CREATE TABLE mine ()")
    return client


def drains(connect, database):
    return any(freeze.barrier_at for freeze in status(connect, databases=[database]).freezes)


def ended_as(connect, database):
    return [freeze.thawed_by for freeze in history(connect) if database in freeze.databases]


@pytest.mark.parametrize("signals", [1, 4], ids=["once", "again while it is undone"])
def test_a_pause_that_is_told_to_end_undoes_itself_and_fails(
    signals, begin, task_process, connect, app_database, open_transaction
):
    begin("PgPauseOperator", drain_timeout=60)
    eventually(lambda: drains(connect, app_database))
    for _ in range(signals):
        task_process.terminate()
        time.sleep(0.005)

    assert task_process.state() == "failed", task_process.log
    assert status(connect, databases=[app_database]).freezes == ()
    assert ended_as(connect, app_database) == ["undone: Terminated"]
    open_transaction.execute("COMMIT")


def test_a_pause_that_is_told_to_end_is_retried_if_it_may_be(
    begin, task_process, connect, app_database, open_transaction
):
    begin("PgPauseOperator", drain_timeout=60, retries=1, retry_delay=0)
    eventually(lambda: drains(connect, app_database))
    task_process.terminate()
    eventually(lambda: ended_as(connect, app_database) == ["undone: Terminated"])
    open_transaction.execute("COMMIT")

    assert task_process.state() == "success", task_process.log
    assert len(status(connect, databases=[app_database]).freezes) == 1
    resume(connect, databases=[app_database], holder="me")


def test_a_pause_that_exceeds_its_execution_timeout_undoes_itself(
    begin, task_process, connect, app_database, open_transaction
):
    begin("PgPauseOperator", drain_timeout=60, execution_timeout=3)

    assert task_process.state() == "failed", task_process.log
    assert status(connect, databases=[app_database]).freezes == ()
    assert ended_as(connect, app_database) == ["undone: AirflowTaskTimeout"]
    open_transaction.execute("COMMIT")


def test_a_pause_that_is_told_to_end_before_it_began_freezes_nothing(begin, task_process, connect, app_database):
    begin("PgPauseOperator", pre_execute=1)
    task_process.wait_for("HOOK")
    task_process.terminate()

    assert task_process.state() == "failed", task_process.log
    assert ended_as(connect, app_database) == []


def test_a_signal_after_the_freeze_leaves_it_to_the_resume(begin, task_process, connect, app_database):
    begin("PgPauseOperator", post_execute=1)
    task_process.wait_for("HOOK")
    task_process.terminate()

    assert task_process.state() == "success", task_process.log
    assert len(status(connect, databases=[app_database]).freezes) == 1
    resume(connect, databases=[app_database], holder="me")


def test_a_resume_that_is_told_to_end_finishes(begin, task_process, connect, app_database, app_connect):
    pause(connect, databases=[app_database], holder="me")
    reader = app_connect(app_database)
    reader.execute("BEGIN")
    reader.execute("SELECT 1")
    begin("PgResumeOperator", reader_grace=3)
    eventually(
        lambda: any(freeze.restored_at for freeze in status(connect, databases=[app_database]).freezes),
    )
    task_process.terminate()

    assert task_process.state() == "success", task_process.log
    assert status(connect, databases=[app_database]).freezes == ()
    app_connect(app_database).execute("CREATE TABLE writable ()")
