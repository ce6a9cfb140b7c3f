"""Snapshots of local volumes: btrfs subvolumes, ZFS datasets and LVM logical volumes.

A snapshot's name carries the token of its freeze. So a repetition finds what is there already and adopts it, after it
has made sure that it is a snapshot of that very volume; and another freeze never comes in its way.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Final, Protocol
from uuid import UUID

from pg_freeze.names import visible
from pg_freeze.volumes.commands import Commands
from pg_freeze.volumes.errors import SnapshotFailed, SnapshotRefused

log = logging.getLogger(__name__)

#: How long cleaning up may take, whatever time was left: the database stands still meanwhile.
_CLEAN_UP: Final = 10.0
_BELOW: Final = re.compile(r"^ID .* uuid (\S+) path (.*)$", re.MULTILINE)
#: A snapshot that was put below a volume is no part of its data.
_OF_OURS: Final = re.compile(r"@[A-Za-z0-9_.-]+-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")


class Kind(StrEnum):
    """What a volume is."""

    BTRFS = "btrfs"
    ZFS = "zfs"
    LVM = "lvm"


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume: the path of a btrfs subvolume, the name of a ZFS dataset, or ``group/volume`` of LVM."""

    kind: Kind
    source: str

    @classmethod
    def parse(cls, text: str) -> Volume:
        """Return the volume that ``btrfs:/srv/data``, ``zfs:tank/data`` or ``lvm:vg0/data`` names.

        :raises SnapshotRefused: for anything else.
        """
        kind, _, source = text.partition(":")
        wrong = None
        if kind not in [*Kind]:
            wrong = f"it must begin with one of {', '.join(f'{kind}:' for kind in Kind)}"
        elif kind == Kind.BTRFS and not PurePosixPath(source).is_absolute():
            wrong = "a btrfs subvolume is named by its absolute path"
        elif kind == Kind.LVM and (source.count("/") != 1 or not all(source.split("/"))):
            wrong = "a logical volume is named group/volume"
        elif not source or source.startswith(("-", "@")) or ("@" in source and kind == Kind.ZFS) or "\0" in source:
            wrong = "that is no name of a volume"
        if wrong is not None:
            raise SnapshotRefused(f"volume {text!r}: {wrong}, such as btrfs:/srv/data, zfs:tank/data, lvm:vg0/data")
        return cls(Kind(kind), str(PurePosixPath(source)) if kind == Kind.BTRFS else source)

    def __str__(self) -> str:
        """Return the volume as :meth:`parse` takes it."""
        return f"{self.kind}:{self.source}"


@dataclass(frozen=True, slots=True)
class VolumeSnapshot:
    """A snapshot: the path of a read-only subvolume, ``dataset@name``, or ``group/volume``.

    :param adopted: it was there already, from an earlier try in the same freeze.
    """

    volume: Volume
    name: str
    adopted: bool


@dataclass(frozen=True, slots=True)
class Naming:
    """Where snapshots go, and what they are called.

    :param token: the freeze's.
    :param prefix: begins each name.
    :param directory: where btrfs snapshots go; by default beside the subvolume.
    :param lvm_size: room for what changes while a snapshot of LVM exists, such as ``5G`` or ``10%ORIGIN``; None for
        thin volumes, which need none.
    """

    token: UUID
    prefix: str = "pg-freeze"
    directory: str | None = None
    lvm_size: str | None = "10%ORIGIN"

    @property
    def name(self) -> str:
        """What every name contains."""
        return f"{self.prefix}-{self.token}"


class _Driver(Protocol):
    def target(self, volume: Volume, naming: Naming) -> str: ...
    def exists(self, commands: Commands, volume: Volume, target: str) -> bool: ...
    def left_out(self, commands: Commands, wanted: Sequence[Volume]) -> tuple[str, ...]: ...
    def create(self, commands: Commands, wanted: Sequence[tuple[Volume, str]], naming: Naming) -> None: ...
    def delete(self, commands: Commands, target: str) -> None: ...


