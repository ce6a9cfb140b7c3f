"""The EBS operators and their DAG on a real PostgreSQL and a moto server, through whatever AWS may do meanwhile."""

import os
from datetime import timedelta

import pytest
from airflow.providers.standard.operators.empty import EmptyOperator

from airflow_pg_freeze.operators.attest import PgAttestOperator
from airflow_pg_freeze.operators.ebs import (
    EbsCertifySnapshotsOperator,
    EbsCreateSnapshotsOperator,
    EbsSnapshotsLink,
)
from airflow_pg_freeze.sensors.ebs import EbsSnapshotCompletedSensor
from airflow_pg_freeze.snapshots import SnapshotRefused
from airflow_pg_freeze.snapshots import tags as tagging
from airflow_pg_freeze.snapshots.ebs import certify
from airflow_pg_freeze.task_group import pg_frozen
from devtools.asking import pause
from devtools.aws import Fault
from pg_freeze import history, resume, status
from pg_freeze.model import iso
from tests.airflow.cloud import load, snapshots_of, volumes_of
from tests.airflow.running import eventually

# Nothing here depends on the version of the server.
pytestmark = [pytest.mark.pg(">=18"), pytest.mark.timeout(300)]


@pytest.fixture
def frozen_snapshot(connection, app_database, new_dag):
    """A DAG that snapshots volumes of a frozen database, and does not wait for long."""

    def create(**arguments):
        conn_id = connection(app_database)
        with new_dag() as dag, pg_frozen(postgres_conn_id=conn_id, checkpoint="in-pause") as frozen:
            EbsCreateSnapshotsOperator(
                task_id="snapshots",
                postgres_conn_id=conn_id,
                holder=frozen.holder,
                **{"max_wait": 8, "delete_partial": True, **arguments},
            )
        return dag

    return create


def assert_thawed(connect, database, app_connect):
    assert status(connect, databases=[database]).freezes == ()
    with app_connect(database) as client:
        client.execute("CREATE TABLE IF NOT EXISTS writable ()")


def freeze_of(connect, database):
    (found,) = (freeze for freeze in history(connect) if database in freeze.databases)
    return found


def test_the_dag_thaws_when_the_snapshots_are_accepted_and_not_when_they_are_copied(
    connection, connect, app_database, app_connect, run, proxy, instance, moto_port
):
    looks = []

    def told(action):
        if action == "DescribeSnapshots" and proxy.actions("CreateSnapshots"):
            looks.append(proxy.requests[-1].at)
        return "pending" if len(looks) < 2 else None

    proxy.told, proxy.progress = told, lambda: 40
    finished = run(
        load("ebs_snapshot"), freeze_conn_id=connection(app_database), aws_conn_id="aws_default", instance_id=instance
    )

    assert finished.state == "success", finished.states
    assert finished.tries["frozen.snapshots"] == 1
    made = finished.xcoms["frozen.snapshots"]
    assert set(made["volumes"].values()) == set(volumes_of(moto_port, instance)[1:])
    assert finished.xcoms["completed"] == {"snapshot_ids": made["snapshot_ids"]}
    freeze = freeze_of(connect, app_database)
    accepted = proxy.actions("CreateSnapshots")[0].at
    assert freeze.frozen_at < accepted < freeze.restored_at < looks[1]
    assert (freeze.restored_at - freeze.barrier_at) < timedelta(seconds=60)
    attested = finished.xcoms["frozen.attest_after"]
    for snapshot in snapshots_of(moto_port, volumes_of(moto_port, instance)):
        tags = tagging.as_dict(snapshot["Tags"])
        assert (tags["certified"], tags["pg-freeze:level"]) == (str(attested["certified"]).lower(), attested["level"])
        assert tags["pg-freeze:token"] == str(freeze.token) == made["token"]
        assert tags["pg-freeze:checkpoint-lsn"] == freeze.checkpoint_lsn
        assert tagging.databases_of(tags) == (app_database,)
        assert tags["pg-freeze:run"] == tagging.encode(finished.run_id)
    assert_thawed(connect, app_database, app_connect)


