"""What an operator writes as ``attestation_file`` is what ``pg-freeze verify-copy --attestation`` takes."""

import pytest
from airflow.providers.common.compat.sdk import task

from airflow_pg_freeze.operators import PgAttestOperator, PgPauseOperator, PgResumeOperator
from devtools.rights import create_application_database
from tests.server.copies import copied, scratch, verify

DATABASE = "app_1"


@pytest.fixture
def place():
    with scratch() as place:
        yield place


@pytest.fixture
def conn_id(own_server, connection):
    create_application_database(own_server, DATABASE)
    own_server.execute("GRANT app TO freezer")
    return connection(DATABASE, server=own_server)


def check_taken(copy, server, file):
    found = verify(copy, server, attestation=file)
    assert found.problems == ()
    assert "the attestation that was given" in found.looked_at
    assert not [one for one in found.unseen if one.startswith("the sizes")]


def test_the_file_of_the_second_attestation_is_taken(own_server, conn_id, place, new_dag, run):
    file = place / "attestation.json"
    with new_dag() as dag:
        server = {"postgres_conn_id": conn_id}

        @task
        def snapshot():
            copied(own_server.data, place / "copy")

        (
            PgPauseOperator(task_id="pause", **server)
            >> PgAttestOperator(task_id="before", moment="before", **server)
            >> snapshot()
            >> PgAttestOperator(
                task_id="after",
                moment="after",
                require=None,
                attestation_file=f"{place}/{{{{ 'attestation' }}}}.json",
                **server,
            )
            >> PgResumeOperator(task_id="resume", **server)
        )
    finished = run(dag)

    assert finished.state == "success", finished.states
    check_taken(place / "copy", own_server, file)


def test_the_file_of_a_frozen_task_is_taken(own_server, conn_id, place, new_dag, run):
    file = place / "attestation.json"
    with new_dag() as dag:

        @task.pg_frozen(postgres_conn_id=conn_id, attestation_file=str(file))
        def snapshot():
            copied(own_server.data, place / "copy")

        snapshot()
    finished = run(dag)

    assert finished.state == "success", finished.states
    check_taken(place / "copy", own_server, file)


def test_a_file_that_cannot_be_written_fails_the_task_before_anything_is_frozen(
    own_server, conn_id, place, new_dag, run, capfd
):
    with new_dag() as dag:

        @task.pg_frozen(postgres_conn_id=conn_id, attestation_file=str(place / "nowhere" / "file"), retries=2)
        def snapshot():
            raise AssertionError("must not be called")

        snapshot()
    finished = run(dag)

    assert (finished.states["snapshot"], finished.tries["snapshot"]) == ("failed", 1)
    assert "cannot be written" in "".join(capfd.readouterr())
    assert own_server.execute("SELECT to_regnamespace('pgfreeze')") == [(None,)]
