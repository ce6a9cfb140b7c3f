"""Watches over a command and all that the command starts. A program of its own: it outlives ``pg-freeze``, to end them.

Run as ``python -I -S supervisor.py CONTROL STATUS GRACE``: two inherited file descriptors, and seconds. It imports
nothing but the standard library, and is started before the freeze, so that its own start is no part of the outage.

CONTROL brings one JSON object a line, and its end means that ``pg-freeze`` is gone, however it went. Of what it has
said just before, nothing is started any more:

``{"command": [...], "program": "/path", "environment": {...}}``
    start this
``{"seconds": 12.5}``
    from now on the command is told to end after so many seconds, unless another line says otherwise
``{"end": true}``
    tell it now

STATUS takes one object a line: ``{"pid": n}`` once it runs, ``{"failed": errno, "said": text}`` if it cannot be run,
``{"told": true}`` when it has been told to end, and at last ``{"exit": n}``, negative for a signal. After it has been
told, the last line comes when nothing of the command is left.

*Told* means SIGTERM to every process that the command has started, and after GRACE seconds SIGKILL. They are found by
their parents, and an orphan becomes a child of the supervisor: so neither a session of its own nor a double fork hides
one. Where the system has no such thing (only Linux has), the command's process group is signalled.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_PROCESSES = Path("/proc") if Path("/proc/self").is_dir() else None


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with(parent: int) -> None:
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)


def descendants(of: int) -> set[int]:
    """Return the processes that *of* has started, what these have, and so on; none where there is no ``/proc``."""
    children: dict[int, list[int]] = {}
    for process in () if _PROCESSES is None else _PROCESSES.iterdir():
        if process.name.isdigit():
            # A process may end while we look. Its name, in brackets, may hold anything.
            with contextlib.suppress(OSError, ValueError):
                state, parent = (process / "stat").read_bytes().rpartition(b")")[2].split()[:2]
                if state != b"Z":
                    children.setdefault(int(parent), []).append(int(process.name))
    found: set[int] = set()
    todo = [of]
    while todo:
        new = [pid for pid in children.get(todo.pop(), ()) if pid not in found]
        found.update(new)
        todo += new
    return found


class Supervisor:
    """One command, from its start to the end of the last process that it has started, if it is told to end."""

    def __init__(self, control: int, status: int, grace: float) -> None:
        self._control = control
        self._status = status
        self._grace = grace
        self._unread = b""
        self._child: subprocess.Popen[bytes] | None = None
        self._code: int | None = None
        self._due: float | None = None
        self._told: set[int] | None = None
        self._kill_at = 0.0

    def run(self) -> None:
        """Serve until the command is over, or ``pg-freeze`` is."""
        woken, waker = os.pipe()
        for end in (woken, waker, self._control):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(one) is not signal.SIG_IGN:
                signal.signal(one, lambda *_: self._tell())
        watched = [self._control, woken]
        while True:
            self._reap()
            if self._is_over():
                return
            ready, _, _ = select.select(watched, [], [], self._patience())
            if woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(woken, 4096)
            if self._control in ready and not self._obey():
                watched.remove(self._control)
                if self._child is None:
                    return
                self._tell()
            if self._due is not None and time.monotonic() >= self._due:
                self._tell()
            self._insist()

    def _patience(self) -> float | None:
        if self._told is not None:
            return 0.05
        return None if self._due is None else max(0.0, self._due - time.monotonic())

    def _is_over(self) -> bool:
        if self._code is None or (self._told is not None and self._left()):
            return False
        self._say(exit=self._code)
        return True

    def _left(self) -> set[int]:
        if _PROCESSES is not None:
            return descendants(os.getpid())
        assert self._child is not None
        try:
            os.killpg(self._child.pid, 0)
        except OSError:
            return set()
        return {-self._child.pid}

    def _obey(self) -> bool:
        """Read what ``pg-freeze`` says; return False once it is gone."""
        read, gone = self._read()
        *lines, self._unread = (self._unread + read).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if "command" in order and not gone:
                self._start(order)
            if "seconds" in order:
                self._due = time.monotonic() + order["seconds"]
            if "end" in order:
                self._tell()
        return not gone

    def _read(self) -> tuple[bytes, bool]:
        """Return all that is to be read now, and whether nothing can follow."""
        read = b""
        try:
            while part := os.read(self._control, 65536):
                read += part
        except BlockingIOError:
            return read, False
        except OSError:
            pass
        return read, True

    def _start(self, order: dict[str, Any]) -> None:
        parent = os.getpid()
        try:
            # A session of its own: Ctrl-C at a terminal reaches pg-freeze, which thaws, and has it told.
            self._child = subprocess.Popen(
                order["command"],
                executable=order["program"],
                env=order["environment"],
                start_new_session=True,
                preexec_fn=lambda: _die_with(parent),  # noqa: PLW1509 - there is one thread
            )
        except OSError as error:
            self._say(failed=error.errno, said=str(error))
            self._code = 127
            return
        self._say(pid=self._child.pid)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._child is not None and pid == self._child.pid:
                self._code = os.waitstatus_to_exitcode(status)
                self._child.returncode = self._code

    def _tell(self) -> None:
        if self._told is None and self._child is not None and self._code is None:
            self._told = set()
            self._kill_at = time.monotonic() + self._grace
            self._say(told=True)
            self._insist()

    def _insist(self) -> None:
        """Signal what is left of a command that has been told: each process once with SIGTERM, until it is too late."""
        if self._told is None:
            return
        late = time.monotonic() >= self._kill_at
        for pid in self._left():
            if late or pid not in self._told:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
                    os.kill(pid, signal.SIGCONT)  # a stopped process would never hear of it
                self._told.add(pid)

    def _say(self, **what: object) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(self._status, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    _prctl(_SET_CHILD_SUBREAPER, 1)
    Supervisor(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])).run()