def test_a_retry_adopts_what_was_accepted_although_the_answer_was_lost(
    frozen_snapshot, connect, app_database, app_connect, run, proxy, instance, moto_port
):
    # Whoever looks afterwards is throttled for longer than a try lasts, so that the first ends without knowing.
    proxy.faults = [
        Fault("CreateSnapshots", "cut-after"),
        Fault("DescribeSnapshots", "refuse", 8, code="RequestLimitExceeded", status=503, skip=1),
    ]
    dag = frozen_snapshot(instance_id=instance, delete_partial=False, retries=5, retry_delay=timedelta(seconds=0))

    finished = run(dag)

    assert finished.state == "success"
    assert finished.tries["frozen.snapshots"] >= 2
    assert len(proxy.actions("CreateSnapshots", "CreateSnapshot")) == 1
    assert len(snapshots_of(moto_port, volumes_of(moto_port, instance))) == 3
    assert_thawed(connect, app_database, app_connect)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("CreateSnapshot", "refuse", 99, code="RequestLimitExceeded", status=503, skip=1), "no time is left"),
        (Fault("CreateSnapshot", "refuse", 99, code="InternalError", status=500, skip=1), "no time is left"),
        (Fault("CreateSnapshot", "cut", 99, skip=1), "ConnectionClosedError"),
        (Fault("CreateSnapshot", "cut", 99, skip=1, seconds=9), "ReadTimeoutError"),
        (
            Fault("CreateSnapshot", "refuse", 99, code="UnauthorizedOperation", status=403, skip=1),
            "Allow CreateSnapshot to the identity",
        ),
        (Fault("DescribeSnapshots", "refuse", 1, code="AuthFailure", status=401), "other credentials"),
    ],
    ids=["throttled", "500", "cut", "hangs", "denied", "credentials"],
)
def test_whatever_aws_does_the_run_fails_clearly_thawed_and_without_a_snapshot_left(
    frozen_snapshot, connect, app_database, app_connect, run, proxy, volumes, moto_port, fault, says, capfd
):
    proxy.faults = [fault]

    finished = run(frozen_snapshot(volume_ids=volumes))

    assert finished.state == "failed", (finished.states, proxy.requests)
    assert finished.states["frozen.snapshots"] == "failed"
    assert finished.states["frozen.resume"] == "success"
    assert snapshots_of(moto_port, volumes) == []
    assert_thawed(connect, app_database, app_connect)
    said = capfd.readouterr()
    assert says in said.out + said.err


def test_without_credentials_the_run_fails_clearly_and_thawed(
    frozen_snapshot, connect, app_database, app_connect, run, proxy, volumes, monkeypatch, tmp_path, capfd
):
    monkeypatch.setenv(
        "AIRFLOW_CONN_AWS_DEFAULT",
        f'{{"conn_type": "aws", "extra": {{"region_name": "eu-central-1", "endpoint_url": "{proxy.url}"}}}}',
    )
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))

    finished = run(frozen_snapshot(volume_ids=volumes))

    assert finished.states["frozen.snapshots"] == "failed"
    assert_thawed(connect, app_database, app_connect)
    assert proxy.requests == []
    said = capfd.readouterr()
    assert "Give the Airflow connection credentials" in said.out + said.err


def test_no_snapshot_is_begun_of_a_database_that_is_not_frozen(
    connection, app_database, new_dag, run, proxy, volumes, capfd
):
    with new_dag() as dag:
        EbsCreateSnapshotsOperator(
            task_id="snapshots", volume_ids=volumes, postgres_conn_id=connection(app_database), retries=3
        )

    finished = run(dag)

    assert (finished.states["snapshots"], finished.tries["snapshots"]) == ("failed", 1)
    assert proxy.requests == []
    said = capfd.readouterr()
    assert "not frozen by" in said.out + said.err


