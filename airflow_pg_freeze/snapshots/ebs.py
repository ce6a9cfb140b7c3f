"""EBS snapshots once they are there: find, follow, certify, delete. :mod:`.ebs_creation` creates them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError

from airflow_pg_freeze.snapshots import tags as tagging
from airflow_pg_freeze.snapshots.aws import code_of, patiently, reworded
from pg_freeze.volumes.errors import SnapshotFailed, SnapshotRefused

log = logging.getLogger(__name__)

COMPLETED: Final = "completed"
#: Failed for good, or deleted into the Recycle Bin.
FAILED: Final = frozenset({"error", "recoverable"})
# DescribeSnapshots may lag behind: what was accepted a moment ago is looked for more than once.
LOOK_AFTER: Final = (0.5, 1.0, 2.0)
_ID_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class EbsSnapshot:
    """One snapshot, as AWS describes it."""

    id: str
    volume: str
    state: str
    progress: int
    started_at: datetime
    message: str = ""

    def __str__(self) -> str:
        """Return one line for logs and errors."""
        return f"{self.id} of {self.volume}: {self.state}, {self.progress} %" + (
            f" ({self.message})" if self.message else ""
        )


def snapshot_of(answer: Mapping[str, Any]) -> EbsSnapshot:
    """Return one snapshot from AWS's answer."""
    progress = str(answer.get("Progress") or "0").rstrip("%") or "0"
    started = answer.get("StartTime")
    return EbsSnapshot(
        answer["SnapshotId"],
        answer["VolumeId"],
        str(answer.get("State", "pending")),
        int(progress) if progress.isdigit() else 0,
        started.astimezone(UTC) if isinstance(started, datetime) else datetime.now(UTC),
        str(answer.get("StateMessage") or ""),
    )


def find(ec2: Any, tags: Mapping[str, str]) -> tuple[EbsSnapshot, ...]:
    """Return the snapshots of one task in one freeze, oldest first."""
    keys = (tagging.TOKEN, tagging.TASK)
    pages = ec2.get_paginator("describe_snapshots").paginate(
        OwnerIds=["self"], Filters=[{"Name": f"tag:{key}", "Values": [tags[key]]} for key in keys]
    )
    found = [snapshot_of(answer) for page in pages for answer in page["Snapshots"]]
    return tuple(sorted(found, key=lambda snapshot: (snapshot.started_at, snapshot.id)))


@dataclass(frozen=True, slots=True)
class Copying:
    """How the copying of a set goes."""

    snapshots: tuple[EbsSnapshot, ...]

    @property
    def done(self) -> bool:
        """Whether every snapshot is complete."""
        return all(snapshot.state == COMPLETED for snapshot in self.snapshots)

    @property
    def progress(self) -> int:
        """How far the set is, in percent."""
        parts = [100 if snapshot.state == COMPLETED else snapshot.progress for snapshot in self.snapshots]
        return sum(parts) // max(1, len(parts))

    @property
    def failed(self) -> tuple[EbsSnapshot, ...]:
        """The snapshots that will never be complete."""
        return tuple(snapshot for snapshot in self.snapshots if snapshot.state in FAILED)

    def __str__(self) -> str:
        """Return one line for logs."""
        waiting = [str(snapshot) for snapshot in self.snapshots if snapshot.state != COMPLETED]
        return f"{self.progress} % of {len(self.snapshots)} snapshot(s)" + (
            f"; {'; '.join(waiting)}" if waiting else ""
        )


def copying(ec2: Any, ids: Sequence[str], sleep: Callable[[float], None] = time.sleep) -> Copying:
    """Return how the copying of these snapshots goes.

    :raises SnapshotRefused: if AWS does not know them, or does not let us look.
    :raises SnapshotFailed: if AWS cannot be asked now.
    """
    missing: list[str] = []
    for pause in (*LOOK_AFTER, None):
        try:
            # By a filter: for an id that is not there yet, SnapshotIds= would be an error.
            pages = ec2.get_paginator("describe_snapshots").paginate(
                Filters=[{"Name": "snapshot-id", "Values": list(ids)}]
            )
            found = {one.id: one for page in pages for one in map(snapshot_of, page["Snapshots"])}
        except (ClientError, BotoCoreError) as error:
            raise reworded(error, f"look at {_listed(ids)}") from error
        missing = [one for one in ids if one not in found]
        if not missing:
            return Copying(tuple(found[one] for one in ids))
        if pause is not None:
            sleep(pause)
    raise SnapshotRefused(f"AWS does not know {_listed(missing)}: deleted meanwhile, or in another region or account")


def certify_snapshots(ec2: Any, ids: Sequence[str], certified: bool, level: str) -> None:
    """Write on snapshots what is known about their freeze now: the tags ``certified`` and ``pg-freeze:level``.

    :param certified: whether the database provably stood still from before the snapshots until after them.
    :param level: the attestation's level.
    :raises SnapshotFailed: if AWS did not take the tags.
    """
    tags = {tagging.CERTIFIED: str(certified).lower(), tagging.LEVEL: tagging.bounded(level)}
    patiently(
        lambda: ec2.create_tags(Resources=list(ids), Tags=tagging.as_list(tags)),
        doing=f"tag {_listed(ids)} certified={tags[tagging.CERTIFIED]}",
        deadline=time.monotonic() + 60,
    )


def delete_snapshots(ec2: Any, ids: Iterable[str], seconds: float = 20) -> tuple[str, ...]:
    """Delete snapshots, and return those that AWS did not delete. Never raises for that.

    :param seconds: how long to go on while AWS is busy or cannot be reached.
    """
    left = []
    deadline = time.monotonic() + seconds
    for one in ids:
        try:
            patiently(partial(ec2.delete_snapshot, SnapshotId=one), doing=f"delete {one}", deadline=deadline)
            log.info("Deleted %s", one)
        except SnapshotFailed as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and code_of(cause) == "InvalidSnapshot.NotFound":
                continue
            log.warning("%s", error)
            left.append(one)
    return tuple(left)


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_ID_SHOWN]) + ("…" if len(ids) > _ID_SHOWN else "")
