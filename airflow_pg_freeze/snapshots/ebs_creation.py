"""Creates EBS snapshots once, however often it is tried.

Neither CreateSnapshot nor CreateSnapshots takes a client token, so a request that is repeated makes a second snapshot.
Each snapshot therefore carries the freeze's token and the task's name as tags *from its creation on*, and before
anything is created these are looked for. The data is fixed when AWS accepts the request: from then on a snapshot is
``pending``, while its blocks are copied, which needs no freeze.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from airflow_pg_freeze.snapshots import tags as tagging
from airflow_pg_freeze.snapshots.aws import Result, patiently
from airflow_pg_freeze.snapshots.ebs import FAILED, LOOK_AFTER, EbsSnapshot, delete_snapshots, find, snapshot_of
from airflow_pg_freeze.snapshots.ebs_wanted import Wanted
from pg_freeze.volumes.errors import SnapshotFailed, SnapshotRefused

log = logging.getLogger(__name__)

#: How long cleaning up may take: the database stands still meanwhile, and after SIGTERM 5 s are left.
_CLEAN_UP: Final = 4.0


class Creation:
    """Creates one set of snapshots; each try of a task makes one of these.

    :param ec2: a boto3 client that does not repeat requests (:data:`airflow_pg_freeze.snapshots.aws.ONE_TRY`).
    :param tags: all tags; those of the token and the task are what is looked for.
    :param deadline: on the monotonic clock; no wait ends later.
    :param copy_volume_tags: give each snapshot the tags of its volume as well.
    :param delete_partial: delete what was made if the set does not become complete.
    """

    def __init__(
        self,
        ec2: Any,
        wanted: Wanted,
        tags: Mapping[str, str],
        *,
        description: str,
        deadline: float,
        copy_volume_tags: bool = False,
        delete_partial: bool = False,
    ) -> None:
        self.ec2 = ec2
        self.wanted = wanted.checked()
        self.tags = tags
        self.description = description
        self.deadline = deadline
        self.copy_volume_tags = copy_volume_tags
        self.delete_partial = delete_partial
        self._touched = False

    def run(self) -> tuple[EbsSnapshot, ...]:
        """Return the set, one snapshot for each volume: what an earlier try left, and what had to be created.

        :raises SnapshotRefused: for what a retry would not cure.
        :raises SnapshotFailed: when the time is up. Either way ``left`` names what was made and is still there.
        """
        try:
            return self._run()
        except SnapshotFailed as error:
            left = self.discard()
            if not left:
                raise
            tag = f"{tagging.TOKEN}={self.tags[tagging.TOKEN]}"
            raise type(error)(f"{error}. Still there: {', '.join(left)} (tag {tag})", left) from error
        except BaseException:
            # Airflow's task timeout and the end of a worker are no Exceptions.
            self.discard()
            raise

    def discard(self) -> tuple[str, ...]:
        """Delete what this task has made in this freeze, if told to, and return what is still there. Never raises."""
        if not self._touched:
            return ()
        try:
            found = patiently(
                lambda: find(self.ec2, self.tags), doing="look for what was made", deadline=time.monotonic() + _CLEAN_UP
            )
        except SnapshotFailed as error:
            log.warning("%s", error)
            return ()
        ids = tuple(snapshot.id for snapshot in found)
        return delete_snapshots(self.ec2, ids, _CLEAN_UP) if self.delete_partial else ids

    def _run(self) -> tuple[EbsSnapshot, ...]:
        there = self._find()
        if there:
            self._touched = True
            log.info("Adopted from an earlier try: %s", "; ".join(map(str, there.values())))
        elif self.wanted.instance is not None:
            there, complete = self._create_set(self.wanted.instance)
            if complete:
                return tuple(there.values())
        volumes = self.wanted.volumes or self._volumes_of(str(self.wanted.instance))
        if self.wanted.instance is not None and any(volume not in there for volume in volumes):
            # One request made them all, so what is not to be seen yet lags behind.
            there |= self._look(lambda found: all(volume in found for volume in volumes)) or self._find()
        missing = [volume for volume in volumes if volume not in there]
        copied = self._tags_of_volumes(missing)
        for volume in missing:
            there[volume] = self._create_one(volume, copied.get(volume, {}))
        return tuple(there[volume] for volume in volumes)

    def _patiently(self, call: Callable[[], Result], doing: str) -> Result:
        return patiently(call, doing=doing, deadline=self.deadline)

    def _find(self) -> dict[str, EbsSnapshot]:
        """Return this task's snapshots of this freeze by volume, but for failed ones."""
        found = self._patiently(lambda: find(self.ec2, self.tags), "look for snapshots of an earlier try")
        return {snapshot.volume: snapshot for snapshot in found if snapshot.state not in FAILED}

    def _look(self, enough: Callable[[dict[str, EbsSnapshot]], bool]) -> dict[str, EbsSnapshot] | None:
        """Return what is there once it is *enough*, or None."""
        for pause in LOOK_AFTER:
            if time.monotonic() + pause >= self.deadline:
                break
            time.sleep(pause)
            found = self._find()
            if enough(found):
                return found
        return None

    def _create_set(self, instance: str) -> tuple[dict[str, EbsSnapshot], bool]:
        """Return the set, and whether that was AWS's answer to the request, and not found afterwards."""
        specification: dict[str, Any] = {"InstanceId": instance, "ExcludeBootVolume": self.wanted.exclude_boot}
        if self.wanted.exclude:
            specification["ExcludeDataVolumeIds"] = list(self.wanted.exclude)
        more = {"CopyTagsFromSource": "volume"} if self.copy_volume_tags else {}

        def create() -> tuple[dict[str, EbsSnapshot], bool]:
            self._touched = True
            answer = self.ec2.create_snapshots(
                InstanceSpecification=specification,
                Description=self.description,
                TagSpecifications=[{"ResourceType": "snapshot", "Tags": tagging.as_list(self.tags)}],
                **more,
            )
            return {snapshot.volume: snapshot for snapshot in map(snapshot_of, answer["Snapshots"])}, True

        def look() -> tuple[dict[str, EbsSnapshot], bool] | None:
            found = self._look(bool)
            return None if found is None else (found, False)

        doing = f"CreateSnapshots of {self.wanted}"
        made, complete = patiently(create, doing=doing, deadline=self.deadline, unknown=look)
        if not made:
            raise SnapshotRefused(f"{instance} has no volume to snapshot but those that are excluded")
        return made, complete

    def _create_one(self, volume: str, copied: Mapping[str, str]) -> EbsSnapshot:
        def create() -> EbsSnapshot:
            self._touched = True
            return snapshot_of(
                self.ec2.create_snapshot(
                    VolumeId=volume,
                    Description=self.description,
                    TagSpecifications=[{"ResourceType": "snapshot", "Tags": tagging.as_list({**copied, **self.tags})}],
                )
            )

        def look() -> EbsSnapshot | None:
            found = self._look(lambda there: volume in there)
            return None if found is None else found[volume]

        return patiently(create, doing=f"CreateSnapshot of {volume}", deadline=self.deadline, unknown=look)

    def _volumes_of(self, instance: str) -> tuple[str, ...]:
        answer = self._patiently(
            lambda: self.ec2.describe_instances(InstanceIds=[instance]), f"look for the volumes of {instance}"
        )
        found = answer["Reservations"][0]["Instances"][0]
        return tuple(
            mapping["Ebs"]["VolumeId"]
            for mapping in found.get("BlockDeviceMappings", [])
            if "Ebs" in mapping
            and mapping["Ebs"]["VolumeId"] not in self.wanted.exclude
            and not (self.wanted.exclude_boot and mapping["DeviceName"] == found.get("RootDeviceName"))
        )

    def _tags_of_volumes(self, volumes: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the volumes' tags, as far as there is room for them beside ours."""
        ids = list(volumes)
        if not self.copy_volume_tags or not ids:
            return {}
        answer = self._patiently(lambda: self.ec2.describe_volumes(VolumeIds=ids), "read the tags of the volumes")
        copied = {}
        for volume in answer["Volumes"]:
            theirs = tagging.as_dict(volume.get("Tags"))
            mine = {key: theirs[key] for key in theirs if not key.startswith("aws:") and key not in self.tags}
            room = tagging.MOST_TAGS - len(self.tags)
            if len(mine) > room:
                log.warning(
                    "%s has %d tags, of which %d are not copied: a snapshot takes 50",
                    volume["VolumeId"],
                    len(mine),
                    len(mine) - room,
                )
            copied[volume["VolumeId"]] = dict(list(mine.items())[:room])
        return copied