def test_a_snapshot_whose_freeze_ended_meanwhile_fails_and_is_deleted(
    connection, connect, app_database, new_dag, run, proxy, volumes, moto_port
):
    def told(action):
        if action == "CreateSnapshot":
            resume(connect, databases=[app_database], holder="me")

    proxy.told = told
    pause(connect, databases=[app_database], holder="me")
    with new_dag() as dag:
        EbsCreateSnapshotsOperator(
            task_id="snapshots",
            volume_ids=volumes,
            postgres_conn_id=connection(app_database),
            holder="me",
            delete_partial=True,
        )

    assert run(dag).states["snapshots"] == "failed"
    assert len(proxy.actions("CreateSnapshot")) == 2
    assert snapshots_of(moto_port, volumes) == []


def test_the_lease_bounds_the_wait(connection, connect, app_database, new_dag, run, proxy, volumes):
    pause(
        connect,
        databases=[app_database],
        holder="me",
        lease=timedelta(seconds=14),
        drain_timeout=timedelta(seconds=1),
    )
    proxy.faults = [Fault("CreateSnapshot", "refuse", 999, code="RequestLimitExceeded", status=503)]
    with new_dag() as dag:
        EbsCreateSnapshotsOperator(
            task_id="snapshots",
            volume_ids=volumes,
            postgres_conn_id=connection(app_database),
            holder="me",
            max_wait=timedelta(hours=1),
        )

    assert run(dag).states["snapshots"] == "failed"

    freeze = freeze_of(connect, app_database)
    assert proxy.actions("CreateSnapshot")[-1].at < freeze.lease_until
    resume(connect, databases=[app_database], holder="me")


def test_a_task_that_is_told_to_end_leaves_no_snapshot(
    task_process, connection, connect, app_database, proxy, volumes, moto_port, request
):
    pause(connect, databases=[app_database], holder="me")
    proxy.faults = [Fault("CreateSnapshot", "refuse", 999, code="RequestLimitExceeded", status=503, skip=1)]
    connection(app_database, conn_id="killed")
    environment = {name: os.environ[name] for name in ("AIRFLOW_CONN_KILLED", "AIRFLOW_CONN_AWS_DEFAULT")}
    task_process.begin(
        "airflow_pg_freeze.operators.ebs.EbsCreateSnapshotsOperator",
        request.node.name,
        environment,
        postgres_conn_id="killed",
        holder="me",
        volume_ids=volumes,
        delete_partial=True,
    )
    eventually(lambda: len(proxy.actions("CreateSnapshot")) >= 2, within=timedelta(seconds=90))
    task_process.terminate()

    assert task_process.state() == "failed", task_process.log
    assert snapshots_of(moto_port, volumes) == []
    resume(connect, databases=[app_database], holder="me")


@pytest.mark.parametrize("deferrable", [True, False])
def test_the_sensor_follows_the_copying_and_waits_out_an_outage(
    new_dag, run, proxy, volumes, ec2, deferrable, capfd, monkeypatch
):
    ids = [ec2.create_snapshot(VolumeId=volume)["SnapshotId"] for volume in volumes]
    # botocore itself would wait out what is thrown at it here.
    monkeypatch.setenv(
        "AIRFLOW_CONN_AWS_DEFAULT", proxy.connection(config_kwargs={"retries": {"total_max_attempts": 1}})
    )
    proxy.progress = lambda: 30
    proxy.told = lambda _: "pending" if len(proxy.actions("DescribeSnapshots")) < 4 else None
    proxy.faults = [Fault("DescribeSnapshots", "refuse", code="RequestLimitExceeded", status=503, skip=1)]
    with new_dag() as dag:
        EbsSnapshotCompletedSensor(
            task_id="completed", snapshot_ids=ids, deferrable=deferrable, poke_interval=0.5
        ) >> EmptyOperator(task_id="after")

    finished = run(dag)

    assert finished.states == {"completed": "success", "after": "success"}
    said = capfd.readouterr()
    assert "30 % of 2 snapshot(s)" in said.out + said.err
    assert "RequestLimitExceeded" in said.out + said.err


