"""One meaning of a duration, wherever one is given: Python, DAG files, rendered templates, the command line."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final, TypeAlias

from pg_freeze.errors import InvalidRequest

#: A timedelta, a number of seconds, or text: ``90``, ``90s``, ``5m``, ``1h30m``, ``2d``.
Duration: TypeAlias = timedelta | float | str

_WRITTEN: Final = re.compile(
    r"(?:(?P<days>\d+(?:\.\d+)?)d)?(?:(?P<hours>\d+(?:\.\d+)?)h)?(?:(?P<minutes>\d+(?:\.\d+)?)m)?"
    r"(?:(?P<seconds>\d+(?:\.\d+)?|\.\d+)s?)?",
    re.ASCII,
)
_LONGEST: Final = timedelta(days=366)


def duration(name: str, value: Duration, longest: timedelta = _LONGEST) -> timedelta:
    """Return *value* as a timedelta.

    :param name: of the option or keyword, for the error.
    :param longest: what is still accepted; by default a year.
    :raises InvalidRequest: for anything else than a :data:`Duration`, and for more than *longest*.
    """
    try:
        found = _read(value)
    except OverflowError:
        found = timedelta.max
    if found is None:
        # On a command line there is nothing but text.
        also = "" if isinstance(value, str) else "a timedelta, "
        raise InvalidRequest(
            f"{name} is {value!r}, which is not a time: give {also}a number of seconds, or text such as 90s, 15m, "
            "1h30m or 2d"
        )
    if found > longest:
        limit = "a year" if longest == _LONGEST else f"{longest.days} days"
        raise InvalidRequest(f"{name} is {value!r}, which is more than {limit}")
    return found


def _read(value: object) -> timedelta | None:
    if isinstance(value, timedelta):
        return value
    # True is an int, and no number of seconds.
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return timedelta(seconds=value) if value == value else None  # noqa: PLR0124 - only NaN differs from itself
    if not isinstance(value, str):
        return None
    found = _WRITTEN.fullmatch(value.strip().lower())
    if found is None or not any(found.groups()):
        return None
    return timedelta(**{unit: float(number) for unit, number in found.groupdict("0").items()})


def written(value: timedelta) -> str:
    """Return a duration that is not negative as it is typed, with its units: ``90d``, ``1d12h``, ``0.5s``."""
    hours, rest = divmod(timedelta(seconds=value.seconds), timedelta(hours=1))
    minutes, seconds = divmod(rest + timedelta(microseconds=value.microseconds), timedelta(minutes=1))
    parts = ((value.days, "d"), (hours, "h"), (minutes, "m"), (seconds.total_seconds(), "s"))
    return "".join(f"{number:.9g}{unit}" for number, unit in parts if number) or "0s"
