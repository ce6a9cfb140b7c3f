"""EBS snapshots are created once, whatever AWS does: through a proxy that throttles, fails and breaks connections."""

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_pg_freeze.snapshots import SnapshotFailed, SnapshotRefused
from airflow_pg_freeze.snapshots import tags as tagging
from airflow_pg_freeze.snapshots.ebs import (
    EbsSnapshot,
    certify_snapshots,
    copying,
    delete_snapshots,
    find,
    misfits,
    snapshot_of,
)
from airflow_pg_freeze.snapshots.ebs_creation import Creation
from airflow_pg_freeze.snapshots.ebs_wanted import Wanted, snapshot_ids
from devtools import aws
from devtools.aws import Fault
from pg_freeze import Admit, Freeze, State
from pg_freeze.model import iso
from tests.airflow.cloud import make_volumes, snapshots_of

# No server is asked here.
pytestmark = pytest.mark.pg(">=18")


def freeze(*databases: str) -> Freeze:
    now = datetime.now(UTC)
    return Freeze(
        uuid4(), 1, "dag/run", databases or ("app",), Admit.READERS, State.FROZEN, now, now, checkpoint_lsn="0/1A2B3C8"
    )


def tags_of(frozen: Freeze | None = None, task: str = "dag/run/snapshot/-1", **own: str) -> dict[str, str]:
    return tagging.freeze_tags(
        frozen or freeze(), task=task, level="unattested", origin={"dag": "dag", "run": "run"}, own=own
    )


def create(
    ec2: Any, wanted: Wanted, tags: dict[str, str] | None = None, *, seconds: float = 30, **options: bool
) -> tuple[EbsSnapshot, ...]:
    deadline = time.monotonic() + seconds
    return Creation(ec2, wanted, tags or tags_of(), description="test", deadline=deadline, **options).run()


def test_each_volume_gets_one_snapshot_with_all_the_tags(ec2, volumes, moto_port):
    frozen = freeze('"we; rd" %s ünïcode', "plain")

    made = create(ec2, Wanted(volumes=tuple(volumes)), tags_of(frozen, team="ours"))

    assert [one.volume for one in made] == volumes
    for snapshot in snapshots_of(moto_port, volumes):
        tags = tagging.as_dict(snapshot["Tags"])
        assert tags["team"] == "ours"
        assert tags["pg-freeze:token"] == str(frozen.token)
        assert tags["pg-freeze:checkpoint-lsn"] == "0/1A2B3C8"
        assert tags["certified"] == "false"
        assert (tags["pg-freeze:dag"], tags["pg-freeze:run"]) == ("dag", "run")
        assert tagging.databases_of(tags) == ('"we; rd" %s ünïcode', "plain")


def test_an_instance_is_snapshotted_in_one_request_without_its_boot_volume(ec2, instance, proxy):
    made = create(ec2, Wanted(instance, exclude_boot=True))

    assert len(made) == 2
    assert [request.action for request in proxy.requests] == ["DescribeSnapshots", "CreateSnapshots"]


def test_named_volumes_of_an_instance_are_left_out(ec2, instance, proxy, moto_port):
    reservation = aws.client("ec2", moto_port).describe_instances(InstanceIds=[instance])["Reservations"][0]
    left_out = reservation["Instances"][0]["BlockDeviceMappings"][1]["Ebs"]["VolumeId"]

    create(ec2, Wanted(instance, exclude=(left_out,)), copy_volume_tags=True)

    # moto ignores these, so what AWS would be asked is what can be checked.
    asked = proxy.actions("CreateSnapshots")[0].parameters
    assert asked["InstanceSpecification.ExcludeDataVolumeId.1"] == left_out
    assert asked["CopyTagsFromSource"] == "volume"


def test_a_retry_adopts_what_an_earlier_try_has_made(ec2, volumes, moto_port):
    tags = tags_of()

    first = create(ec2, Wanted(volumes=tuple(volumes)), tags)
    second = create(ec2, Wanted(volumes=tuple(volumes)), tags)

    assert [one.id for one in first] == [one.id for one in second]
    assert len(snapshots_of(moto_port, volumes)) == 2


def test_a_retry_adopts_an_instances_set(ec2, instance, proxy):
    tags = tags_of()

    first = create(ec2, Wanted(instance), tags)
    second = create(ec2, Wanted(instance), tags)

    assert {one.id for one in first} == {one.id for one in second}
    assert len(first) == 3
    assert len(proxy.actions("CreateSnapshots", "CreateSnapshot")) == 1


def test_a_retry_makes_only_what_is_missing(ec2, volumes, moto_port, proxy):
    tags = tags_of()
    proxy.faults = [Fault("CreateSnapshot", "refuse", code="InvalidVolume.NotFound", status=400, skip=1)]
    with pytest.raises(SnapshotFailed) as failed:
        create(ec2, Wanted(volumes=tuple(volumes)), tags)
    assert len(failed.value.left) == 1
    assert failed.value.left[0] in str(failed.value)

    made = create(ec2, Wanted(volumes=tuple(volumes)), tags)

    assert failed.value.left[0] in [one.id for one in made]
    assert len(snapshots_of(moto_port, volumes)) == 2