@pytest.mark.parametrize("deferrable", [True, False])
def test_a_snapshot_that_fails_while_it_is_copied_fails_the_sensor_and_the_set_is_deleted(
    new_dag, run, proxy, volumes, ec2, moto_port, deferrable, capfd
):
    ids = [ec2.create_snapshot(VolumeId=volume)["SnapshotId"] for volume in volumes]
    proxy.told = lambda _: "pending" if len(proxy.actions("DescribeSnapshots")) < 2 else "error"
    with new_dag() as dag:
        EbsSnapshotCompletedSensor(
            task_id="completed",
            snapshot_ids=ids,
            deferrable=deferrable,
            poke_interval=0.5,
            delete_failed=True,
            retries=3,
        )

    finished = run(dag)

    assert (finished.states["completed"], finished.tries["completed"]) == ("failed", 1)
    assert snapshots_of(moto_port, volumes) == []
    said = capfd.readouterr()
    assert "a snapshot failed and will never be complete" in said.out + said.err


@pytest.mark.parametrize("deferrable", [True, False])
def test_the_sensor_does_not_wait_for_what_it_may_not_see(new_dag, run, proxy, volumes, ec2, deferrable):
    ids = [ec2.create_snapshot(VolumeId=volumes[0])["SnapshotId"]]
    proxy.told = lambda _: "pending"
    proxy.faults = [Fault("DescribeSnapshots", "refuse", 99, code="UnauthorizedOperation", status=403, skip=1)]
    with new_dag() as dag:
        EbsSnapshotCompletedSensor(task_id="completed", snapshot_ids=ids, deferrable=deferrable, poke_interval=0.5)

    assert run(dag).states["completed"] == "failed"


TOKEN = "11111111-2222-3333-4444-555555555555"
OTHER = "99999999-2222-3333-4444-555555555555"
EVER = {"databases": ["app", "we;rd"], "before_at": "2000-01-01T00:00:00Z", "after_at": "2999-01-01T00:00:00Z"}
OF_THE_FREEZE = {"pg-freeze:token": TOKEN, "pg-freeze:databases": "we=3Brd app"}


def snapshot(ec2, volume, tags=OF_THE_FREEZE):
    """Make a snapshot with these tags, and return its id."""
    specification = [{"ResourceType": "snapshot", "Tags": tagging.as_list(tags)}] if tags else []
    return ec2.create_snapshot(VolumeId=volume, TagSpecifications=specification)["SnapshotId"]


def said_of(moto_port, volumes):
    (found,) = snapshots_of(moto_port, volumes)
    tags = tagging.as_dict(found["Tags"])
    return tags.get("certified"), tags.get("pg-freeze:level")


@pytest.mark.parametrize(
    ("attestation", "token", "certified"),
    [
        ({"certified": True, "level": "quiesced", "token": TOKEN, **EVER}, TOKEN, "true"),
        ({"certified": False, "level": "crash-only", "token": TOKEN}, TOKEN, "false"),
        ({"certified": True, "level": "strict", "token": OTHER, **EVER}, TOKEN, None),
        ({"certified": True, "level": None, "token": TOKEN}, TOKEN, "false"),
        ("{{ none }}", TOKEN, None),
    ],
)
def test_snapshots_are_certified_by_the_attestation_of_their_own_freeze_only(
    new_dag, run, proxy, volumes, ec2, moto_port, attestation, token, certified
):
    ids = [snapshot(ec2, volumes[0])]
    with new_dag() as dag:
        EbsCertifySnapshotsOperator(task_id="certify", snapshot_ids=ids, attestation=attestation, token=token)

    finished = run(dag)

    assert finished.states["certify"] == ("failed" if certified is None else "success")
    tags = tagging.as_dict(snapshots_of(moto_port, volumes[:1])[0].get("Tags"))
    assert tags.get("certified") == certified


