from datetime import timedelta

import psycopg
import pytest

from airflow_pg_freeze.operators import PgCheckpointOperator, PgPauseOperator, PgResumeOperator
from devtools.asking import pause
from devtools.pgserver import password
from devtools.rights import checkpointer, keep_private
from pg_freeze import LeaseLost, checkpoint, resume, status


def test_a_dag_freezes_checkpoints_and_thaws(connection, server, app_database, app_connect, new_dag, run, capfd):
    conn_id = connection(app_database)
    with new_dag() as dag:
        (
            PgPauseOperator(task_id="pause", postgres_conn_id=conn_id)
            >> PgCheckpointOperator(task_id="checkpoint", postgres_conn_id=conn_id)
            >> PgResumeOperator(task_id="resume", postgres_conn_id=conn_id)
        )
    finished = run(dag)

    assert finished.states == {"pause": "success", "checkpoint": "success", "resume": "success"}
    frozen, checkpointed, resumed = (finished.xcoms[task] for task in ("pause", "checkpoint", "resume"))
    assert frozen["state"] == "frozen"
    assert frozen["holder"] == f"{dag.dag_id}/{finished.run_id}"
    assert frozen["databases"] == [app_database]
    assert checkpointed["token"] == frozen["token"]
    assert checkpointed["checkpoint_lsn"]
    assert [freeze["token"] for freeze in resumed["thawed"]] == [frozen["token"]]
    app_connect(app_database).execute("CREATE TABLE writable ()")
    said = capfd.readouterr()
    assert frozen["token"] in said.out + said.err
    assert password(checkpointer(server.version)) not in said.out + said.err


def test_a_paused_database_can_be_read_and_not_written(connection, connect, app_database, app_connect, new_dag, run):
    with new_dag() as dag:
        PgPauseOperator(task_id="pause", postgres_conn_id=connection(app_database), holder="somebody", checkpoint=True)
    frozen = run(dag).xcoms["pause"]

    assert frozen["holder"] == "somebody"
    assert frozen["checkpoint_lsn"]
    client = app_connect(app_database)
    assert client.execute("SELECT 1").fetchone() == (1,)
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        client.execute("CREATE TABLE writable ()")
    resume(connect, databases=[app_database], holder="somebody")


def test_privileges_are_revoked_and_given_back_by_tasks(connection, app_database, app_connect, server, new_dag, run):
    server.execute("GRANT app TO freezer")
    keep_private(server, app_database)
    app_connect(app_database).execute("CREATE TABLE things (name text)")
    common = {"postgres_conn_id": connection(app_database), "holder": "privileges"}

    def refused(_: object) -> None:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            app_connect(app_database).execute("INSERT INTO things VALUES ('not written')")

    with new_dag() as dag:
        pause = PgPauseOperator(task_id="pause", strategy="privileges", **common)
        pause >> PgResumeOperator(task_id="resume", pre_execute=refused, **common)
    finished = run(dag)
    paused, resumed = finished.xcoms["pause"], finished.xcoms["resume"]

    assert (paused["strategy"], paused["roles"]) == ("privileges", [])
    assert [freeze["token"] for freeze in resumed["thawed"]] == [paused["token"]]
    app_connect(app_database).execute("INSERT INTO things VALUES ('written')")


def test_databases_holder_and_times_are_templates(connection, connect, new_database, new_dag, run):
    one, two = new_database(), new_database()
    with new_dag(params={"one": one, "two": two, "lease": 300, "conn": connection(None)}) as dag:
        PgPauseOperator(
            task_id="pause",
            postgres_conn_id="{{ params.conn }}",
            database=["{{ params.one }}", "{{ params.two }}"],
            holder="{{ dag.dag_id }} of {{ params.one }}",
            lease="{{ params.lease }}",
            drain_timeout="{{ params.lease / 100 }}",
            admit="{{ 'nobody' if params.lease else 'readers' }}",
        ) >> PgCheckpointOperator(
            task_id="checkpoint",
            postgres_conn_id="pg",
            database="{{ params.two }}",
            holder="{{ dag.dag_id }} of {{ params.one }}",
        )
    finished = run(dag)

    frozen = finished.xcoms["pause"]
    assert finished.states["checkpoint"] == "success"
    assert sorted(frozen["databases"]) == sorted([one, two])
    assert frozen["holder"] == f"{dag.dag_id} of {one}"
    assert frozen["admit"] == "nobody"
    freeze = status(connect, databases=[one]).freezes[0]
    assert timedelta(seconds=295) < freeze.lease_until - freeze.requested_at < timedelta(seconds=305)
    resume(connect, databases=[one, two], holder=frozen["holder"])


def test_a_database_that_another_has_frozen_is_refused_without_retries(connection, connect, app_database, new_dag, run):
    mine = pause(connect, databases=[app_database], holder="night shift")
    with new_dag() as dag:
        PgPauseOperator(task_id="pause", postgres_conn_id=connection(app_database), retries=2, retry_delay=timedelta(0))
    finished = run(dag)

    assert finished.states == {"pause": "failed"}
    assert finished.tries == {"pause": 1}
    assert status(connect, databases=[app_database]).freezes == (mine,)
    resume(connect, databases=[app_database], holder="night shift")


