"""Shows a drain while it lasts: over one live block on a terminal, as a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

from rich.console import Group
from rich.live import Live
from rich.text import Text

from pg_freeze import Backend, Fate, OnDrainTimeout, Progress
from pg_freeze.cli import show
from pg_freeze.cli.output import Voice
from pg_freeze.cli.words import spoken

_REDRAW: Final = timedelta(milliseconds=100)
_LINE_EVERY: Final = timedelta(seconds=2)
_AT_MOST: Final = 15


class Draining:
    """A ``progress`` for a pause. Draws nothing for a drain that is over at once."""

    def __init__(self, voice: Voice, databases: Sequence[str], at_timeout: OnDrainTimeout) -> None:
        self._voice = voice
        self._databases = databases
        self._at_timeout = at_timeout
        self._next = _REDRAW
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            try:
                self._live.stop()
            except OSError:
                self._voice.console.quiet = True

    def __call__(self, progress: Progress) -> None:
        """Show how the drain goes. Never raises: the drain is more important than who watches it."""
        if self._voice.silent or progress.elapsed < self._next or not progress.lingering:
            return
        try:
            if self._voice.live:
                self._next = progress.elapsed + _REDRAW
                self._draw(progress)
            else:
                self._next = progress.elapsed + _LINE_EVERY
                self._voice.say(f"pg-freeze: {self.summary(progress)}{self.reasons(progress)}")
        except OSError:
            self._voice.console.quiet = True

    def _draw(self, progress: Progress) -> None:
        shown = progress.lingering[:_AT_MOST]
        more = len(progress.lingering) - len(shown)
        block = Group(
            Text(self.summary(progress), style="bold"),
            show.backends(shown, self.fates(progress)),
            *([Text(f"… and {more} more", style="dim")] if more else []),
        )
        if self._live is None:
            # No refreshing thread: it would run on between a signal and the undoing.
            self._live = Live(block, console=self._voice.console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(block, refresh=True)

    def summary(self, progress: Progress) -> str:
        """Return how many linger, for how long already, and for how long at most."""
        left = len(progress.lingering)
        return (
            f"draining {show.names(self._databases)} for {spoken(progress.elapsed)}: {left} session(s) linger, "
            f"at most {spoken(progress.remaining)} more"
        )

    def fates(self, progress: Progress) -> Mapping[Fate, str]:
        """Return what will happen to each kind of session."""
        left = spoken(progress.remaining)
        then = "then terminated" if self._at_timeout is OnDrainTimeout.TERMINATE else "then everything is undone"
        return {
            Fate.IDLE: "terminated now: idle",
            Fate.AFTER_BARRIER: "terminated now: its transaction began after the barrier",
            Fate.WAITS: f"may finish for {left} more, {then}",
            Fate.CANNOT_END: "cannot be ended by this role; an open transaction is waited for",
        }

    def reasons(self, progress: Progress) -> str:
        """Return the same for a line of a log: what will happen, and to whom."""
        fates = self.fates(progress)
        parts = []
        for fate in dict.fromkeys(backend.fate for backend in progress.lingering):
            those = [backend for backend in progress.lingering if backend.fate is fate]
            parts.append(f"; {len(those)} {fates[fate]} ({_some(those)})")
        return "".join(parts)


def _some(those: Sequence[Backend]) -> str:
    said = ", ".join(f"pid {one.pid} {one.role or ''}".rstrip() for one in those[:5])
    return said + (", …" if len(those) > 5 else "")
