"""Copies to verify: a frozen server, copied once, and clones of that copy to spoil."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devtools.asking import pause
from devtools.binaries import temp_root
from devtools.pgserver import Server
from devtools.rights import checkpointer
from pg_freeze import attest
from pg_freeze.attestation import Attestation
from pg_freeze.verify import Verified, verify_copy

#: Root isolates a copy; whoever else runs the tests has to trust it.
TRUSTED = os.geteuid() != 0


def verify(copy: Path, server: Server, **options: Any) -> Verified:
    """Verify a copy of a server's, in isolation if that can be had."""
    return verify_copy(copy, bin_dir=server.programs, **{"trusted": TRUSTED, **options})


@dataclass
class Copies:
    """A server, the directory of its copies, and what was attested when it was copied."""

    server: Server
    place: Path
    taken: Path
    attestation: Path
    closed: Attestation
    count: int = field(default=0)

    def clone(self) -> Path:
        """Return one more copy, to be spoiled."""
        self.count += 1
        return copied(self.taken, self.place / f"clone{self.count}")

    def verify(self, copy: Path, **options: Any) -> Verified:
        """Verify it with the attestation from outside, unless told otherwise."""
        return verify(copy, self.server, **{"attestation": self.attestation, **options})


def copied(directory: Path, target: Path) -> Path:
    """Copy a directory as a volume snapshot would: with its links as they are."""
    subprocess.run(["cp", "-a", "--reflink=auto", "--", str(directory), str(target)], check=True)
    return target


@contextmanager
def scratch() -> Iterator[Path]:
    """Have a directory with a short name that a server's account can enter."""
    base = Path(temp_root()) / f"pgf-copies-{os.getpid()}"
    number = 0
    while (place := base.with_name(f"{base.name}-{number}")).exists():
        number += 1
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    try:
        yield place
    finally:
        shutil.rmtree(place)


@contextmanager
def frozen_copies(
    server: Server, databases: list[str], *, meanwhile: Callable[[], object] = lambda: None, **options: Any
) -> Iterator[Copies]:
    """Freeze by settings, look, copy, look again.

    :param meanwhile: called between the first look and the copy.
    """
    role = checkpointer(server.version)
    connect = server.connect_factory(role)

    def connect_to(name: str) -> Any:
        return server.connect_factory(role, dbname=name)()

    with scratch() as place:
        pause(connect, databases=databases, holder="copier", checkpoint=True, **options)
        attest.before(connect, databases=databases, holder="copier", connect_to=connect_to)
        meanwhile()
        taken = copied(server.data, place / "taken")
        closed = attest.after(connect, databases=databases, holder="copier", connect_to=connect_to)
        closed.write(place / "attestation.json")
        yield Copies(server, place, taken, place / "attestation.json", closed)
