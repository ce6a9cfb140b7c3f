"""What tests need of a machine beyond Python, and whether it is there."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from devtools import isolation, pgbouncer, volumes
from devtools.binaries import BinariesMissing, binaries

#: Bytes that all processes of a run may need for their servers at one time, with as much again to spare.
ROOM: Final = 6 << 30


def memory_directory() -> Path | None:
    """Return a directory in memory, open to all, whose programs can be run; None where there is none with enough room.

    A cluster is a thousand files and each database three hundred more, made and deleted for each test. ext4 gives no
    new file the inode of one that was deleted in the last seconds, and looks at each of those every time.
    """
    path = Path("/dev/shm")
    try:
        kinds = dict(line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines())
        available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvail"))
        fits = min(shutil.disk_usage(path).free, int(available.split()[1]) << 10) >= ROOM
        runs = not os.statvfs(path).f_flag & os.ST_NOEXEC
        open_to_all = path.stat().st_mode & 0o7777 == 0o1777
        return path if kinds.get(str(path)) == "tmpfs" and fits and runs and open_to_all else None
    except (OSError, StopIteration):
        return None


def _postgresql15() -> str | None:
    try:
        binaries(15)
    except BinariesMissing as error:
        return str(error)
    return None


#: What the marker ``needs`` takes: each returns what is missing, in a sentence, or None.
NEEDS: Final[Mapping[str, Callable[[], str | None]]] = {
    "isolation": isolation.missing,
    "pgbouncer": pgbouncer.missing,
    "postgresql15": _postgresql15,
    "volumes": volumes.missing,
}


def variable(need: str) -> str:
    """Return the environment variable that makes the lack of *need* an error."""
    return f"REQUIRE_{need.upper()}"
