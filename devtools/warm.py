"""Processes that run one act of the core and may be killed at any point of it, each forked from one that is warm.

A fresh Python takes longer to import everything than the act takes to run.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psycopg
from psycopg.conninfo import make_conninfo

import pg_freeze as core
from devtools import asking
from pg_freeze.strategies import OURS


def _into(dsn: str) -> core.ConnectTo:
    return lambda name: core.connector(make_conninfo(dsn, dbname=name))()


def _hold(strategy: str, dsn: str, *, application: str, **options: Any) -> dict[str, Any]:
    """Freeze for the time of a block, which looks whether the application can write; say from when to when it ran."""
    with asking.frozen(core.connector(dsn), _into(dsn), strategy=strategy, **options):
        entered = time.time()
        # What a block does need not go to the server. Here some of it does, so that something can happen meanwhile.
        with suppress(psycopg.Error), psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("SELECT 'the snapshot'")
        with suppress(psycopg.Error), psycopg.connect(application, autocommit=True) as conn:
            conn.execute("SET lock_timeout = '100ms'")
            conn.execute("INSERT INTO t VALUES (2)")
        left = time.time()
    return {"entered": entered, "left": left}


def _core(act: Callable[..., core.Freeze | core.Resumed], dsn: str, **options: Any) -> dict[str, Any]:
    return act(core.connector(dsn), connect_to=_into(dsn), **options).as_dict()


ACTS: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "pause": partial(_core, asking.pause),
    **{f"pause by {name}": partial(_core, asking.pause, strategy=name) for name in OURS},
    "checkpoint": partial(_core, core.checkpoint),
    "resume": partial(_core, core.resume),
    **{f"block by {name}": partial(_hold, name) for name in OURS},
}
DURATIONS: Final = ("lease", "drain_timeout", "age", "reader_grace")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: what it returned, or the error that it raised; neither if it was killed."""

    returned: dict[str, Any] | None = None
    error: str | None = None
    message: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether the act was reported as done."""
        return self.returned is not None

    def __str__(self) -> str:
        """Return one line."""
        return "succeeded" if self.succeeded else f"{self.error}: {self.message}" if self.error else "was killed"


class Warm:
    """A warm process, which runs one act at a time in a fork of itself."""

    def __init__(self) -> None:
        self.pid = 0
        self._lock = threading.Lock()
        self._started = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "devtools.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parent.parent,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid:
            self.signal(signal.SIGKILL)
            self.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def start(self, act: str, dsn: str, **options: Any) -> None:
        """Begin *act* in a process of its own; times are in seconds."""
        assert self._process.stdin is not None
        self._started.clear()
        self._process.stdin.write(json.dumps({"act": act, "dsn": dsn, "options": options}) + "\n")
        self._process.stdin.flush()
        self.pid = int(self._line())
        self._started.set()

    def signal(self, number: int) -> None:
        """Send a signal to the process that runs the act, from any thread; nothing, if :meth:`wait` was there first.

        It may have sent its first statement before we have read its id: 0 would be our own whole group.
        """
        self._started.wait(60)
        with self._lock:
            if self.pid:
                os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether the act has ended."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def wait(self) -> Ended:
        """Return how the act ended, once it has."""
        ended = Ended(**json.loads(self._line()))
        self._release()
        return ended

    def _release(self) -> None:
        assert self._process.stdin is not None
        with self._lock:
            self.pid = 0
        self._process.stdin.write("reap\n")
        self._process.stdin.flush()
        assert self._line() == "reaped\n"

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the warm process is gone")
        return line


def _run(act: str, dsn: str, options: dict[str, Any]) -> dict[str, Any]:
    for name in DURATIONS:
        if name in options:
            options[name] = timedelta(seconds=options[name])
    try:
        return {"returned": ACTS[act](dsn, **options)}
    except core.FreezeError as error:
        return {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    """Fork for each line of the standard input; print the process id, then how it ended."""
    for line in sys.stdin:
        asked = json.loads(line)
        readable, writable = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(readable)
                os.write(writable, json.dumps(_run(**asked)).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(writable)
        print(pid, flush=True)
        with os.fdopen(readable, "rb") as pipe:
            print(pipe.read().decode() or "{}", flush=True)
        sys.stdin.readline()
        os.waitpid(pid, 0)
        print("reaped", flush=True)


if __name__ == "__main__":
    main()