class _Btrfs:
    def target(self, volume: Volume, naming: Naming) -> str:
        source = PurePosixPath(volume.source)
        directory = source.parent if naming.directory is None else PurePosixPath(naming.directory)
        return str(directory / f"{source.name}@{naming.name}")

    def exists(self, commands: Commands, volume: Volume, target: str) -> bool:
        # `btrfs subvolume snapshot` to a path that exists makes one *within* it, so this must be known before.
        done = commands.attempt("btrfs", "subvolume", "show", target)
        if done.code != 0:
            missing = commands.attempt("test", "!", "-e", target).code == 0
            if not missing:
                raise SnapshotFailed(f"{target} is in the way and is no subvolume: {' '.join(done.error.split())}")
            return False
        is_from = _shown(done.out, "Parent UUID")
        source = _shown(commands.run("btrfs", "subvolume", "show", volume.source), "UUID")
        if is_from != source or "readonly" not in _shown(done.out, "Flags"):
            raise SnapshotRefused(
                f"{target} is there already and is no read-only snapshot of {volume.source}: remove it"
            )
        return True

    def left_out(self, commands: Commands, wanted: Sequence[Volume]) -> tuple[str, ...]:
        shown = [commands.attempt("btrfs", "subvolume", "show", volume.source) for volume in wanted]
        if any(done.code for done in shown):
            return ()  # to snapshot it fails, and says why
        known = {_shown(done.out, "UUID") for done in shown}
        below = [
            found.groups()
            for volume in wanted
            for found in _BELOW.finditer(commands.run("btrfs", "subvolume", "list", "-o", "-u", volume.source))
        ]
        return tuple(path for uuid, path in below if uuid not in known and not _OF_OURS.search(path))

    def create(self, commands: Commands, wanted: Sequence[tuple[Volume, str]], naming: Naming) -> None:  # noqa: ARG002
        for volume, target in wanted:
            commands.run("btrfs", "subvolume", "snapshot", "-r", volume.source, target)

    def delete(self, commands: Commands, target: str) -> None:
        commands.run("btrfs", "subvolume", "delete", target)


class _Zfs:
    def target(self, volume: Volume, naming: Naming) -> str:
        return f"{volume.source}@{naming.name}"

    def exists(self, commands: Commands, volume: Volume, target: str) -> bool:  # noqa: ARG002  the name says both
        done = commands.attempt("zfs", "list", "-H", "-t", "snapshot", "-o", "name", target)
        return done.code == 0 and done.out.strip() == target

    def left_out(self, commands: Commands, wanted: Sequence[Volume]) -> tuple[str, ...]:
        names = [volume.source for volume in wanted]
        listed = [
            commands.attempt("zfs", "list", "-H", "-r", "-t", "filesystem,volume", "-o", "name", one) for one in names
        ]
        return tuple(name for done in listed for name in done.out.splitlines() if name not in names)

    def create(self, commands: Commands, wanted: Sequence[tuple[Volume, str]], naming: Naming) -> None:  # noqa: ARG002
        # In one command the datasets of a pool are snapshotted at one point in time.
        commands.run("zfs", "snapshot", *(target for _, target in wanted))

    def delete(self, commands: Commands, target: str) -> None:
        commands.run("zfs", "destroy", target)


class _Lvm:
    def target(self, volume: Volume, naming: Naming) -> str:
        group, name = volume.source.split("/")
        return f"{group}/{name}-{naming.name}"

    def exists(self, commands: Commands, volume: Volume, target: str) -> bool:
        done = commands.attempt("lvs", "--noheadings", "-o", "origin", target)
        if done.code != 0:
            return False
        if done.out.strip() != volume.source.split("/")[1]:
            raise SnapshotRefused(f"{target} is there already and is no snapshot of {volume.source}: remove it")
        return True

    def left_out(self, commands: Commands, wanted: Sequence[Volume]) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def create(self, commands: Commands, wanted: Sequence[tuple[Volume, str]], naming: Naming) -> None:
        size = naming.lvm_size
        room = () if size is None else (("--extents", size) if "%" in size else ("--size", size))
        for volume, target in wanted:
            name = target.split("/")[1]
            commands.run("lvcreate", "--snapshot", "--permission", "r", "--name", name, *room, volume.source)

    def delete(self, commands: Commands, target: str) -> None:
        commands.run("lvremove", "--yes", target)


_DRIVERS: dict[Kind, _Driver] = {Kind.BTRFS: _Btrfs(), Kind.ZFS: _Zfs(), Kind.LVM: _Lvm()}


