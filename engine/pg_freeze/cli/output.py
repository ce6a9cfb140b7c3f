"""How things are said: to people on stderr while something happens, and on stdout once it has."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
from collections.abc import Iterable
from typing import IO, Final, cast

from rich.console import Console, RenderableType
from rich.text import Text

from pg_freeze.names import visible

#: Wide enough for every table: a log file has no edge.
_NO_EDGE: Final = 240


class _Unbreakable(Console):
    """A console whose reader may go away: by default rich ends the process then, in the middle of whatever it does."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Voice:
    """Says things to people, on stderr. A lost reader is no error."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        wide = None if sys.stderr.isatty() or "COLUMNS" in os.environ else _NO_EDGE
        self.console = _Unbreakable(stderr=True, quiet=silent, width=wide, highlight=False)

    @property
    def live(self) -> bool:
        """Whether a line can be drawn over."""
        return self.console.is_terminal and not self.console.is_dumb_terminal and not self.silent

    def say(self, text: str, style: str = "") -> None:
        """Say one thing. Not wrapped, so that commands in it can be copied."""
        self.show(Text("\n".join(map(visible, text.split("\n"))), style=style))

    def show(self, *things: RenderableType) -> None:
        """Show tables and texts."""
        try:
            for thing in things:
                self.console.print(thing, soft_wrap=isinstance(thing, Text))
        except OSError:
            self.console.quiet = True


class Log(logging.Handler):
    """Passes on what the core logs, through the voice, so that it goes well with a live line."""

    def __init__(self, voice: Voice) -> None:
        super().__init__()
        self._voice = voice

    def emit(self, record: logging.LogRecord) -> None:
        """Say one line, with the traceback if there is one."""
        self._voice.say(f"pg-freeze: {self.format(record)}", "yellow" if record.levelno >= logging.WARNING else "dim")


def rendered(things: Iterable[RenderableType], stream: IO[str]) -> str:
    """Return tables and texts as they are to be written to *stream*: for a terminal in colour, and as wide as it is."""
    terminal = stream.isatty()
    width = shutil.get_terminal_size().columns if terminal or "COLUMNS" in os.environ else _NO_EDGE
    text = ""
    for thing in things:
        console = Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False)
        console.print(thing, soft_wrap=isinstance(thing, Text))
        shown = cast("io.StringIO", console.file).getvalue()
        # A table is padded to its full width, which only litters a file. A text may hold a command: left as it is.
        text += shown if isinstance(thing, Text) else "".join(f"{line.rstrip()}\n" for line in shown.splitlines())
    return text
