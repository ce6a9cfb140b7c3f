from datetime import timedelta
from typing import Any

import psycopg
import pytest
from airflow.providers.common.compat.sdk import (
    AirflowFailException,
    AirflowSkipException,
    BaseOperator,
    BaseSensorOperator,
    TaskGroup,
    TriggerRule,
    task,
    task_group,
)
from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.empty import EmptyOperator

from airflow_pg_freeze.operators import PgAttestOperator, PgResumeOperator
from airflow_pg_freeze.sensors import PgLingeringBackendsSensor
from airflow_pg_freeze.task_group import pg_frozen
from devtools.asking import pause
from devtools.rights import keep_private
from pg_freeze import history, resume


class Write(BaseOperator):
    """Says whether a database can be written to."""

    template_fields = ("dsn",)

    def __init__(self, *, dsn: str, **kwargs) -> None:
        super().__init__(**kwargs)
        self.dsn = dsn

    def execute(self, context) -> str:
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            try:
                conn.execute("CREATE TABLE IF NOT EXISTS written ()")
            except (psycopg.errors.ReadOnlySqlTransaction, psycopg.errors.InsufficientPrivilege):
                return "frozen"
        return "writable"


class Look(BaseSensorOperator):
    """A sensor that is content at its second look."""

    looks = 0

    def poke(self, context) -> bool:
        self.looks += 1
        return self.looks > 1


def test_every_snapshot_task_lies_between_the_checkpoint_and_the_thaw(new_dag):
    with new_dag() as dag:
        before, after = EmptyOperator(task_id="before"), EmptyOperator(task_id="after")
        with pg_frozen() as frozen:
            first = BashOperator(task_id="first", bash_command="true")
            with TaskGroup("files"):
                second = BashOperator(task_id="second", bash_command="true")
            third = BashOperator.partial(task_id="third").expand(bash_command=["true", "false"])
            first >> second
        before >> frozen >> after

    assert before.downstream_task_ids == {"frozen.pause"}
    assert frozen.pause.downstream_task_ids == {"frozen.checkpoint", "frozen.resume", "frozen.gate"}
    assert frozen.checkpoint.downstream_task_ids == {"frozen.first", "frozen.third", "frozen.resume", "frozen.gate"}
    assert frozen.gate.upstream_task_ids == frozen.resume.upstream_task_ids == {
        "frozen.pause", "frozen.checkpoint", "frozen.first", "frozen.files.second", "frozen.third"
    }  # fmt: skip
    assert frozen.pause.is_setup
    assert frozen.checkpoint.is_setup
    for end in (frozen.resume, frozen.gate):
        assert end.is_teardown
        assert end.on_failure_fail_dagrun
        assert end.trigger_rule == TriggerRule.ALL_DONE
    assert after.upstream_task_ids == {"frozen.gate", "frozen.resume"}
    assert {third.task_id, *(t.task_id for t in dag.tasks)} == {t.task_id for t in dag.tasks}


def test_the_thaw_comes_before_everything_else_and_is_retried_soon(new_dag):
    defaults = {"retries": 9, "retry_delay": timedelta(hours=1), "depends_on_past": True}
    with new_dag(default_args=defaults), pg_frozen(pool="freezes", resume_args={"reader_grace": 7}) as frozen:
        snapshot = BashOperator(task_id="snapshot", bash_command="true")

    assert (frozen.resume.retries, frozen.resume.retry_delay) == (3, timedelta(seconds=5))
    assert frozen.resume.priority_weight > snapshot.priority_weight > frozen.pause.priority_weight
    assert [t.pool for t in (frozen.pause, frozen.checkpoint, frozen.resume)] == ["freezes"] * 3
    assert snapshot.pool == "default_pool"
    assert not any(t.depends_on_past for t in (frozen.pause, frozen.checkpoint, snapshot, frozen.resume, frozen.gate))
    assert frozen.resume.reader_grace == 7


def test_parameters_go_to_the_pause(new_dag):
    with new_dag(), pg_frozen(checkpoint="in-pause", switch_wal=True, lease=60, admit="nobody", retries=2) as frozen:
        EmptyOperator(task_id="snapshot")

    assert frozen.checkpoint is None
    assert (frozen.pause.checkpoint, frozen.pause.switch_wal) == (True, True)
    assert (frozen.pause.lease, frozen.pause.admit, frozen.pause.retries) == (60, "nobody", 2)