@pytest.mark.parametrize(
    ("looks", "why"),
    [
        ({"before_at": "2999-01-01T00:00:00.5Z", "after_at": "2999-01-01T00:00:09.5Z"}, "before the first look"),
        ({"before_at": "2000-01-01T00:00:00.5Z", "after_at": "2000-01-01T00:00:09.5Z"}, "after the second look"),
        ({"before_at": "2000-01-01T00:00:00.5Z", "after_at": None}, "does not say when"),
        ({"before_at": "2000-01-01T00:00:00", "after_at": "2999-01-01T00:00:00"}, "does not say when"),
        ({"before_at": "yesterday", "after_at": "2999-01-01T00:00:00Z"}, "does not say when"),
        ({}, "does not say when"),
    ],
)
def test_a_snapshot_that_was_not_begun_between_the_looks_is_crash_only_and_the_task_fails(
    new_dag, run, proxy, volumes, ec2, moto_port, looks, why
):
    ids = [snapshot(ec2, volumes[0])]
    attestation = {"certified": True, "level": "strict", "token": TOKEN, "databases": ["app", "we;rd"], **looks}
    with new_dag() as dag:
        EbsCertifySnapshotsOperator(
            task_id="certify", snapshot_ids=ids, attestation=attestation, token=TOKEN, retries=3
        )

    finished = run(dag)

    assert (finished.states["certify"], finished.tries["certify"]) == ("failed", 1)
    tags = tagging.as_dict(snapshots_of(moto_port, volumes[:1])[0].get("Tags"))
    assert (tags["certified"], tags["pg-freeze:level"]) == ("false", "crash-only")
    with pytest.raises(SnapshotRefused, match=why):
        certify(ec2, ids, attestation)


def ms(number):
    return timedelta(milliseconds=number)


@pytest.mark.parametrize(
    ("before", "after", "asked", "why"),
    [
        # The snapshot may have been begun at any time of a second; here are the two looks and the request after its
        # beginning.
        (ms(-10_000), ms(900), None, "may be after the second look"),
        (ms(100), ms(9_000), None, "may be before the first look"),
        (ms(0), ms(1_000), None, None),
        (ms(100), ms(1_000), ms(100), None),
        (ms(100), ms(1_000), ms(99), "may be before the first look"),
        (ms(-10_000), ms(-9_000), ms(-9_500), "may be after the second look"),
        (ms(-10_000), ms(1_000), ms(1_001), "may be after the second look"),
    ],
)
def test_a_time_of_whole_seconds_is_taken_at_its_worst(ec2, volumes, moto_port, before, after, asked, why):
    made = snapshot(ec2, volumes[0])
    (described,) = snapshots_of(moto_port, volumes[:1])
    started = described["StartTime"]
    assert started.microsecond == 0
    if asked is not None:
        ec2.create_tags(Resources=[made], Tags=tagging.as_list({"pg-freeze:asked-at": iso(started + asked)}))
    looks = {"before_at": iso(started + before), "after_at": iso(started + after)}
    attestation = {"certified": True, "level": "quiesced", "token": TOKEN, **EVER, **looks}

    if why is None:
        assert certify(ec2, [made], attestation) == (True, "quiesced")
        assert said_of(moto_port, volumes[:1]) == ("true", "quiesced")
    else:
        with pytest.raises(SnapshotRefused, match=why):
            certify(ec2, [made], attestation)
        assert said_of(moto_port, volumes[:1]) == ("false", "crash-only")


