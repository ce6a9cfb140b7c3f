"""The files of a copy: what leads out of it, and to whom they belong."""

from __future__ import annotations

import errno
import os
import pwd
import random
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from pg_freeze.errors import FreezeRefused

# PostgreSQL's own names at the top of a data directory. A link of another name there is only read if a setting says so,
# and no setting of the copy has an effect: it is taken away for the time.
_OWN: Final = re.compile(r"base|global|pg_.*|PG_VERSION|current_logfiles|backup_label|tablespace_map|postmaster\..*")
_CONFIGURATION: Final = ("pg_hba.conf", "pg_ident.conf")
#: What is set aside in a copy, and is in nobody's way.
ASIDE: Final = ".verify-copy"


class Found(NamedTuple):
    """One entry below a directory: its path, and what lstat(2) says of it."""

    path: Path
    status: os.stat_result
    directory: int  # an open descriptor of the directory that holds it, valid until the next entry is asked for


@dataclass(frozen=True, slots=True)
class Mapped:
    """A link of the copy, and the directory to use instead of what it leads to."""

    link: str
    directory: Path


@dataclass(slots=True)
class Tree:
    """The directories that are the copy: the data directory, and what was named for its links that lead out of it."""

    data: Path
    mapped: list[Mapped] = field(default_factory=list)
    needless: list[str] = field(default_factory=list)
    inodes: set[tuple[int, int]] = field(default_factory=set)

    @property
    def roots(self) -> tuple[Path, ...]:
        """All directories of the copy, the data directory first."""
        return (self.data, *(one.directory for one in self.mapped))


def resolved(path: Path) -> Path:
    """Return where a path leads to.

    :raises FreezeRefused: if that is in a circle.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise FreezeRefused(f"{path} leads nowhere: {error}") from error


def read_small(path: Path, most: int, *, follow: bool = False) -> bytes:
    """Read a file of which nothing is known yet, not even that it is one: it may be a pipe that nobody writes into.

    :param most: as many bytes it may have.
    :param follow: whether it may be a link. Never in a copy.
    :raises OSError: if it cannot be read, is a link or no file, or is larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        found = file.read(most + 1)
    if len(found) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return found


def entries(root: Path) -> Iterator[Found]:
    """Yield everything below *root*, and follow no link."""
    for place, _, _, descriptor in os.fwalk(root, follow_symlinks=False, onerror=_unreadable):
        for name in os.listdir(descriptor):
            try:
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield Found(Path(place) / name, status, descriptor)


def _unreadable(error: OSError) -> None:
    # One that is gone was removed meanwhile.
    if not isinstance(error, FileNotFoundError):
        raise FreezeRefused(f"{error.filename} of the copy cannot be read: {error.strerror}") from error


def inspect(data: Path, tablespaces: Mapping[str, Path], wal: Path | None) -> Tree:
    """Look through a copy for whatever leads out of it.

    :param data: the data directory, without symbolic links in its path.
    :param tablespaces: by the old place of a tablespace, or its OID, where its copy is.
    :param wal: where the copy of pg_wal is, if that is a link.
    :raises FreezeRefused: for a link that leads out of the copy and is not mapped, a file with another name outside,
        or a device.
    """
    tree = Tree(data)
    unused = set(tablespaces)
    unused_wal = wal is not None
    if (data / "tablespace_map").exists():
        raise FreezeRefused(
            f"{data}/tablespace_map has the server make links that lead out of the copy: make those of pg_tblspc "
            "yourself, to the copies of the tablespaces, and remove the file"
        )
    links = [one for one in entries(data) if stat.S_ISLNK(one.status.st_mode)]
    for one in links:
        name = str(one.path.relative_to(data))
        target = os.readlink(one.path)
        if name == "pg_wal" and wal is not None:
            tree.mapped.append(Mapped(name, _directory("--wal", wal)))
            unused_wal = False
        elif name.startswith("pg_tblspc/") and (key := _key(one.path.name, target, tablespaces)) is not None:
            tree.mapped.append(Mapped(name, _directory("--tablespace", tablespaces[key])))
            unused.discard(key)
        elif one.path.parent == data and (name in _CONFIGURATION or not _OWN.fullmatch(name)):
            tree.needless.append(name)
        elif not resolved(one.path).is_relative_to(data):
            raise FreezeRefused(f"{one.path} leads out of the copy, to {target}: {_remedy(name, target)}")
        elif one.path.parent not in (data, data / "pg_tblspc"):
            raise FreezeRefused(f"{one.path} is a link, and no data directory has one there: put a copy there")
    if unused_wal:
        raise FreezeRefused(f"--wal is of no use: {data}/pg_wal is no link")
    if unused:
        raise FreezeRefused(f"--tablespace {min(unused)} is none of the copy's: see the links in {data}/pg_tblspc")
    _check_apart(tree.roots)
    _check_files(tree)
    return tree