def test_a_group_without_a_snapshot_is_refused(new_dag):
    with new_dag(), pytest.raises(ValueError, match="'frozen' has no task to run"), pg_frozen():
        pass


def test_an_error_in_the_block_is_not_hidden(new_dag):
    with new_dag(), pytest.raises(ZeroDivisionError), pg_frozen():
        print(1 / 0)


@pytest.mark.parametrize(
    "unsafe",
    [
        {"depends_on_past": True},
        {"wait_for_downstream": True},
        {"trigger_rule": "always"},
        {"start_from_trigger": True},
    ],
)
def test_a_task_that_would_wait_frozen_or_slip_past_the_guard_is_refused(new_dag, unsafe):
    def make() -> None:
        made = BashOperator(
            task_id="snapshot", bash_command="true", **{k: v for k, v in unsafe.items() if k != "start_from_trigger"}
        )
        made.start_from_trigger = unsafe.get("start_from_trigger", False)

    with new_dag(), pytest.raises(ValueError, match=r"frozen\.snapshot"), pg_frozen():
        make()


def test_a_task_that_comes_after_the_block_is_refused(new_dag):
    with new_dag():
        with pg_frozen() as frozen:
            EmptyOperator(task_id="snapshot")
        with pytest.raises(ValueError, match="nothing would guard it"):
            EmptyOperator(task_id="late", task_group=frozen)


@pytest.mark.parametrize("arguments", [{"checkpoint": "maybe"}, {"checkpoint": "none", "switch_wal": True}])
def test_a_checkpoint_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(ValueError, match="checkpoint"):
        pg_frozen(**arguments)


def test_a_serialized_dag_is_the_same_after_every_parse(new_dag, metadata_database):
    """Otherwise the DAG would have a new version each time its file is read."""

    def parse() -> dict:
        with new_dag() as dag, pg_frozen():
            BashOperator(task_id="one", bash_command="true")
            BashOperator.partial(task_id="many").expand(bash_command=["true"])
        try:
            from airflow.serialization.serialized_objects import DagSerialization
        except ImportError:  # Airflow 3.1
            from airflow.serialization.serialized_objects import SerializedDAG as DagSerialization  # type: ignore[assignment,attr-defined]
        return DagSerialization.to_dict(dag)

    assert parse() == parse()


def test_whatever_stands_in_the_block_runs_frozen(connection, app_database, server, app_connect, new_dag, run):
    conn_id, dsn = connection(app_database), server.dsn(app_database, "app")
    with new_dag() as dag:
        before, after = Write(task_id="before", dsn=dsn), Write(task_id="after", dsn=dsn)
        with pg_frozen(postgres_conn_id=conn_id, lease=120) as frozen:

            @task
            def decorated(freeze: dict, token: str) -> bool:
                return freeze["token"] == token and freeze["databases"] == [app_database]

            @task
            def mapped(number: int) -> int:
                return number

            plain = Write(task_id="plain", dsn=dsn)
            Write.partial(task_id="many").expand(dsn=[dsn, dsn])
            mapped.expand(number=[1, 2])
            with TaskGroup("inner"):
                Write(task_id="nested", dsn=dsn) >> Look(task_id="sensor", poke_interval=0.1)
            plain >> decorated(frozen.freeze, frozen.token)
        before >> frozen >> after
    finished = run(dag)

    assert set(finished.states.values()) == {"success"}
    xcoms = finished.xcoms
    assert [xcoms["before"], xcoms["frozen.plain"], xcoms["frozen.inner.nested"], xcoms["after"]] == [
        "writable", "frozen", "frozen", "writable"
    ]  # fmt: skip
    assert xcoms["frozen.decorated"] is True
    assert xcoms["frozen.gate"] == xcoms["frozen.pause"]["token"]
    assert xcoms["frozen.pause"]["holder"] == f"{dag.dag_id}/{finished.run_id}/frozen"


