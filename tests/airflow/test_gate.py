"""What the gate believes: each task and each index, under one freeze, seen to its end."""

from datetime import timedelta

import pytest
from airflow.providers.common.compat.sdk import task, task_group
from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.providers.standard.sensors.date_time import DateTimeSensorAsync
from airflow.providers.standard.sensors.time_delta import WaitSensor

from airflow_pg_freeze.task_group import pg_frozen
from devtools.asking import pause
from pg_freeze import resume


def test_a_block_of_nothing_but_mapped_tasks_is_a_snapshot(connection, app_database, new_dag, run):
    conn_id = connection(app_database)
    with new_dag() as dag:
        with pg_frozen(postgres_conn_id=conn_id, checkpoint="none") as frozen:

            @task_group
            def one_volume(number):
                @task
                def copy(number):
                    return number

                copy(number)

            # Named like the second index of the other.
            BashOperator.partial(task_id="rows").expand(bash_command=["true", "true"])
            BashOperator.partial(task_id="rows_1").expand(bash_command=["true"])
            one_volume.expand(number=[1, 2])
        frozen >> BashOperator(task_id="after", bash_command="true")
    finished = run(dag)

    assert finished.states["frozen.gate"] == finished.states["after"] == finished.state == "success"
    assert finished.xcoms["frozen.gate"] == finished.xcoms["frozen.pause"]["token"]


def test_one_index_that_ran_under_another_freeze_makes_the_run_red(
    connection, app_database, connect, new_dag, run, capfd
):
    ran: list[int] = []

    def again(context) -> None:
        # Which of them runs first is not promised.
        ran.append(context["ti"].map_index)
        if len(ran) == 1:
            resume(connect, databases=[app_database], holder="me")
            pause(connect, databases=[app_database], holder="me")

    conn_id = connection(app_database)
    with new_dag() as dag, pg_frozen(postgres_conn_id=conn_id, holder="me", checkpoint="none"):
        BashOperator.partial(task_id="copy", on_success_callback=again).expand(bash_command=["true", "true"])
    finished = run(dag)

    assert finished.states["frozen.copy"] == "success"
    assert finished.states["frozen.gate"] == finished.state == "failed"
    assert f"frozen.copy[{ran[1]}] under" in "".join(capfd.readouterr())


def test_one_index_that_failed_makes_the_run_red(connection, app_database, new_dag, run):
    conn_id = connection(app_database)
    with new_dag() as dag, pg_frozen(postgres_conn_id=conn_id, checkpoint="none"):
        BashOperator.partial(task_id="copy").expand(bash_command=["true", "false", "true"])
    finished = run(dag)

    assert finished.states["frozen.gate"] == finished.state == "failed"


def test_what_decides_and_what_does_nothing_need_not_be_seen_to_its_end(connection, app_database, new_dag, run):
    conn_id = connection(app_database)
    with new_dag() as dag, pg_frozen(postgres_conn_id=conn_id, checkpoint="none"):

        @task.branch
        def which():
            return "frozen.rows"

        @task.short_circuit
        def files_too():
            return False

        done = EmptyOperator(task_id="done", trigger_rule="none_failed_min_one_success")
        which() >> [BashOperator(task_id="rows", bash_command="true"), EmptyOperator(task_id="nothing")] >> done
        files_too() >> BashOperator(task_id="files", bash_command="false")
    finished = run(dag)

    assert (finished.states["frozen.nothing"], finished.states["frozen.files"]) == ("skipped", "skipped")
    assert finished.states["frozen.gate"] == finished.state == "success"


def test_a_mapped_task_without_an_index_is_no_snapshot(connection, app_database, new_dag, run):
    conn_id = connection(app_database)
    with new_dag() as dag, pg_frozen(postgres_conn_id=conn_id, checkpoint="none"):

        @task
        def copy(number):
            return number

        copy.expand(number=[])

    assert run(dag).states["frozen.gate"] == "skipped"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TriggerDagRunOperator(task_id="other", trigger_dag_id="other"), "wait_for_completion=True"),
        (
            lambda: TriggerDagRunOperator.partial(task_id="other", wait_for_completion=True).expand(
                trigger_dag_id=["other"]
            ),
            "deferrable=True",
        ),
        (
            lambda: DateTimeSensorAsync(task_id="other", target_time="{{ ts }}", end_from_trigger=True),
            "end_from_trigger=False",
        ),
        (lambda: WaitSensor(task_id="other", time_to_wait=timedelta(seconds=1), deferrable=True), "TimeDeltaSensor"),
    ],
)
def test_a_task_whose_end_nobody_would_see_is_refused(new_dag, make, says):
    with new_dag(), pytest.raises(ValueError, match=says), pg_frozen():
        make()


def test_a_run_that_is_triggered_and_waited_for_in_the_triggerer_may_stand_in_the_block(new_dag):
    with new_dag(), pg_frozen():
        TriggerDagRunOperator(task_id="other", trigger_dag_id="o", wait_for_completion=True, deferrable=True)
