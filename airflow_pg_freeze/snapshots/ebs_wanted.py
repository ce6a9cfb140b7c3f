"""Which EBS volumes, or snapshots of them, are meant: what can be checked without AWS."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pg_freeze.volumes.errors import SnapshotRefused


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to snapshot: an instance's volumes in one request, or a list of volumes one by one.

    :param instance: an instance; all its volumes are snapshotted at one point in time.
    :param volumes: volumes; used where there is no *instance*.
    :param exclude_boot: leave out the instance's boot volume.
    :param exclude: leave out these of the instance's data volumes.
    """

    instance: str | None = None
    volumes: tuple[str, ...] = ()
    exclude_boot: bool = False
    exclude: tuple[str, ...] = ()

    def checked(self) -> Wanted:
        """Return itself.

        :raises SnapshotRefused: if it names both an instance and volumes, neither, or a volume twice.
        """
        if (self.instance is None) == (not self.volumes):
            raise SnapshotRefused("give either instance_id or volume_ids, and not both")
        if self.instance is None and (self.exclude or self.exclude_boot):
            raise SnapshotRefused(
                "exclude_boot_volume and exclude_volume_ids need instance_id: leave a volume out of volume_ids instead"
            )
        if len(set(self.volumes)) != len(self.volumes):
            raise SnapshotRefused(f"a volume is named twice in {', '.join(self.volumes)}")
        return self

    def __str__(self) -> str:
        """Return what is snapshotted, for messages."""
        return f"the volumes of {self.instance}" if self.instance else f"{', '.join(self.volumes)}"


def snapshot_ids(given: Sequence[str] | str) -> list[str]:
    """Return the ids in *given*: a list, or text, which is what a template renders a list as.

    :raises SnapshotRefused: if there is none.
    """
    ids = re.findall(r"snap-[0-9a-f]+", given) if isinstance(given, str) else list(given)
    if not ids:
        raise SnapshotRefused(f"snapshot_ids is {given!r}, which names no snapshot")
    return ids
