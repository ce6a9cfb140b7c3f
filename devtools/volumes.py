"""Real btrfs file systems in files, for those who are root on a machine with loop devices."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devtools.binaries import temp_root


def missing() -> str | None:
    """Return what this machine lacks to have such a file system, or None."""
    if os.geteuid() != 0:
        return "only root can mount"
    if shutil.which("mkfs.btrfs") is None or shutil.which("btrfs") is None:
        return "btrfs-progs is not installed"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices"
    if "btrfs" not in Path("/proc/filesystems").read_text():
        return "the kernel has no btrfs"
    return None


@contextmanager
def btrfs(*subvolumes: str, size: str = "1G") -> Iterator[Path]:
    """Have a file system with these subvolumes, and yield where it is mounted."""
    directory = Path(tempfile.mkdtemp(prefix="pgf-btrfs-", dir=temp_root()))
    directory.chmod(0o755)
    image, mounted = directory / "image", directory / "mounted"
    try:
        mounted.mkdir()
        _run("truncate", "--size", size, str(image))
        _run("mkfs.btrfs", "--quiet", str(image))
        _run("mount", "-o", "loop", str(image), str(mounted))
        try:
            for name in subvolumes:
                _run("btrfs", "subvolume", "create", str(mounted / name))
            yield mounted
        finally:
            # Lazily: what a test has left running there must not keep it mounted.
            _run("umount", "--lazy", str(mounted))
    finally:
        shutil.rmtree(directory)


def writable(snapshot: Path, name: str) -> Path:
    """Return a writable copy of a read-only snapshot: a server cannot run on that itself."""
    copy = snapshot.parent / name
    _run("btrfs", "subvolume", "snapshot", str(snapshot), str(copy))
    return copy


def _run(*words: str) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr or done.stdout}")
