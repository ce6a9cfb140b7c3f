"""The volume operator and its DAG on a real btrfs."""

from pathlib import Path

import psycopg
import pytest

from airflow_pg_freeze.operators.volume import VolumeSnapshotOperator
from devtools import volumes
from devtools.asking import pause
from devtools.pgserver import Server
from devtools.rights import create_application_database, create_roles
from pg_freeze import history, resume, status
from tests.airflow.cloud import load

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def mounted():
    with volumes.btrfs("data", "files") as mounted:
        (mounted / "snapshots").mkdir()
        yield mounted


@pytest.mark.needs("volumes")
def test_the_dag_snapshots_a_frozen_cluster_with_its_files_and_a_server_runs_on_the_copy(
    connection, run, mounted, pg_version
):
    with Server(pg_version, data=mounted / "data" / "cluster") as server:
        create_roles(server)
        create_application_database(server, "app")
        with psycopg.connect(server.dsn("app", "app"), autocommit=True) as client:
            client.execute("CREATE TABLE photos AS SELECT generate_series(1, 100) AS id")
        for number in range(1, 101):
            (mounted / "files" / str(number)).touch()
        finished = run(
            load("btrfs_snapshot"),
            freeze_conn_id=connection("app", server=server),
            data=str(mounted / "data"),
            files=str(mounted / "files"),
            directory=str(mounted / "snapshots"),
        )
        assert finished.state == "success", finished.states
        (freeze,) = history(server.connect_factory())
        assert status(server.connect_factory(), databases=["app"]).freezes == ()
        with psycopg.connect(server.dsn("app", "app"), autocommit=True) as client:
            client.execute("INSERT INTO photos VALUES (101)")

    made = finished.xcoms["frozen.snapshot"]
    assert made["token"] == str(freeze.token)
    data = Path(made["snapshots"][f"btrfs:{mounted}/data"])
    files = Path(made["snapshots"][f"btrfs:{mounted}/files"])
    assert data.parent == files.parent == mounted / "snapshots"
    with Server(pg_version, data=volumes.writable(data, "copy") / "cluster") as restored:
        restored.execute("CALL pgfreeze.thaw_all()")
        rows = {str(row[0]) for row in restored.execute("SELECT id FROM photos", "app")}
    assert rows == {path.name for path in files.iterdir()} == {str(number) for number in range(1, 101)}


@pytest.mark.needs("volumes")
def test_a_snapshot_of_one_volume_is_deleted_when_the_other_fails_and_the_database_is_thawed(
    connection, connect, app_database, app_connect, run, mounted
):
    finished = run(
        load("btrfs_snapshot"),
        freeze_conn_id=connection(app_database),
        data=str(mounted / "data"),
        files=str(mounted / "nowhere"),
        directory=str(mounted / "snapshots"),
    )

    assert finished.state == "failed"
    assert finished.states["frozen.snapshot"] == "failed"
    assert list((mounted / "snapshots").iterdir()) == []
    assert status(connect, databases=[app_database]).freezes == ()
    app_connect(app_database).execute("CREATE TABLE writable ()")


@pytest.mark.needs("volumes")
def test_a_second_try_adopts_what_the_first_has_made(connection, connect, app_database, new_dag, run, mounted):
    conn_id = connection(app_database)
    pause(connect, databases=[app_database], holder="me")
    with new_dag() as dag:
        for number in (1, 2):
            VolumeSnapshotOperator(
                task_id=f"snapshot_{number}",
                volumes=[f"btrfs:{mounted}/data"],
                postgres_conn_id=conn_id,
                holder="me",
            )
    finished = run(dag)
    resume(connect, databases=[app_database], holder="me")

    assert finished.state == "success"
    adopted = [finished.xcoms[f"snapshot_{number}"]["adopted"] for number in (1, 2)]
    assert sorted(map(len, adopted)) == [0, 1]


def test_without_a_freeze_no_command_is_run(connection, app_database, new_dag, run, capfd):
    with new_dag() as dag:
        VolumeSnapshotOperator(
            task_id="snapshot", volumes=["zfs:tank/data"], postgres_conn_id=connection(app_database), retries=3
        )
    finished = run(dag)

    assert (finished.states["snapshot"], finished.tries["snapshot"]) == ("failed", 1)
    said = capfd.readouterr()
    assert "not frozen by" in said.out + said.err


def test_a_volume_that_is_none_fails_at_once_and_says_what_one_looks_like(
    connection, connect, app_database, new_dag, run, capfd
):
    with new_dag() as dag:
        VolumeSnapshotOperator(
            task_id="snapshot", volumes=["{{ '/srv/data' }}"], postgres_conn_id=connection(app_database), retries=3
        )
    finished = run(dag)

    assert (finished.states["snapshot"], finished.tries["snapshot"]) == ("failed", 1)
    said = capfd.readouterr()
    assert "such as btrfs:/srv/data" in said.out + said.err