def test_a_group_by_privileges_finds_the_journal_inside_the_database(connection, app_database, server, new_dag, run):
    server.execute("GRANT app TO freezer")
    keep_private(server, app_database)
    conn_id, dsn = connection(app_database), server.dsn(app_database, "app")
    with new_dag() as dag:
        with pg_frozen(postgres_conn_id=conn_id, strategy="privileges", lease=120) as frozen:
            asked = {"postgres_conn_id": conn_id, "holder": frozen.holder}
            (
                PgLingeringBackendsSensor(task_id="drained", **asked)
                >> PgAttestOperator(task_id="attest", moment="before", **asked)
                >> Write(task_id="snapshot", dsn=dsn)
            )
        frozen >> Write(task_id="after", dsn=dsn)
    finished = run(dag)

    assert finished.states == dict.fromkeys(finished.states, "success")
    assert (finished.xcoms["frozen.snapshot"], finished.xcoms["after"]) == ("frozen", "writable")
    assert finished.xcoms["frozen.gate"] == finished.xcoms["frozen.pause"]["token"]


def test_two_groups_in_a_row_freeze_the_same_database_twice(connection, app_database, connect, server, new_dag, run):
    conn_id, dsn = connection(app_database), server.dsn(app_database, "app")
    with new_dag() as dag:
        with pg_frozen("first", postgres_conn_id=conn_id, checkpoint="none") as first:
            Write(task_id="snapshot", dsn=dsn)
        with pg_frozen("second", postgres_conn_id=conn_id, checkpoint="none") as second:
            Write(task_id="snapshot", dsn=dsn)
        first >> second
    finished = run(dag)

    assert finished.state == "success"
    assert finished.xcoms["first.snapshot"] == finished.xcoms["second.snapshot"] == "frozen"
    assert len({freeze.token for freeze in history(connect)[:2]}) == 2


def test_the_same_holder_may_freeze_twice_in_one_run(connection, app_database, server, new_dag, run):
    conn_id, dsn = connection(app_database), server.dsn(app_database, "app")
    with new_dag() as dag:
        with pg_frozen("first", postgres_conn_id=conn_id, holder="me", checkpoint="none") as first:
            Write(task_id="snapshot", dsn=dsn)
        with pg_frozen("second", postgres_conn_id=conn_id, holder="me", checkpoint="none") as second:
            Write(task_id="snapshot", dsn=dsn)
        first >> second

    assert run(dag).xcoms["second.snapshot"] == "frozen"


def test_a_mapped_group_freezes_each_database_for_itself(connection, new_database, server, new_dag, run):
    names = [new_database(), new_database()]
    conn_id = connection(None)
    with new_dag() as dag:

        @task_group
        def backup(name: str) -> None:
            with pg_frozen(postgres_conn_id=conn_id, database=name, checkpoint="none") as frozen:

                @task
                def snapshot(freeze: Any) -> Any:
                    return freeze

                snapshot(frozen.freeze)

        backup.expand(name=names)
    finished = run(dag)

    assert finished.state == "success"
    assert set(finished.states.values()) == {"success"}


def test_a_snapshot_that_outlives_its_freeze_is_red_and_the_next_does_not_begin(
    connection, app_database, app_connect, server, new_dag, run
):
    conn_id, dsn = connection(app_database), server.dsn(app_database, "app")
    with new_dag() as dag, pg_frozen(postgres_conn_id=conn_id, checkpoint="none"):
        # Somebody thaws while this task runs: it is that somebody itself.
        outlived = PgResumeOperator(
            task_id="outlived", postgres_conn_id=conn_id, holder="x", force=True, trigger_rule="all_success"
        )
        outlived >> Write(task_id="next", dsn=dsn, trigger_rule="all_done")
    finished = run(dag)

    assert finished.states == {
        "frozen.pause": "success",
        "frozen.outlived": "failed",
        "frozen.next": "failed",
        "frozen.resume": "success",
        "frozen.gate": "failed",
    }
    assert finished.state == "failed"
    assert finished.xcoms["frozen.outlived"] is None, "a result that is not to be trusted was handed on"
    app_connect(app_database).execute("CREATE TABLE writable ()")


def test_a_snapshot_under_a_second_freeze_of_the_same_holder_is_red(
    connection, app_database, connect, server, new_dag, run
):
    conn_id = connection(app_database)
    with new_dag() as dag, pg_frozen(postgres_conn_id=conn_id, holder="me", checkpoint="none"):

        @task
        def snapshot() -> None:
            resume(connect, databases=[app_database], holder="me")
            pause(connect, databases=[app_database], holder="me")

        snapshot()

    assert run(dag).states["frozen.snapshot"] == "failed"


