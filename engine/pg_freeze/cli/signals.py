"""SIGINT, SIGTERM and SIGHUP end a verb by an exception, once, so that what it had begun is undone on the way out."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked us to stop. A BaseException, like KeyboardInterrupt: nothing but a clean-up may catch it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that this signal has ended."""
        return 128 + self.signum


class Signals:
    """Which signals came, and whether they still count."""

    def __init__(self) -> None:
        self._settled = False
        self._held = False
        self._waiting: int | None = None

    def settle(self) -> None:
        """From here on signals are ignored: it is done, and only has to be reported."""
        self._settled = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a signal that comes meanwhile raise at the end of the block, which so is done or not begun."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting is not None:
            raise Interrupted(self._waiting)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Let the first signal raise :class:`Interrupted`. Those that come during the undoing are only answered."""
        before = {}
        for one in SIGNALS:
            # Ignored by whoever started us: `nohup pg-freeze`, or a script's `pg-freeze &`.
            if signal.getsignal(one) is not signal.SIG_IGN:
                before[one] = signal.signal(one, self._arrived)
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _arrived(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self._settled:
            _say(f"{signal.Signals(signum).name} came too late: it is done")
            return
        self._settled = True
        _say(f"{signal.Signals(signum).name}: stopping, and undoing what was begun")
        if self._held:
            self._waiting = signum
            return
        raise Interrupted(signum)


def _say(text: str) -> None:
    try:
        os.write(2, f"\npg-freeze: {text}\n".encode())
    except OSError:
        return  # nobody listens; that must not keep the clean-up
