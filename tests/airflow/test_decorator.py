"""``@task.pg_frozen`` in real runs: the function runs frozen, and whatever ends it thaws first."""

import os
from datetime import timedelta

import psycopg
import pytest
from airflow.providers.common.compat.sdk import get_current_context, task

from devtools.asking import pause
from pg_freeze import history, resume, status
from tests.airflow.running import eventually

STRATEGIES = pytest.mark.parametrize("strategy", ["lock", "read-only"])


@pytest.fixture
def conn_id(connection, server, app_database, app_connect):
    app_connect(app_database).execute("CREATE TABLE things (name text)")
    server.execute("GRANT app TO freezer")
    return connection(app_database)


def freezes_of(connect, database):
    return [freeze for freeze in history(connect) if database in freeze.databases]


@STRATEGIES
def test_a_function_runs_while_nobody_can_write(strategy, conn_id, new_dag, run, connect, app_database, can_write):
    with new_dag() as dag:

        @task.pg_frozen(postgres_conn_id=conn_id, strategy=strategy, drain_timeout=5, lease="{{ 40 + 20 }}")
        def snapshot(freeze, number, ti):
            in_context = get_current_context()["freeze"]
            return {"wrote": can_write(), "number": number, "task": ti.task_id, **freeze, "same": in_context == freeze}

        snapshot(number=7)

    finished = run(dag)

    assert finished.states == {"snapshot": "success"}
    returned = finished.xcoms["snapshot"]
    assert not returned["wrote"]
    assert (returned["number"], returned["task"], returned["same"]) == (7, "snapshot", True)
    assert returned["strategy"] == strategy
    assert returned["holder"] == f"{dag.dag_id}/{finished.run_id}/snapshot"
    (freeze,) = freezes_of(connect, app_database)
    assert (str(freeze.token), freeze.state, freeze.thawed_by) == (returned["token"], "thawed", "end of the block")
    assert can_write()


def test_the_attestation_is_an_xcom_for_the_tasks_after_it(conn_id, new_dag, run):
    with new_dag() as dag:

        @task.pg_frozen(postgres_conn_id=conn_id)
        def snapshot():
            return "made"

        @task
        def look(made, attestation):
            return [made, attestation["level"], attestation["certified"]]

        made = snapshot()
        look(made, made["attestation"])

    assert run(dag).xcoms["look"] == ["made", "quiesced", True]


def test_mapped_tasks_have_a_holder_each(conn_id, new_dag, run, connect, app_database):
    with new_dag() as dag:

        @task.pg_frozen(postgres_conn_id=conn_id, max_active_tis_per_dagrun=1)
        def snapshot(volume, freeze):
            return [volume, freeze["holder"]]

        snapshot.expand(volume=["one", "two"])

    finished = run(dag)

    assert finished.state == "success"
    run_id = f"{dag.dag_id}/{finished.run_id}/snapshot"
    assert {freeze.holder for freeze in freezes_of(connect, app_database)} == {f"{run_id}/0", f"{run_id}/1"}


@STRATEGIES
def test_an_error_of_the_function_goes_on_after_the_thaw_and_a_retry_freezes_anew(
    strategy, conn_id, new_dag, run, connect, app_database, can_write
):
    with new_dag() as dag:

        @task.pg_frozen(postgres_conn_id=conn_id, strategy=strategy, retries=1, retry_delay=timedelta(0))
        def snapshot(ti):
            if ti.try_number == 1:
                raise OSError("disk full")

        snapshot()

    finished = run(dag)

    assert (finished.states, finished.tries) == ({"snapshot": "success"}, {"snapshot": 2})
    assert [freeze.thawed_by for freeze in freezes_of(connect, app_database)] == ["end of the block", "undone: OSError"]
    assert can_write()