def test_another_freeze_or_another_task_gets_snapshots_of_its_own(ec2, volumes, moto_port):
    frozen = freeze()

    for tags in (tags_of(frozen), tags_of(frozen, task="dag/run/other/-1"), tags_of(freeze())):
        create(ec2, Wanted(volumes=tuple(volumes)), tags)

    assert len(snapshots_of(moto_port, volumes)) == 6


@pytest.mark.parametrize("kind", ["cut-after", "fail-after"])
def test_a_request_that_was_accepted_before_it_failed_is_adopted_and_not_repeated(ec2, volumes, moto_port, proxy, kind):
    proxy.faults = [Fault("CreateSnapshot", kind, code="InternalError", status=500)]

    made = create(ec2, Wanted(volumes=tuple(volumes)))

    assert len(made) == 2
    assert len(snapshots_of(moto_port, volumes)) == 2


@pytest.mark.parametrize("kind", ["cut-after", "fail-after"])
def test_an_instances_request_that_was_accepted_before_it_failed_is_adopted(ec2, instance, proxy, kind):
    proxy.faults = [Fault("CreateSnapshots", kind, code="Unavailable", status=503)]

    made = create(ec2, Wanted(instance))

    assert len(made) == 3
    assert len(proxy.actions("CreateSnapshots", "CreateSnapshot")) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault("CreateSnapshot", "refuse", 2, code="RequestLimitExceeded", status=503),
        Fault("CreateSnapshot", "refuse", 1, code="InternalError", status=500),
        Fault("CreateSnapshot", "cut", 1),
        Fault("DescribeSnapshots", "refuse", 2, code="RequestLimitExceeded", status=503),
    ],
    ids=["throttled", "500", "cut", "look-throttled"],
)
def test_what_passes_is_waited_out(ec2, volumes, moto_port, proxy, fault):
    proxy.faults = [replace(fault)]

    made = create(ec2, Wanted(volumes=tuple(volumes)))

    assert len(made) == len(snapshots_of(moto_port, volumes)) == 2


def test_two_snapshots_of_one_volume_are_15_s_apart(ec2, volumes, proxy):
    proxy.faults = [Fault("CreateSnapshot", "refuse", code="SnapshotCreationPerVolumeRateExceeded", status=400)]

    create(ec2, Wanted(volumes=(volumes[0],)))

    first, second = proxy.actions("CreateSnapshot")
    assert (second.at - first.at).total_seconds() >= 15


@pytest.mark.parametrize("code", ["RequestLimitExceeded", "InternalError", "SnapshotCreationPerVolumeRateExceeded"])
def test_nothing_is_waited_for_longer_than_the_lease_allows(ec2, volumes, moto_port, proxy, code):
    proxy.faults = [Fault("CreateSnapshot", "refuse", 1000, code=code, status=503, skip=1)]
    began = datetime.now(UTC)

    with pytest.raises(SnapshotFailed, match=f"{code}.*no time is left") as failed:
        create(ec2, Wanted(volumes=tuple(volumes)), seconds=4, delete_partial=True)

    # A request that began in time may end late.
    assert (proxy.actions("CreateSnapshot")[-1].at - began).total_seconds() < 4 + 2
    assert failed.value.left == ()
    assert snapshots_of(moto_port, volumes) == []


def test_what_was_accepted_in_vain_is_deleted(ec2, volumes, moto_port, proxy):
    proxy.faults = [
        Fault("CreateSnapshot", "cut-after", 1, skip=1),
        Fault("DescribeSnapshots", "refuse", 1000, code="RequestLimitExceeded", status=503, skip=1),
    ]
    with pytest.raises(SnapshotFailed):
        create(ec2, Wanted(volumes=tuple(volumes)), seconds=2)
    assert len(snapshots_of(moto_port, volumes)) == 2

    proxy.faults = [Fault("CreateSnapshot", "refuse", 1000, code="InternalError", status=500)]
    third = make_volumes(moto_port, 1)
    tags = tags_of()
    create(aws.client("ec2", moto_port), Wanted(volumes=(volumes[0],)), tags)
    with pytest.raises(SnapshotFailed):
        create(ec2, Wanted(volumes=(volumes[0], *third)), tags, seconds=5, delete_partial=True)
    assert find(ec2, tags) == ()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("UnauthorizedOperation", "Allow CreateSnapshot to the identity"),
        ("AuthFailure", "other credentials"),
        ("InvalidVolume.NotFound", "Nothing that a retry would cure"),
    ],
)
def test_what_aws_refuses_is_not_tried_again(ec2, volumes, proxy, code, says):
    proxy.faults = [Fault("CreateSnapshot", "refuse", 1000, code=code, status=403)]

    with pytest.raises(SnapshotRefused, match=f"{code}.*{says}"):
        create(ec2, Wanted(volumes=tuple(volumes)))

    assert len(proxy.actions("CreateSnapshot")) == 1


