"""Whether a server may be running on a directory.

A crash-consistent copy always has the ``postmaster.pid`` of the server that it was copied from, and its process id may
be anybody's here. So the file alone says nothing. A server is looked for by what it cannot hide from this kernel: its
working directory and its open files. Who cannot see all processes, or looks at a volume that another machine may have
mounted, too, cannot know, and then a person must say so.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

from pg_freeze.copies.tree import Tree, read_small
from pg_freeze.errors import FreezeRefused

LOCK_FILE: Final = "postmaster.pid"
_LONGEST: Final = 8192
# The first process id namespace of a kernel, from which all processes are seen: PROC_PID_INIT_INO of <linux/proc_ns.h>.
_ALL_PROCESSES: Final = "pid:[4026531836]"
# Filesystems of which no other kernel can have the same files open.
_LOCAL: Final = frozenset(
    ["bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "reiserfs", "tmpfs", "xfs", "zfs"]
)
# The layers of an overlay, in the options of its mount.
_LAYERS: Final = re.compile(r"(?:^|,)(?:upperdir|lowerdir\+?|datadir\+)=([^,]*)")
_WATCHED: Final = ("global/pg_control", "pg_wal", LOCK_FILE)
_WATCH: Final = 3.0


def refuse_running(tree: Tree, *, stale_pid: bool) -> None:
    """Refuse a copy that a server is running on, or may be running on.

    :param stale_pid: somebody says that the server of ``postmaster.pid`` is not running anywhere.
    :raises FreezeRefused: if one is, or that cannot be known and nobody has said so.
    """
    first = _signature(tree)
    for sign in _signs(tree):
        raise FreezeRefused(f"a server runs on {tree.data}: {sign}. Give a copy of it")
    if not (tree.data / LOCK_FILE).exists():
        return
    doubts = list(_doubts(tree))
    if doubts and not stale_pid:
        raise FreezeRefused(
            f"{tree.data}/{LOCK_FILE} may be that of a running server, since {'; '.join(doubts)}. A copy of a running "
            "server always has this file. If you know that no server runs on this directory anywhere: --stale-pid"
        )
    if doubts:
        # Not seen, and somebody's word for it: the least that can be done is to see whether it moves.
        time.sleep(_WATCH)
    if _signature(tree) != first:
        raise FreezeRefused(f"a server runs on {tree.data}: its files change. Give a copy of it")


def _signs(tree: Tree) -> Iterator[str]:
    """Yield what shows that a server is running."""
    roots = {_inode(root) for root in tree.roots} | set(_through_overlays(tree))
    for pid in _others():
        with suppress(OSError):
            if _inode(f"/proc/{pid}/cwd") in roots:
                yield f"it is the working directory of process {pid}"
        with suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    if _inode(f"/proc/{pid}/fd/{name}") in tree.inodes:
                        yield f"process {pid} has {os.readlink(f'/proc/{pid}/fd/{name}')} open"
    yield from _socket(tree.data)


def _inode(path: Path | str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _through_overlays(tree: Tree) -> Iterator[tuple[int, int]]:
    """Yield what the directories of the copy are where they are seen through an overlay: in a container, above all.

    There they have other device and inode numbers. Overlays of all mount namespaces are looked at.
    """
    above = {_inode(part): root.relative_to(part) for root in tree.roots for part in (root, *root.parents)}
    namespaces: set[str] = set()
    for pid in (os.getpid(), *_others()):
        with suppress(OSError):
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in namespaces:
                continue
            mounts = Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            namespaces.add(namespace)
            for fields, kind, options in map(_mount, mounts):
                for layer in _layers(options) if kind == "overlay" else ():
                    with suppress(OSError, KeyError, ValueError):
                        # A mount may show a part of its filesystem only: the fourth field.
                        place = PurePosixPath("/", above[_inode(layer)]).relative_to(fields[3])
                        yield _inode(f"/proc/{pid}/root{fields[4]}/{place}")


def _mount(line: str) -> tuple[list[str], str, str]:
    """Return the fields of a line of mountinfo, the type of the filesystem, and its options."""
    left, _, right = line.partition(" - ")
    kind, *_, options = right.split(" ")
    return [_plain(field) for field in left.split(" ")], kind, options


def _layers(options: str) -> Iterator[str]:
    for layers in _LAYERS.findall(options):
        for one in re.split(r"(?<!\\):+", _plain(layers)):
            yield re.sub(r"\\(.)", r"\1", one)


def _plain(escaped: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), escaped)


def _socket(data: Path) -> Iterator[str]:
    """Yield that the socket which the lock file names belongs to a server of this very directory, and answers."""
    with suppress(OSError, ValueError, IndexError):
        lines = read_small(data / LOCK_FILE, _LONGEST).decode(errors="replace").splitlines()
        path = f"{lines[4]}/.s.PGSQL.{int(lines[3])}"
        home = Path(read_small(Path(path + ".lock"), _LONGEST).decode(errors="replace").splitlines()[1])
        if home.is_absolute() and home.samefile(data):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(1)
                client.connect(path)
            yield f"its socket {path} answers"


def _doubts(tree: Tree) -> Iterator[str]:
    """Yield why a server that is there might not have been seen."""
    if os.readlink("/proc/self/ns/pid") != _ALL_PROCESSES:
        yield "this is a container, from which not all processes of the machine are seen"
    owner = tree.data.stat().st_uid
    if os.geteuid() not in (0, owner):
        yield f"only root and its owner see what user id {owner} does"
    for root in tree.roots:
        kind = _filesystem(root)
        if kind not in _LOCAL:
            yield f"{root} is on {kind}, which another machine may use as well"


def _filesystem(path: Path) -> str:
    """Return the type of the filesystem that *path* is on."""
    longest, kind = -1, "an unknown filesystem"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields, found, _ = _mount(line.rstrip("\n"))
            # A later mount at the same place covers the earlier one.
            if path.is_relative_to(fields[4]) and len(Path(fields[4]).parts) >= longest:
                longest, kind = len(Path(fields[4]).parts), found
    return kind


def _signature(tree: Tree) -> list[tuple[str, int, int]]:
    """Return what a running server changes, if it does anything."""
    seen: list[tuple[str, int, int]] = []
    elsewhere = {one.link: one.directory for one in tree.mapped}
    for name in _WATCHED:
        # What is mapped leads to another server's still.
        path = elsewhere.get(name, tree.data / name)
        with suppress(OSError):
            for one in [path, *(path.iterdir() if path.is_dir() else ())]:
                status = one.lstat()
                seen.append((str(one), status.st_mtime_ns, status.st_size))
    return sorted(seen)


def _others() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid())
