"""Runs the programs that snapshot local volumes: argument lists, never a shell, and never for longer than allowed."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pg_freeze.volumes.errors import SnapshotFailed, SnapshotRefused

log = logging.getLogger(__name__)

_PACKAGES: Final[Mapping[str, str]] = {
    "btrfs": "btrfs-progs",
    "zfs": "zfsutils-linux",
    "lvcreate": "lvm2",
    "lvs": "lvm2",
    "lvremove": "lvm2",
    "sudo": "sudo",
}
# Often not on the PATH of a service.
SYSTEM: Final = ("/usr/sbin", "/sbin", "/usr/local/sbin")
# The programs tell one failure from another by their words only, which LC_ALL=C keeps English.
_NO_RIGHTS: Final = (
    "permission denied",
    "operation not permitted",
    "must be root",
    "must be run as root",
    "password is required",
)
_GOODBYE: Final = 5.0


@dataclass(frozen=True, slots=True)
class Done:
    """What a program answered."""

    code: int
    out: str
    error: str


@dataclass(frozen=True, slots=True)
class Commands:
    """Runs programs, all of them until one deadline.

    :param deadline: on the monotonic clock.
    :param sudo: run them through ``sudo -n``, which never asks for a password.
    :param also_in: directories to look for them in, besides those of PATH.
    """

    deadline: float
    sudo: bool = False
    also_in: tuple[str, ...] = SYSTEM

    def run(self, *words: str) -> str:
        """Run a program, and return what it wrote.

        :raises SnapshotRefused: if it is not there, or we have not the rights.
        :raises SnapshotFailed: if it failed otherwise, or took too long.
        """
        done = self.attempt(*words)
        if done.code == 0:
            return done.out
        said = " ".join((done.error or done.out).split()) or "no reason given"
        text = f"`{shlex.join(words)}` failed with exit code {done.code}: {said}"
        if any(sign in said.lower() for sign in _NO_RIGHTS):
            raise SnapshotRefused(f"{text}. {self._remedy(words[0])}")
        raise SnapshotFailed(text)

    def attempt(self, *words: str) -> Done:
        """Run a program, and return how it ended, whichever way.

        :raises SnapshotRefused: if it is not there.
        :raises SnapshotFailed: if it took too long.
        """
        command = [self._path(words[0]), *words[1:]]
        if self.sudo:
            command = [self._path("sudo"), "-n", "--", *command]
        log.info("%s", shlex.join(command))
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise SnapshotFailed(f"no time is left for `{shlex.join(words)}`, since the database stands still")
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
        )
        try:
            out, error = process.communicate(timeout=left)
        except subprocess.TimeoutExpired as late:
            _end(process, words)
            raise SnapshotFailed(
                f"`{shlex.join(words)}` did not end within {left:.0f} s and was ended, since the database stands "
                "still; the next try looks whether it made its snapshot"
            ) from late
        except BaseException:
            # Airflow's task timeout, or the end of the worker. Only once it is gone can be seen what it has made.
            _end(process, words)
            raise
        return Done(process.returncode, out, error)

    def _path(self, program: str) -> str:
        found = shutil.which(program) or shutil.which(program, path=os.pathsep.join(self.also_in))
        if found is None:
            package = _PACKAGES.get(program, program)
            raise SnapshotRefused(
                f"there is no `{program}` on this machine: install it (Debian: apt-get install {package}), or let the "
                "task run where the volumes are, by queue="
            )
        return found

    def _remedy(self, program: str) -> str:
        if self.sudo:
            return f"Allow user {os.geteuid()} `sudo -n {program}` in sudoers"
        return f"The worker runs as user {os.geteuid()}: give it the rights, or sudo=True and {program} in sudoers"


def _end(process: subprocess.Popen[str], words: tuple[str, ...]) -> None:
    try:
        process.kill()
        process.communicate(timeout=_GOODBYE)
    except (PermissionError, subprocess.TimeoutExpired):
        # sudo is root's, and may not be signalled; and a command can hang in the kernel.
        log.warning("`%s` could not be ended, and may go on", shlex.join(words))