def snapshot_volumes(
    volumes: Iterable[Volume], naming: Naming, commands: Commands, *, delete_partial: bool = False
) -> tuple[VolumeSnapshot, ...]:
    """Snapshot volumes, and return one snapshot for each; one that an earlier try has made is adopted.

    :param delete_partial: if one fails, delete the others of this set.
    :raises SnapshotRefused: for what a retry does not cure: a missing program or right, a name that is taken.
    :raises SnapshotFailed: for anything else. Either way ``left`` names what was made and is still there.
    """
    targets = _targets(tuple(volumes), naming)
    try:
        _check_whole(tuple(targets), commands)
        there = {volume: _DRIVERS[volume.kind].exists(commands, volume, targets[volume]) for volume in targets}
        for kind, driver in _DRIVERS.items():
            wanted = [(volume, targets[volume]) for volume in targets if volume.kind is kind and not there[volume]]
            if wanted:
                driver.create(commands, wanted, naming)
    except SnapshotFailed as error:
        left = discard(targets, commands, delete_partial=delete_partial)
        if not left:
            raise
        raise type(error)(f"{error}. Still there: {', '.join(left)}", left) from error
    except BaseException:
        discard(targets, commands, delete_partial=delete_partial)
        raise
    return tuple(VolumeSnapshot(volume, target, there[volume]) for volume, target in targets.items())


def _check_whole(volumes: Sequence[Volume], commands: Commands) -> None:
    """Refuse volumes below which there are others: these are not in the snapshot, and their place in it is empty.

    :raises SnapshotRefused: naming what would be left out.
    """
    for kind, driver in _DRIVERS.items():
        wanted = [volume for volume in volumes if volume.kind is kind]
        if wanted and (left := driver.left_out(commands, wanted)):
            raise SnapshotRefused(
                f"a snapshot of {', '.join(map(str, wanted))} would lack what lies below as a volume of its own: "
                f"{', '.join(map(visible, left))}. Name each of these in volumes= of the same task, or make them plain "
                "directories"
            )


def discard(targets: dict[Volume, str], commands: Commands, *, delete_partial: bool) -> tuple[str, ...]:
    """Delete a set that is not complete, if told to, and return what is still there. Never raises for that."""
    left = []
    commands = replace(commands, deadline=time.monotonic() + _CLEAN_UP)
    for volume, target in targets.items():
        driver = _DRIVERS[volume.kind]
        try:
            if not driver.exists(commands, volume, target):
                continue
            if delete_partial:
                driver.delete(commands, target)
                log.info("Deleted %s", target)
                continue
        except SnapshotFailed as error:
            log.warning("%s", error)
            if isinstance(error, SnapshotRefused):
                continue
        left.append(target)
    return tuple(left)


def delete_snapshots(snapshots: Iterable[VolumeSnapshot], commands: Commands) -> tuple[str, ...]:
    """Delete snapshots, and return those that could not be."""
    return discard({snapshot.volume: snapshot.name for snapshot in snapshots}, commands, delete_partial=True)


def check_names(volumes: Sequence[str], prefix: str, directory: str | None) -> None:
    """Check what can be known of the names before there is a freeze.

    :raises SnapshotRefused: for no volume, and names that cannot be, or would be the same.
    """
    _targets([Volume.parse(volume) for volume in volumes], Naming(UUID(int=0), prefix, directory or None))


def _targets(volumes: Sequence[Volume], naming: Naming) -> dict[Volume, str]:
    if not volumes:
        raise SnapshotRefused("no volume was named: give volumes=, such as ['btrfs:/srv/data']")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", naming.prefix):
        raise SnapshotRefused(f"prefix is {naming.prefix!r}: up to 64 letters, digits, '_', '.' and '-'")
    if naming.directory is not None and not PurePosixPath(naming.directory).is_absolute():
        raise SnapshotRefused(f"directory is {naming.directory!r}: give an absolute path")
    targets: dict[Volume, str] = {}
    for volume in volumes:
        target = _DRIVERS[volume.kind].target(volume, naming)
        if target in targets.values():
            raise SnapshotRefused(
                f"{volume} would be snapshotted to {target}, like another volume: name each once, and give volumes of "
                "one name a task with a prefix each"
            )
        targets[volume] = target
    return targets


def _shown(text: str, name: str) -> str:
    for line in text.splitlines():
        key, _, value = line.strip().partition(":")
        if key == name:
            return value.strip()
    return ""