def test_the_gate_is_red_when_snapshots_ran_under_different_freezes(connection, app_database, connect, new_dag, run):
    conn_id = connection(app_database)
    with new_dag() as dag, pg_frozen(postgres_conn_id=conn_id, holder="me", checkpoint="none"):

        def again(context) -> None:
            resume(connect, databases=[app_database], holder="me")
            pause(connect, databases=[app_database], holder="me")

        (
            BashOperator(task_id="rows", bash_command="true", on_success_callback=again)
            >> BashOperator(task_id="files", bash_command="true")
        )
    finished = run(dag)

    assert finished.states["frozen.rows"] == finished.states["frozen.files"] == "success"
    assert finished.states["frozen.gate"] == finished.state == "failed"


def test_a_snapshot_does_not_begin_with_too_little_of_the_lease_left(connection, app_database, new_dag, run):
    conn_id = connection(app_database)
    much = timedelta(minutes=2)
    with new_dag() as dag, pg_frozen(postgres_conn_id=conn_id, checkpoint="none", lease=60, lease_left=much):
        BashOperator(task_id="snapshot", bash_command="true")

    assert run(dag).states["frozen.snapshot"] == "failed"


def test_the_hooks_of_the_author_run_within_the_guard(connection, app_database, new_dag, run):
    conn_id, seen = connection(app_database), []
    with new_dag() as dag, pg_frozen(postgres_conn_id=conn_id, checkpoint="none"):
        BashOperator(
            task_id="snapshot",
            bash_command="echo made",
            pre_execute=lambda _: seen.append("before"),
            post_execute=lambda _, result: seen.append(result),
        )

    assert run(dag).state == "success"
    assert seen == ["before", "made"]


def test_a_failed_snapshot_leaves_the_run_red_and_the_database_writable(
    connection, app_database, app_connect, new_dag, run
):
    conn_id = connection(app_database)
    with new_dag() as dag:
        with pg_frozen(postgres_conn_id=conn_id, checkpoint="none") as frozen:
            BashOperator(task_id="snapshot", bash_command="false")
        frozen >> EmptyOperator(task_id="after")
    finished = run(dag)

    assert finished.state == "failed"
    assert finished.states["after"] == "upstream_failed"
    app_connect(app_database).execute("CREATE TABLE writable ()")


def test_a_pause_that_is_refused_leaves_the_run_red(connection, new_dag, run):
    conn_id = connection("no such database")
    with new_dag() as dag, pg_frozen(postgres_conn_id=conn_id):
        BashOperator(task_id="snapshot", bash_command="true")
    finished = run(dag)

    assert finished.state == "failed"
    assert finished.states["frozen.snapshot"] == "upstream_failed"


def test_a_branch_may_skip_a_part_of_the_block(connection, app_database, new_dag, run):
    conn_id = connection(app_database)
    with new_dag(fail_fast=True) as dag:
        with pg_frozen(postgres_conn_id=conn_id, checkpoint="none") as frozen:

            @task
            def skipped() -> None:
                raise AirflowSkipException

            skipped()
            BashOperator(task_id="snapshot", bash_command="true")
        frozen >> EmptyOperator(task_id="after")
    finished = run(dag)

    assert finished.states["frozen.skipped"] == "skipped"
    assert finished.states["frozen.gate"] == finished.states["after"] == "success"


def test_a_clean_up_in_the_block_runs_even_when_the_freeze_is_lost(connection, app_database, connect, new_dag, run):
    conn_id = connection(app_database)
    with new_dag() as dag, pg_frozen(postgres_conn_id=conn_id, checkpoint="none"):

        @task
        def snapshot() -> None:
            resume(connect, databases=[app_database], holder="somebody", force=True)
            raise AirflowFailException("the volume is full")

        setup = BashOperator(task_id="mount", bash_command="true").as_setup()
        clean_up = BashOperator(task_id="unmount", bash_command="true").as_teardown(setups=setup)
        setup >> snapshot() >> clean_up
    finished = run(dag)

    assert finished.states["frozen.unmount"] == "success"
    assert finished.state == "failed"
