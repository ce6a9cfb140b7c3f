"""The command of ``pg-freeze run``: started, watched over and ended through a supervisor that outlives us."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pg_freeze import FreezeError

#: How long a command may take to end after SIGTERM; then SIGKILL.
GRACE: Final = timedelta(seconds=5)
#: How long its start may take.
_STARTS_WITHIN: Final = timedelta(minutes=1)
_SUPERVISOR: Final = Path(__file__).with_name("supervisor.py")


class Command:
    """A command that ends with us, and all that it starts. Made before the freeze, started under it.

    :param program: the file to run.
    :param words: the command line, from its name on.
    :param stdout: where its output goes; by default where ours does.
    """

    def __init__(self, program: str, words: Sequence[str], stdout: int | None = None) -> None:
        self._program = program
        self._words = list(words)
        self._unread = b""
        self._pid: int | None = None
        self._exit: int | None = None
        self.told = False
        control, self._control = os.pipe()
        self._status, status = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISOR), str(control), str(status), str(GRACE.total_seconds())],
                stdout=stdout,
                pass_fds=(control, status),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._control)
            os.close(self._status)
            raise
        finally:
            os.close(control)
            os.close(status)

    def __enter__(self) -> Self:
        """Return itself; the end of the block waits for what was told to end."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Make sure that nothing of the command is left, if it was told to end, and let the supervisor go."""
        try:
            if kind is not None and self._pid is not None and self._exit is None:
                self.tell()
                with contextlib.suppress(FreezeError):
                    self.wait(timedelta(seconds=GRACE.total_seconds() + 5))
        finally:
            os.close(self._control)
            os.close(self._status)
            # It stays for as long as anything does that it may not signal; nobody has to wait for that.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE.total_seconds() + 5)

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it.

        :raises FreezeError: if it cannot be run.
        """
        self._order(command=self._words, program=self._program, environment=dict(environment))
        deadline = time.monotonic() + _STARTS_WITHIN.total_seconds()
        while self._pid is None:
            if time.monotonic() > deadline:
                raise FreezeError(f"the command was not started within {_STARTS_WITHIN.seconds} s")
            if not self._listen(1.0):
                raise FreezeError("the supervisor of the command was ended before it could start it")

    def wait(self, patience: timedelta) -> int | None:
        """Return its exit code, negative for a signal, as soon as it ends; None if it has not within *patience*.

        :raises FreezeError: if its supervisor was ended; the command is then ended too.
        """
        deadline = time.monotonic() + patience.total_seconds()
        while self._exit is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            if not self._listen(left):
                self._end_without_supervisor()
                raise FreezeError("the supervisor of the command was ended, and so the command was, too")
        return self._exit

    def due_in(self, seconds: float) -> None:
        """Let it be told to end after so many *seconds*, whatever becomes of us until then."""
        self._order(seconds=seconds)

    def tell(self) -> None:
        """Tell all of it to end: SIGTERM, and SIGKILL after :data:`GRACE`."""
        self._order(end=True)

    def _order(self, **what: object) -> None:
        left = json.dumps(what).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # the next wait() says so
            while left:  # a signal may come between two halves of a long environment
                left = left[os.write(self._control, left) :]

    def _listen(self, patience: float) -> bool:
        """Take in what the supervisor says within *patience* seconds; False if it is gone."""
        if not select.select([self._status], [], [], patience)[0]:
            return True
        read = os.read(self._status, 65536)
        *lines, self._unread = (self._unread + read).split(b"\n")
        for line in lines:
            said = json.loads(line)
            self.told = self.told or "told" in said
            self._pid = said.get("pid", self._pid)
            self._exit = said.get("exit", self._exit)
            if "failed" in said:
                raise FreezeError(f"the command could not be run: {said['said']}")
        return bool(read) or self._exit is not None

    def _end_without_supervisor(self) -> None:
        # Its first process was killed by the kernel, the others are those of its group.
        assert self._pid is not None
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(OSError):
                os.killpg(self._pid, number)
                time.sleep(0.5)