def _key(oid: str, target: str, tablespaces: Mapping[str, Path]) -> str | None:
    return next((key for key in (oid, target, target.rstrip("/")) if key in tablespaces), None)


def _remedy(name: str, target: str) -> str:
    if name == "pg_wal":
        return "name the copy of that directory with --wal DIR"
    if name.startswith("pg_tblspc/"):
        return f"name the copy of that directory with --tablespace {target}=DIR"
    return "replace the link by a copy of what it leads to"


def _directory(option: str, given: Path) -> Path:
    found = resolved(given)
    if not found.is_dir():
        raise FreezeRefused(f"{option}: {given} is no directory")
    return found


def _check_apart(roots: Sequence[Path]) -> None:
    for number, one in enumerate(roots):
        for other in roots[number + 1 :]:
            if one.is_relative_to(other) or other.is_relative_to(one):
                raise FreezeRefused(f"{one} and {other} lie in each other: a copy needs directories of its own")


def _check_files(tree: Tree) -> None:
    """Refuse what is more than a file or a directory of the copy, and remember which files are its own."""
    shared: dict[tuple[int, int], list[Path]] = {}
    links: dict[tuple[int, int], int] = {}
    for root in tree.roots:
        for one in entries(root):
            mode = one.status.st_mode
            if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
                raise FreezeRefused(f"{one.path} is no file: no data directory has a device or a pipe")
            if root != tree.data and stat.S_ISLNK(mode):
                raise FreezeRefused(f"{one.path} is a link, and there is none in such a directory: put a copy there")
            if not stat.S_ISREG(mode):
                continue
            inode = (one.status.st_dev, one.status.st_ino)
            tree.inodes.add(inode)
            if one.status.st_nlink > 1:
                shared.setdefault(inode, []).append(one.path)
                links[inode] = one.status.st_nlink
    pg_wal = (tree.data / "pg_wal", *(one.directory for one in tree.mapped if one.link == "pg_wal"))
    for inode, paths in shared.items():
        if len(paths) < links[inode]:
            raise FreezeRefused(
                f"{paths[0]} has another name outside of the copy (a hard link), and what is written here would be "
                "written there: copy the files themselves"
            )
        # Before PostgreSQL 16 a file of WAL has two names for a moment.
        if not all(path.parent in pg_wal for path in paths):
            raise FreezeRefused(
                f"{paths[0]} and {paths[1]} are one file (a hard link): who writes to one of them changes the other"
            )


def unused_uid() -> int:
    """Return a user id that nobody has: no account, and no process.

    :raises FreezeRefused: if this process may give files to too few user ids.
    """
    low, high = unused_range()
    taken = {status.st_uid for status in _processes()}
    for _ in range(100):
        uid = random.SystemRandom().randint(low, max(low, high))
        try:
            pwd.getpwuid(uid)
        except KeyError:
            if uid not in taken and uid > 1000:
                return uid
    raise FreezeRefused("there is no user id here that nobody has, to run the copy's code with: --trust-copy")


def unused_range() -> tuple[int, int]:
    """Return the first and the last user id of those that are nobody's."""
    with open("/proc/self/uid_map", encoding="ascii") as lines:
        spans = [(int(first), int(count)) for first, _, count in (line.split() for line in lines)]
    # systemd's list of user ids gives the range from 1879048192 on to nobody. In a container there may be fewer.
    first, count = max(spans, key=lambda span: span[1])
    low, high = max(first, 1_879_048_192), min(first + count - 1, 2_147_483_646)
    return (low, high) if low < high else (first + count // 2, first + count - 2)


def _processes() -> Iterator[os.stat_result]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                yield os.stat(f"/proc/{name}")
            except (FileNotFoundError, ProcessLookupError):
                continue


def give(roots: Sequence[Path], old: int, uid: int, gid: int) -> None:
    """Give all files and directories of user id *old* to *uid* and *gid*. Whoever owned them must not be at work."""
    for root in roots:
        if not root.is_dir() or root.is_symlink():
            continue
        if root.stat().st_uid == old:
            os.chown(root, uid, gid)
        for one in entries(root):
            if ASIDE in (one.path.parent.name, one.path.name) or one.status.st_uid != old:
                continue
            if not stat.S_ISREG(one.status.st_mode) and not stat.S_ISDIR(one.status.st_mode):
                continue
            # Opened, so that it is still what it was: no link that was put into its place.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(one.path.name, flags, dir_fd=one.directory)
            try:
                if os.fstat(descriptor).st_uid == old:
                    os.fchown(descriptor, uid, gid)
            finally:
                os.close(descriptor)