def test_a_failed_snapshot_is_not_adopted(ec2, volumes, proxy, moto_port):
    tags = tags_of()
    create(ec2, Wanted(volumes=(volumes[0],)), tags)
    proxy.told = lambda _: "error"

    create(ec2, Wanted(volumes=(volumes[0],)), tags)

    assert len(snapshots_of(moto_port, volumes)) == 2


def test_the_tags_of_volumes_are_copied_as_far_as_there_is_room(ec2, moto_port):
    (volume,) = make_volumes(moto_port, 1, **{f"own-{number:02}": "x" for number in range(48)})

    create(ec2, Wanted(volumes=(volume,)), copy_volume_tags=True)

    tags = tagging.as_dict(snapshots_of(moto_port, [volume])[0]["Tags"])
    assert len(tags) == 50
    assert {"own-00", "pg-freeze:token", "certified"} <= tags.keys()


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(),
        Wanted("i-1", ("vol-1",)),
        Wanted(volumes=("vol-1", "vol-1")),
        Wanted(volumes=("vol-1",), exclude_boot=True),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_aws_is_asked(ec2, wanted, proxy):
    with pytest.raises(SnapshotRefused):
        create(ec2, wanted)

    assert proxy.requests == []


def test_copying_is_followed_in_percent(ec2, volumes, proxy):
    ids = [one.id for one in create(ec2, Wanted(volumes=tuple(volumes)))]
    proxy.told, proxy.progress = lambda _: "pending", lambda: 40

    now = copying(ec2, ids)
    assert (now.done, now.progress, now.failed) == (False, 40, ())
    assert "40 %" in str(now)

    proxy.told = lambda _: None
    assert copying(ec2, ids).done


def test_a_snapshot_that_aws_does_not_know_is_reported(ec2):
    with pytest.raises(SnapshotRefused, match="snap-0123456789abcdef0"):
        copying(ec2, ["snap-0123456789abcdef0"])


def test_certifying_changes_the_tags_that_say_so(ec2, volumes, moto_port):
    ids = [one.id for one in create(ec2, Wanted(volumes=tuple(volumes)))]

    certify_snapshots(ec2, ids, certified=True, level="quiesced")

    for snapshot in snapshots_of(moto_port, volumes):
        tags = tagging.as_dict(snapshot["Tags"])
        assert (tags["certified"], tags["pg-freeze:level"]) == ("true", "quiesced")


def test_deleting_names_what_is_left_and_does_not_mind_what_is_gone(ec2, volumes, proxy):
    first, second = (one.id for one in create(ec2, Wanted(volumes=tuple(volumes))))
    assert delete_snapshots(ec2, [first]) == ()
    proxy.faults = [Fault("DeleteSnapshot", "refuse", code="UnauthorizedOperation", status=403, skip=1)]

    assert delete_snapshots(ec2, [first, second]) == (second,)


SECOND = timedelta(seconds=1)
DAY = datetime(2026, 12, 1, tzinfo=UTC)
#: Some seconds in microseconds, many of them whole seconds or milliseconds.
SPANS = st.builds(
    lambda number, unit: timedelta(microseconds=number * unit), st.integers(0, 3000), st.sampled_from([1, 1000, 10**6])
)


@given(SPANS, SPANS, SPANS, SPANS, st.sampled_from([1, 1000, 10**6]), st.booleans())
def test_no_clock_that_cuts_times_off_certifies_what_was_begun_outside_the_looks(begun, early, first, last, told, asks):
    begun_at, before_at = DAY + begun, DAY + first
    after_at = before_at + last
    started_at = begun_at - (begun_at - DAY) % timedelta(microseconds=told)
    asked_at = begun_at - early
    tags = {"pg-freeze:asked-at": iso(asked_at)} if asks else {}
    snapshot = EbsSnapshot("snap-1", "vol-1", "pending", 0, started_at, tags=tags)

    outside = misfits([snapshot], before_at, after_at)

    assert outside or before_at <= begun_at <= after_at
    if asks and before_at <= asked_at and begun_at + SECOND <= after_at:
        assert outside == ()


def test_a_snapshot_whose_beginning_aws_does_not_tell_is_not_covered():
    snapshot = snapshot_of(
        {"SnapshotId": "snap-1", "VolumeId": "vol-1", "Tags": tagging.as_list({"pg-freeze:asked-at": iso(DAY)})}
    )

    assert misfits([snapshot], DAY, DAY + timedelta(days=9999)) == ("AWS does not say when snap-1 was begun",)


@pytest.mark.parametrize("given", [["snap-1", "snap-2"], "['snap-1', 'snap-2']", "snap-1,snap-2"])
def test_snapshots_may_be_named_in_text_as_templates_render_it(given):
    assert snapshot_ids(given) == ["snap-1", "snap-2"]


@pytest.mark.parametrize("given", [[], "", "None"])
def test_no_snapshot_is_an_error(given):
    with pytest.raises(SnapshotRefused):
        snapshot_ids(given)
