"""LSNs as PostgreSQL prints them, and as numbers, which can be compared."""

from __future__ import annotations

import re
from typing import Final

_FORM: Final = re.compile(r"[0-9A-F]{1,8}/[0-9A-F]{1,8}")


def is_lsn(text: str) -> bool:
    """Whether a text that somebody else has written is an LSN."""
    return _FORM.fullmatch(text) is not None


def number(lsn: str) -> int:
    """Return the number of bytes from the beginning of the WAL."""
    high, _, low = lsn.partition("/")
    return (int(high, 16) << 32) + int(low, 16)


def text(number_: int) -> str:
    """Return it as PostgreSQL prints it."""
    return f"{number_ >> 32:X}/{number_ & 0xFFFFFFFF:X}"
