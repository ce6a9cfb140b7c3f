"""The RDS operator and its DAG on a real PostgreSQL and a moto server."""

from datetime import timedelta
from itertools import count

import pytest

from airflow_pg_freeze.operators.rds import RdsSnapshotOperator
from airflow_pg_freeze.snapshots import tags as tagging
from devtools import aws
from devtools.asking import pause
from devtools.aws import Fault
from pg_freeze import history, resume, status
from tests.airflow.cloud import load

_numbers = count(1)
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def database_instance(moto_port):
    name = f"instance-{next(_numbers)}"
    aws.client("rds", moto_port).create_db_instance(
        DBInstanceIdentifier=name, Engine="postgres", DBInstanceClass="db.t3.micro", AllocatedStorage=20
    )
    return name


@pytest.fixture
def cluster(moto_port):
    name = f"cluster-{next(_numbers)}"
    aws.client("rds", moto_port).create_db_cluster(
        DBClusterIdentifier=name, Engine="aurora-postgresql", MasterUsername="freezer", MasterUserPassword="long enough"
    )
    return name


@pytest.fixture
def snapshot(connection, connect, app_database, new_dag, run):
    """Runs the operator in a freeze of its own, and returns what became of it."""

    def snapshot(**arguments):
        pause(connect, databases=[app_database], holder="me")
        with new_dag() as dag:
            RdsSnapshotOperator(
                task_id="snapshot",
                postgres_conn_id=connection(app_database),
                holder="me",
                **{"delete_partial": True, "poke_interval": 0.2, "max_wait": 10, **arguments},
            )
        try:
            return run(dag)
        finally:
            resume(connect, databases=[app_database], holder="me")

    return snapshot


def snapshots_of(moto_port, name):
    rds = aws.client("rds", moto_port)
    return rds.describe_db_snapshots(DBInstanceIdentifier=name, SnapshotType="manual")["DBSnapshots"]


def test_the_dag_thaws_when_the_snapshot_is_available_also_where_checkpoint_is_not_allowed(
    connection, connect_to, own_server, new_database, app_connect, run, proxy, database_instance, moto_port, pg_version
):
    if pg_version >= 15:
        own_server.execute("REVOKE pg_checkpoint FROM freezer")
    database = new_database(own_server)
    looks = []

    def told(action):
        if action == "DescribeDBSnapshots":
            looks.append(proxy.requests[-1].at)
        return "creating" if len(looks) < 2 else None

    proxy.told = told
    finished = run(
        load("rds_snapshot"),
        freeze_conn_id=connection(database, user="freezer", server=own_server),
        aws_conn_id="aws_default",
        db_identifier=database_instance,
    )

    assert finished.state == "success", finished.states
    connect = connect_to(own_server)
    (freeze,) = history(connect)
    assert len(looks) == 2
    assert freeze.frozen_at < looks[0] < looks[1] < freeze.restored_at
    (made,) = snapshots_of(moto_port, database_instance)
    assert made["DBSnapshotIdentifier"] == finished.xcoms["frozen.snapshot"]["db_snapshot_identifier"]
    assert str(freeze.token) in made["DBSnapshotIdentifier"]
    tags = tagging.as_dict(made["TagList"])
    assert (tags["pg-freeze:token"], tagging.databases_of(tags)) == (str(freeze.token), (database,))
    assert status(connect, databases=[database]).freezes == ()
    app_connect(database, server=own_server).execute("CREATE TABLE writable ()")


def test_a_snapshot_that_was_accepted_although_the_answer_was_lost_is_adopted(
    snapshot, proxy, database_instance, moto_port
):
    proxy.faults = [Fault("CreateDBSnapshot", "cut-after")]

    finished = snapshot(db_identifier=database_instance)

    assert finished.states["snapshot"] == "success"
    assert finished.xcoms["snapshot"]["adopted"]
    assert len(snapshots_of(moto_port, database_instance)) == 1


def test_a_retry_adopts_what_an_earlier_try_has_begun(snapshot, proxy, database_instance, moto_port):
    proxy.told = lambda _: "creating" if len(proxy.actions("CreateDBSnapshot")) < 2 else None

    finished = snapshot(
        db_identifier=database_instance, delete_partial=False, max_wait=3, retries=1, retry_delay=timedelta(0)
    )

    assert (finished.states["snapshot"], finished.tries["snapshot"]) == ("success", 2)
    assert finished.xcoms["snapshot"]["adopted"]
    assert len(snapshots_of(moto_port, database_instance)) == 1


def test_a_cluster_is_snapshotted_too(snapshot, proxy, cluster, moto_port):
    finished = snapshot(db_identifier=cluster, db_type="cluster")

    assert finished.states["snapshot"] == "success"
    rds = aws.client("rds", moto_port)
    (made,) = rds.describe_db_cluster_snapshots(DBClusterIdentifier=cluster, SnapshotType="manual")[
        "DBClusterSnapshots"
    ]
    assert made["DBClusterSnapshotArn"] == finished.xcoms["snapshot"]["arn"]


@pytest.mark.parametrize(
    ("state", "fault", "says"),
    [
        ("failed", None, "is 'failed' and will not become available"),
        ("creating", None, "give a longer lease"),
        (None, Fault("CreateDBSnapshot", "refuse", 9, "AccessDenied", 403), "Allow CreateDBSnapshot to the identity"),
        (None, Fault("CreateDBSnapshot", "refuse", 9, "SnapshotQuotaExceeded", 400), "Nothing that a retry would cure"),
    ],
    ids=["failed", "too slow", "denied", "quota"],
)
def test_what_fails_says_so_and_leaves_no_snapshot(
    snapshot, proxy, database_instance, moto_port, state, fault, says, capfd
):
    proxy.told = lambda _: state
    proxy.faults = [] if fault is None else [fault]

    finished = snapshot(db_identifier=database_instance, max_wait=3)

    assert finished.states["snapshot"] == "failed"
    assert snapshots_of(moto_port, database_instance) == []
    said = capfd.readouterr()
    assert says in said.out + said.err


def test_a_freeze_that_ends_meanwhile_fails_the_task_at_once(
    snapshot, connect, app_database, proxy, database_instance, moto_port
):
    def told(action):
        if action == "DescribeDBSnapshots":
            resume(connect, databases=[app_database], holder="me")
        return "creating"

    proxy.told = told

    finished = snapshot(db_identifier=database_instance, max_wait=300)

    assert finished.states["snapshot"] == "failed"
    assert len(proxy.actions("DescribeDBSnapshots")) == 1
    assert snapshots_of(moto_port, database_instance) == []
