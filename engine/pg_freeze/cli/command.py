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
from pg_freeze.cli.supervisor import descendants

#: How long a command may take to end after SIGTERM; then SIGKILL.
GRACE: Final = timedelta(seconds=5)
#: How long it may take until nothing is left of it, once it was told; then its supervisor is ended, too.
_ENDS_WITHIN: Final = GRACE + timedelta(seconds=5)
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
        self._overdue_at: float | None = None
        control, self._control = os.pipe()
        # A supervisor that stands still reads nothing, and nobody may wait for that.
        os.set_blocking(self._control, False)
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
                    self.wait(_ENDS_WITHIN)
        finally:
            os.close(self._control)
            os.close(self._status)
            try:
                self._process.wait(_ENDS_WITHIN.total_seconds())
            except subprocess.TimeoutExpired:
                self._end_with_supervisor()

    @property
    def told(self) -> bool:
        """Whether it was told to end, by us or by its supervisor."""
        return self._overdue_at is not None

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

        :raises FreezeError: if its supervisor was ended, or something of it is left long after it was told to end. The
            command is then ended too.
        """
        deadline = time.monotonic() + patience.total_seconds()
        while self._exit is None:
            until = deadline if self._overdue_at is None else min(deadline, self._overdue_at)
            if not self._listen(max(0.0, until - time.monotonic())):
                self._end_without_supervisor()
                raise FreezeError("the supervisor of the command was ended, and so the command was, too")
            if self._is_over():
                break
            if self._overdue_at is not None and time.monotonic() >= self._overdue_at:
                self._end_with_supervisor()
                raise FreezeError(
                    f"the command was told to end, and {_ENDS_WITHIN.seconds} s later its supervisor had not ended all "
                    "of it: both were ended by SIGKILL, but for what may not be signalled"
                )
            if time.monotonic() >= deadline:
                return None
        return self._exit

    def due_in(self, seconds: float) -> None:
        """Let it be told to end after so many *seconds*, whatever becomes of us until then."""
        self._order(seconds=seconds)

    def tell(self) -> None:
        """Tell all of it to end: SIGTERM, and SIGKILL after :data:`GRACE`. To repeat that changes nothing."""
        if not self.told:
            self._is_told()
            self._order(end=True)

    def _is_told(self) -> None:
        if self._overdue_at is None:
            self._overdue_at = time.monotonic() + _ENDS_WITHIN.total_seconds()

    def _is_over(self) -> bool:
        return self._exit is not None

    def _order(self, **what: object) -> None:
        """Write an order. A short one is written whole or, to a supervisor that has not read so many, not at all."""
        left = json.dumps(what).encode() + b"\n"
        deadline = time.monotonic() + (_STARTS_WITHIN.total_seconds() if "command" in what else 0.0)
        with contextlib.suppress(BrokenPipeError):  # the next wait() says so
            while left:  # a signal may come between two halves of a long environment
                try:
                    left = left[os.write(self._control, left) :]
                except BlockingIOError:
                    if not select.select([], [self._control], [], max(0.0, deadline - time.monotonic()))[1]:
                        return

    def _listen(self, patience: float) -> bool:
        """Take in what the supervisor says within *patience* seconds; False if it is gone."""
        if not select.select([self._status], [], [], patience)[0]:
            return True
        read = os.read(self._status, 65536)
        *lines, self._unread = (self._unread + read).split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "told" in said:
                self._is_told()
            self._pid = said.get("pid", self._pid)
            self._exit = said.get("exit", self._exit)
            if "failed" in said:
                raise FreezeError(f"the command could not be run: {said['said']}")
        return bool(read) or self._exit is not None

    def _end_with_supervisor(self) -> None:
        """Send SIGKILL to all that the supervisor has started, and then to it: it would let go whose parent it is."""
        with contextlib.suppress(OSError):
            self._process.send_signal(signal.SIGSTOP)  # it starts nothing more
        give_up = time.monotonic() + 1.0
        while (found := descendants(self._process.pid)) and time.monotonic() < give_up:
            for pid in found:
                with contextlib.suppress(OSError):  # what may not be signalled, or is gone
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self._process.kill()
        if self._pid is not None and self._exit is None:
            with contextlib.suppress(OSError):  # all that there is where there is no /proc
                os.killpg(self._pid, signal.SIGKILL)
        self._process.wait()

    def _end_without_supervisor(self) -> None:
        # Its first process was killed by the kernel, the others are those of its group.
        assert self._pid is not None
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(OSError):
                os.killpg(self._pid, number)
                time.sleep(0.5)