@pytest.mark.parametrize(
    ("tags", "more", "why"),
    [
        ({}, {}, "by its tags of no freeze"),
        ({**OF_THE_FREEZE, "pg-freeze:token": OTHER}, {}, f"by its tags of freeze {OTHER}"),
        ({"pg-freeze:token": TOKEN}, {}, "not of the databases"),
        ({**OF_THE_FREEZE, "pg-freeze:databases": "app"}, {}, "not of the databases"),
        ({**OF_THE_FREEZE, "pg-freeze:databases": "app other"}, {}, "not of the databases"),
        ({**OF_THE_FREEZE, "pg-freeze:databases": "app =FF"}, {}, "not of the databases"),
        (OF_THE_FREEZE, {"databases": ["app"]}, "not of the databases"),
        (OF_THE_FREEZE, {"databases": None}, "does not say of which databases"),
        (OF_THE_FREEZE, {"token": None}, "does not say of which freeze"),
    ],
)
def test_a_snapshot_of_another_freeze_or_of_other_databases_is_crash_only_and_the_task_fails(
    new_dag, run, proxy, volumes, ec2, moto_port, tags, more, why
):
    attestation = {"certified": True, "level": "strict", "token": TOKEN, **EVER, **more}
    good, strange = snapshot(ec2, volumes[1]), snapshot(ec2, volumes[0], tags)
    with new_dag() as dag:
        EbsCertifySnapshotsOperator(task_id="certify", snapshot_ids=[good, strange], attestation=attestation, retries=3)

    finished = run(dag)

    assert (finished.states["certify"], finished.tries["certify"]) == ("failed", 1)
    assert said_of(moto_port, volumes[:1]) == said_of(moto_port, volumes[1:]) == ("false", "crash-only")
    with pytest.raises(SnapshotRefused, match=why):
        certify(ec2, [good, strange], attestation)


def test_the_snapshots_of_another_freeze_are_not_certified_by_the_attestation_of_this_one(
    connection, connect, app_database, new_dag, run, proxy, volumes, moto_port
):
    conn_id = connection(app_database)
    server = {"postgres_conn_id": conn_id, "database": app_database, "holder": "me"}
    pause(connect, databases=[app_database], holder="me")
    with new_dag() as first:
        EbsCreateSnapshotsOperator(task_id="made", volume_ids=volumes, **server)
    made = run(first).xcoms["made"]["snapshot_ids"]
    resume(connect, databases=[app_database], holder="me")
    pause(connect, databases=[app_database], holder="me")
    with new_dag() as second:
        before = PgAttestOperator(task_id="before", moment="before", **server)
        after = PgAttestOperator(task_id="after", moment="after", require=None, **server)
        certified = EbsCertifySnapshotsOperator(task_id="certified", snapshot_ids=made, attestation=after.output)
        before >> after >> certified

    finished = run(second)

    assert finished.xcoms["after"]["certified"]
    assert finished.states["certified"] == "failed"
    assert {tagging.as_dict(one["Tags"])["certified"] for one in snapshots_of(moto_port, volumes)} == {"false"}
    resume(connect, databases=[app_database], holder="me")


def test_a_snapshot_that_was_made_before_anybody_looked_is_not_certified(
    connection, connect, app_database, new_dag, run, proxy, volumes, moto_port
):
    conn_id = connection(app_database)
    server = {"postgres_conn_id": conn_id, "database": app_database, "holder": "me"}
    pause(connect, databases=[app_database], holder="me")
    with new_dag() as dag:
        made = EbsCreateSnapshotsOperator(task_id="made", volume_ids=volumes, **server)
        before = PgAttestOperator(task_id="before", moment="before", **server)
        after = PgAttestOperator(task_id="after", moment="after", require=None, **server)
        certified = EbsCertifySnapshotsOperator(
            task_id="certified", snapshot_ids=made.output["snapshot_ids"], attestation=after.output
        )
        made >> before >> after >> certified

    finished = run(dag)

    assert finished.xcoms["after"]["certified"]
    assert finished.states["certified"] == "failed"
    assert {tagging.as_dict(one["Tags"])["certified"] for one in snapshots_of(moto_port, volumes)} == {"false"}
    resume(connect, databases=[app_database], holder="me")


def test_the_link_leads_to_the_snapshots_in_the_console():
    link = EbsSnapshotsLink().format_link(
        aws_domain="aws.amazon.com", region_name="eu-central-1", snapshot_ids=":snap-1,:snap-2"
    )

    assert link == ("https://console.aws.amazon.com/ec2/home?region=eu-central-1#Snapshots:snapshotId=:snap-1,:snap-2")