@pytest.mark.parametrize(
    "arguments",
    [
        {"lease": "{{ 'soon' }}"},
        {"drain_timeout": "{{ -1 }}"},
        {"admit": "{{ 'all' }}"},
        {"database": ""},
        {"database": "no_such"},
    ],
    ids=lambda arguments: "{}={}".format(*next(iter(arguments.items()))),
)
def test_a_request_that_makes_no_sense_fails_without_retries(arguments, connection, new_dag, run):
    with new_dag() as dag:
        PgPauseOperator(
            task_id="pause",
            postgres_conn_id=connection(None),
            **{"database": "some", "retries": 2, "retry_delay": timedelta(0), **arguments},
        )
    finished = run(dag)

    assert finished.states == {"pause": "failed"}
    assert finished.tries == {"pause": 1}


def test_a_drain_timeout_is_retried_and_leaves_nothing_frozen(
    connection, connect, app_database, app_connect, new_dag, run, capfd
):
    client = app_connect(app_database)
    client.execute("BEGIN")
    client.execute("CREATE TABLE mine ()")
    with new_dag() as dag:
        PgPauseOperator(
            task_id="pause",
            postgres_conn_id=connection(app_database),
            drain_timeout=2,
            on_drain_timeout="abort",
            retries=1,
            retry_delay=timedelta(0),
        )
    finished = run(dag)

    assert finished.states == {"pause": "failed"}
    assert finished.tries == {"pause": 2}
    assert status(connect, databases=[app_database]).freezes == ()
    client.execute("COMMIT")
    said = capfd.readouterr()
    assert "Draining for " in said.out + said.err
    assert f"pid {client.info.backend_pid} of" in said.out + said.err


def test_a_resume_after_the_task_began_keeps_it_from_freezing(connection, connect, app_database, new_dag, run):
    def resume_meanwhile(_: object) -> None:
        resume(connect, databases=[app_database], holder="me")

    resume_meanwhile(None)
    pause(connect, databases=[app_database], holder="me")
    with new_dag() as dag:
        PgPauseOperator(
            task_id="pause", postgres_conn_id=connection(app_database), holder="me", pre_execute=resume_meanwhile
        )
    finished = run(dag)

    assert finished.states == {"pause": "failed"}
    assert status(connect, databases=[app_database]).freezes == ()


def test_a_checkpoint_of_a_database_that_is_not_frozen_fails(connection, app_database, new_dag, run):
    with new_dag() as dag:
        PgCheckpointOperator(task_id="checkpoint", postgres_conn_id=connection(app_database))

    assert run(dag).states == {"checkpoint": "failed"}


def test_a_resume_succeeds_when_nothing_is_frozen(connection, app_database, new_dag, run):
    with new_dag() as dag:
        PgResumeOperator(task_id="resume", postgres_conn_id=connection(app_database))
    finished = run(dag)

    assert finished.states == {"resume": "success"}
    assert finished.xcoms["resume"]["thawed"] == []


def test_a_resume_leaves_the_freeze_of_another_alone_unless_forced(connection, connect, app_database, new_dag, run):
    theirs = pause(connect, databases=[app_database], holder="night shift")
    with new_dag() as dag:
        PgResumeOperator(task_id="polite", postgres_conn_id=connection(app_database)) >> PgResumeOperator(
            task_id="forced", postgres_conn_id="pg", force=True
        )
    finished = run(dag)

    assert finished.state == "success"
    assert [freeze["token"] for freeze in finished.xcoms["polite"]["held_by_others"]] == [str(theirs.token)]
    assert [freeze["token"] for freeze in finished.xcoms["forced"]["thawed"]] == [str(theirs.token)]
    with pytest.raises(LeaseLost):
        checkpoint(connect, databases=[app_database], holder="night shift")


def test_a_resume_runs_whatever_happened_and_is_retried_soon(new_dag):
    with new_dag():
        resume_task = PgResumeOperator(task_id="resume")

    assert resume_task.trigger_rule == "all_done"
    assert resume_task.retries == 3
    assert resume_task.retry_delay == timedelta(seconds=5)
    assert resume_task.priority_weight > PgPauseOperator(task_id="pause").priority_weight


def test_an_author_can_choose_how_a_resume_is_retried(new_dag):
    with new_dag(default_args={"retries": 1, "retry_delay": timedelta(seconds=1), "priority_weight": 7}):
        by_default_args = PgResumeOperator(task_id="by_default_args")
        by_argument = PgResumeOperator(task_id="by_argument", retries=9)

    assert (by_default_args.retries, by_default_args.priority_weight) == (1, 7)
    assert by_default_args.retry_delay == timedelta(seconds=1)
    assert by_argument.retries == 9
