"""EBS snapshots once they are there: find, follow, certify, delete. :mod:`.ebs_creation` creates them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError

from airflow_pg_freeze.snapshots import tags as tagging
from airflow_pg_freeze.snapshots.aws import code_of, patiently, reworded
from pg_freeze.attestation import Level
from pg_freeze.model import iso
from pg_freeze.names import visible
from pg_freeze.volumes.errors import SnapshotFailed, SnapshotRefused

log = logging.getLogger(__name__)

#: The level on a snapshot that nobody has attested yet.
UNATTESTED: Final = "unattested"
COMPLETED: Final = "completed"
#: Failed for good, or deleted into the Recycle Bin.
FAILED: Final = frozenset({"error", "recoverable"})
# DescribeSnapshots may lag behind: what was accepted a moment ago is looked for more than once.
LOOK_AFTER: Final = (0.5, 1.0, 2.0)
_ID_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class EbsSnapshot:
    """One snapshot, as AWS describes it.

    :ivar started_at: when it was begun, by AWS's clock and cut off, to the second or the millisecond; None if AWS does
        not say that.
    """

    id: str
    volume: str
    state: str
    progress: int
    started_at: datetime | None
    message: str = ""
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def begun_after(self) -> datetime | None:
        """A time before which it was not begun: when its request was made, if a tag says that, or *started_at*."""
        return moment(self.tags.get(tagging.ASKED_AT)) or self.started_at

    @property
    def begun_until(self) -> datetime | None:
        """A time at which it had been begun: all that may have been cut off from *started_at* is added."""
        if self.started_at is None:
            return None
        cut = (
            1_000_000 if self.started_at.microsecond == 0 else 1_000 if self.started_at.microsecond % 1_000 == 0 else 0
        )
        return max(self.started_at + timedelta(microseconds=cut), self.begun_after or self.started_at)

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
        started.astimezone(UTC) if isinstance(started, datetime) else None,
        str(answer.get("StateMessage") or ""),
        tagging.as_dict(answer.get("Tags")),
    )


def moment(text: object) -> datetime | None:
    """Return the time that *text* says in ISO 8601, or None if it says none, or no time zone."""
    try:
        said = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return None if said is None or said.tzinfo is None else said


def find(ec2: Any, tags: Mapping[str, str]) -> tuple[EbsSnapshot, ...]:
    """Return the snapshots of one task in one freeze, oldest first."""
    keys = (tagging.TOKEN, tagging.TASK)
    pages = ec2.get_paginator("describe_snapshots").paginate(
        OwnerIds=["self"], Filters=[{"Name": f"tag:{key}", "Values": [tags[key]]} for key in keys]
    )
    found = [snapshot_of(answer) for page in pages for answer in page["Snapshots"]]
    return tuple(
        sorted(found, key=lambda snapshot: (snapshot.started_at or datetime.max.replace(tzinfo=UTC), snapshot.id))
    )


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


def misfits(snapshots: Iterable[EbsSnapshot], before_at: datetime | None, after_at: datetime | None) -> tuple[str, ...]:
    """Return which snapshots were not begun between the two looks of an attestation, and so are not covered by it.

    A snapshot carries the token of its freeze, but may have been begun before anybody had looked at that. What is not
    known exactly is taken at its worst. That it was requested after the first look, the database server's own clock
    says in a tag. That it was begun before the second one, AWS's clock says: where it is ahead of the server's, a
    snapshot is refused; where it is behind, one may pass that was begun so much later.

    :param before_at: the freeze's first look; None if it is not known.
    :param after_at: the second one.
    """
    if before_at is None or after_at is None:
        return ("the attestation does not say when its looks were",)
    outside = []
    for one in snapshots:
        after, until = one.begun_after, one.begun_until
        if after is None or until is None:
            outside.append(f"AWS does not say when {one.id} was begun")
        elif after < before_at:
            outside.append(
                f"{one.id} was begun at {iso(after)} or later, which may be before the first look at {iso(before_at)}"
            )
        elif until > after_at:
            outside.append(
                f"{one.id} was begun at {iso(until)} or earlier, which may be after the second look at {iso(after_at)}"
            )
    return tuple(outside)


def strangers(snapshots: Iterable[EbsSnapshot], token: object, databases: object) -> tuple[str, ...]:
    """Return which snapshots do not say by their own tags that they are of the freeze that was attested.

    :param token: the attested freeze's token.
    :param databases: the names of the attested databases.
    """
    if not isinstance(token, str) or not token:
        return ("the attestation does not say of which freeze it is",)
    if not isinstance(databases, list | tuple) or not databases or not all(isinstance(one, str) for one in databases):
        return ("the attestation does not say of which databases it is",)
    strange = []
    for one in snapshots:
        tagged = one.tags.get(tagging.TOKEN)
        if tagged != token:
            whose = "no freeze" if tagged is None else f"freeze {visible(tagged)}"
            strange.append(f"{one.id} is by its tags of {whose}, the attestation is of {token}")
        elif not tagging.name_all(one.tags, databases):
            named = ", ".join(map(repr, databases))
            strange.append(f"{one.id} is by its tags not of the databases that were attested, {visible(named)}")
    return tuple(strange)


def certify(ec2: Any, ids: Sequence[str], attestation: Mapping[str, Any]) -> tuple[bool, str]:
    """Write on snapshots what an attestation says of them, and return that: whether they are certified, and the level.

    :param attestation: as :meth:`pg_freeze.attestation.Attestation.as_dict` makes it.
    :raises SnapshotRefused: if it does not cover them; they are tagged ``crash-only`` then.
    :raises SnapshotFailed: if AWS could not be asked, or did not take the tags.
    """
    level = str(attestation["level"] or UNATTESTED)
    certified = attestation.get("certified") is True and level != UNATTESTED
    if certified:
        found = copying(ec2, ids).snapshots
        before_at, after_at = (moment(attestation.get(name)) for name in ("before_at", "after_at"))
        wrong = strangers(found, attestation.get("token"), attestation.get("databases"))
        if wrong := wrong or misfits(found, before_at, after_at):
            certify_snapshots(ec2, ids, certified=False, level=Level.CRASH_ONLY.value)
            raise SnapshotRefused(f"not certified, and no better than crash-only: {'; '.join(wrong)}")
    certify_snapshots(ec2, ids, certified, level)
    return certified, level


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
