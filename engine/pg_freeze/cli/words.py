"""Small texts: times, durations, and command lines that can be pasted into a shell."""

from __future__ import annotations

import argparse
import getpass
import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from pg_freeze import InvalidRequest, durations

_STARTED: Final = time.monotonic()


def duration(text: str) -> timedelta:
    """Return the time that ``90``, ``90s``, ``15m`` or ``1h30m`` means.

    :raises argparse.ArgumentTypeError: for anything else.
    """
    return _duration(text, timedelta(days=366))


def age(text: str) -> timedelta:
    """Return the time that ``90d`` or ``1d12h`` means, up to a hundred years.

    What is older is deleted. Somebody who means days and gives a bare number must not delete all but seconds.

    :raises argparse.ArgumentTypeError: for anything else, also for a number without its unit.
    """
    if re.search(r"[\d.]\s*\Z", text, re.ASCII):
        number = text.strip()
        days = f"{number}d for days" if number.isdecimal() else "90d for days"
        raise argparse.ArgumentTypeError(f"it is {text!r}, which ends without a unit: give one, such as {days}")
    return _duration(text, timedelta(days=36525))


def _duration(text: str, longest: timedelta) -> timedelta:
    try:
        return durations.duration("it", text, longest)
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def spoken(value: timedelta) -> str:
    """Return a duration for people, in its two largest units: ``0.3 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``."""
    total = abs(value.total_seconds())
    if total < 9.95:
        return f"{total:.1f} s"
    seconds = round(total)
    for size, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // small
            return f"{seconds // size} {name}" + (f" {rest} {small_name}" if rest else "")
    return f"{seconds} s"


def moment(when: datetime | None, now: datetime | None = None) -> str:
    """Return a time for people, with how far it is from *now*."""
    if when is None:
        return "-"
    text = when.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if now is None:
        return text
    return f"{text} (in {spoken(when - now)})" if when > now else f"{text} ({spoken(now - when)} ago)"


def person() -> str:
    """Return ``user@host``, the holder of a freeze that somebody types."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container runs as a number that has no name
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def process_age() -> timedelta:
    """Return how long ago this process began: what happened since then may have made its order obsolete."""
    known = time.monotonic() - _STARTED
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:  # no /proc here: the age since this module was loaded has to do
        return timedelta(seconds=known)
    # proc(5): field 22 is the start in ticks since boot, rounded down, so an age is up to a tick too great.
    tick = 1 / os.sysconf("SC_CLK_TCK")
    return timedelta(seconds=max(known, time.clock_gettime(time.CLOCK_BOOTTIME) - (int(fields[19]) + 1) * tick))


def program() -> list[str]:
    """Return the words that start this program again, from the same shell."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return [sys.executable, "-m", "pg_freeze"]
    found = shutil.which("pg-freeze")
    return (
        ["pg-freeze"] if found is not None and Path(found).resolve() == started.resolve() else [str(started.resolve())]
    )


def command(verb: str, options: Sequence[str], databases: Sequence[str], holder: str) -> str:
    """Return a command line that a POSIX shell takes as it is, whatever is in the names."""
    words = [*program(), verb, *options]
    for name, values in (("database", databases), ("holder", (holder,))):
        for value in values:
            # A value that begins with a dash must be in one word with its option.
            words += [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]
    line = shlex.join(words)
    if line.isprintable():
        return line
    # A line break in a name would begin a line of its own. The whole line goes through printf, and not each word: $(…)
    # takes away a line break that is the last of what it returns.
    text = "".join(_octal(char) for char in line)
    return f"eval \"$(printf '{text}')\""


def _octal(char: str) -> str:
    if char == "%":
        return "%%"
    return char if char.isprintable() and char not in "'\\" else "".join(f"\\{byte:03o}" for byte in char.encode())
