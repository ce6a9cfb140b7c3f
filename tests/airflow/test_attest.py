from datetime import timedelta

import pytest
from airflow.providers.standard.operators.python import PythonOperator

from airflow_pg_freeze.operators import PgAttestOperator, PgPauseOperator, PgResumeOperator
from pg_freeze import attest


@pytest.fixture
def attested(connection, app_database, new_dag, run):
    def go(snapshot, **options):
        conn_id = connection(app_database)
        with new_dag() as dag:
            (
                PgPauseOperator(task_id="pause", postgres_conn_id=conn_id, admit="readers")
                >> PgAttestOperator(task_id="before", moment="before", postgres_conn_id=conn_id)
                >> PythonOperator(task_id="snapshot", python_callable=snapshot)
                >> PgAttestOperator(
                    task_id="after",
                    moment="after",
                    postgres_conn_id=conn_id,
                    retries=2,
                    retry_delay=timedelta(0),
                    **options,
                )
                >> PgResumeOperator(task_id="resume", postgres_conn_id=conn_id)
            )
        return run(dag)

    return go


def test_a_snapshot_of_a_database_that_stood_still_is_certified(attested):
    finished = attested(lambda: None)
    assert finished.states["after"] == "success"
    assert finished.xcoms["before"]["level"] is None
    found = finished.xcoms["after"]
    assert (found["level"], found["certified"], found["violations"]) == ("quiesced", True, [])
    assert found["token"] == finished.xcoms["pause"]["token"]


def test_a_level_that_is_not_reached_fails_at_once(attested, capfd):
    finished = attested(lambda: None, require="strict")
    assert (finished.states["after"], finished.tries["after"]) == ("failed", 1)
    assert finished.states["resume"] == "success"
    said = capfd.readouterr()
    assert "strict is required" in said.out + said.err


def test_a_violation_fails_the_task_and_stays_in_the_journal(attested, connect, server, app_database, capfd):
    def break_in() -> None:
        server.execute(f'ALTER ROLE app IN DATABASE "{app_database}" SET default_transaction_read_only = off')

    finished = attested(break_in)
    assert (finished.states["after"], finished.tries["after"]) == ("failed", 1)
    said = capfd.readouterr()
    assert "a role setting overrides the freeze: app" in said.out + said.err
    with connect() as conn:
        (kept,) = attest.of_token(conn, finished.xcoms["pause"]["token"])
    assert kept.level == "crash-only"
    assert [violation.code for violation in kept.violations] == ["role-override"]


def test_without_a_freeze_nothing_is_attested(connection, app_database, new_dag, run):
    with new_dag() as dag:
        PgAttestOperator(
            task_id="before",
            moment="before",
            postgres_conn_id=connection(app_database),
            retries=2,
            retry_delay=timedelta(0),
        )
    finished = run(dag)
    assert (finished.states["before"], finished.tries["before"]) == ("failed", 1)
