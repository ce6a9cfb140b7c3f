"""The standard streams: they may be closed, know too few characters, or have a reader who has gone."""

from __future__ import annotations

import os
import sys


def open_streams() -> None:
    """Make sure that writing to the standard streams works: they may be closed, or know too few characters."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            # Take the number, so that no connection gets it: it would receive our messages.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        else:
            stream.reconfigure(errors="backslashreplace")


def write(text: str) -> None:
    """Write *text* to stdout, all of it.

    :raises OSError: if it could not be delivered. What is left is thrown away, or the interpreter would try again.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        _throw_away(1)
        raise


def let_go() -> None:
    """Throw away what nobody reads any more: the interpreter would try again at its end, and change the exit code."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            _throw_away(number)


def _throw_away(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