def test_below_the_required_level_the_task_fails_and_the_attestation_is_kept(
    conn_id, new_dag, run, server, app_database, capfd, can_write
):
    dsn = server.dsn(app_database, "postgres")
    with new_dag() as dag:

        @task.pg_frozen(postgres_conn_id=conn_id, strategy="read-only", require="quiesced")
        def snapshot():
            with psycopg.connect(dsn) as intruder:
                intruder.execute("SET TRANSACTION READ WRITE; INSERT INTO things VALUES ('intruder')")

        @task(trigger_rule="all_done")
        def look(ti):
            return ti.xcom_pull(task_ids="snapshot", key="attestation")

        snapshot() >> look()

    finished = run(dag)

    assert finished.states == {"snapshot": "failed", "look": "success"}
    assert finished.xcoms["look"]["level"] == "crash-only"
    assert "quiesced is required" in "".join(capfd.readouterr())
    assert can_write()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"require": "{{ 'certain' }}"}, "must be one of quiesced, strict"),
        ({"require": "{{ 'strict' }}"}, "give strategy=read-only and admit=nobody"),
        ({"strategy": "{{ 'hope' }}"}, "strategy"),
        ({"lease": "{{ 'soon' }}"}, "lease is 'soon'"),
    ],
)
def test_what_makes_no_sense_is_refused_without_a_retry(
    options, says, conn_id, new_dag, run, connect, app_database, capfd
):
    with new_dag() as dag:

        @task.pg_frozen(postgres_conn_id=conn_id, retries=2, retry_delay=timedelta(0), **options)
        def snapshot():
            raise AssertionError("must not be called")

        snapshot()

    finished = run(dag)

    assert (finished.states, finished.tries) == ({"snapshot": "failed"}, {"snapshot": 1})
    assert says in "".join(capfd.readouterr())
    assert freezes_of(connect, app_database) == []


def test_strict_is_reached_with_a_closed_database(conn_id, new_dag, run):
    with new_dag() as dag:

        @task.pg_frozen(postgres_conn_id=conn_id, strategy="read-only", admit="nobody", require="strict")
        def snapshot():
            return "made"

        snapshot()

    assert run(dag).states == {"snapshot": "success"}


def test_a_function_that_outlasts_the_lease_is_not_believed(conn_id, new_dag, run, can_write):
    with new_dag() as dag:

        @task.pg_frozen(postgres_conn_id=conn_id, lease=1, drain_timeout=0.5)
        def snapshot():
            eventually(can_write)

        snapshot()

    assert run(dag).states == {"snapshot": "failed"}


@pytest.fixture
def begin(task_process, request, server, connection, app_database, conn_id):
    connection(app_database, conn_id="killed")

    def begin(**arguments):
        environment = {"AIRFLOW_CONN_KILLED": os.environ["AIRFLOW_CONN_KILLED"]}
        task_process.begin(
            "airflow_pg_freeze.decorators.pg_frozen.PgFrozenDecoratedOperator",
            request.node.name,
            environment,
            postgres_conn_id="killed",
            **arguments,
        )

    return begin


@STRATEGIES
def test_a_task_that_is_told_to_end_thaws_first_and_fails(
    strategy, begin, task_process, connect, app_database, can_write
):
    begin(python_callable=100, strategy=strategy, lease=60)
    task_process.wait_for("HOOK")
    assert not can_write()
    task_process.terminate()

    assert task_process.state() == "failed", task_process.log
    assert status(connect, databases=[app_database]).freezes == ()
    (freeze,) = freezes_of(connect, app_database)
    # The locks are let go first; then the undo and the dead-man switch are as quick as each other to journal it.
    assert freeze.thawed_by in {"undone: Terminated", "lock session ended"}
    assert can_write()


def test_a_task_that_is_told_to_end_leaves_the_freeze_to_the_newer_try_that_has_adopted_it(
    begin, task_process, connect, app_database, can_write
):
    begin(python_callable=100, strategy="read-only", lease=60)
    task_process.wait_for("HOOK")
    (old,) = status(connect, databases=[app_database]).freezes
    new = pause(connect, databases=[app_database], holder=old.holder)
    task_process.terminate()

    assert task_process.state() == "failed", task_process.log
    assert new.token == old.token
    assert [freeze.token for freeze in status(connect, databases=[app_database]).freezes] == [new.token]
    assert not can_write()
    resume(connect, databases=[app_database], holder=new.holder)


@STRATEGIES
def test_a_task_that_takes_too_long_thaws_first_and_fails(
    strategy, begin, task_process, connect, app_database, can_write
):
    begin(python_callable=100, strategy=strategy, lease=60, execution_timeout=3)

    assert task_process.state() == "failed", task_process.log
    assert status(connect, databases=[app_database]).freezes == ()
    assert can_write()


def test_a_task_that_is_told_to_end_before_it_began_freezes_nothing(begin, task_process, connect, app_database):
    begin(python_callable=1, pre_execute=1)
    task_process.wait_for("HOOK")
    task_process.terminate()

    assert task_process.state() == "failed", task_process.log
    assert freezes_of(connect, app_database) == []
