"""The strategies by name. To add one: a module here, and a line in :data:`OURS`.

Another distribution adds one by an entry point in the group :data:`GROUP`: its name is the strategy's, and its value an
instance of :class:`~pg_freeze.strategies.base.Strategy`. The group is looked at only for a name that is not ours.

Nothing is loaded before it is asked for: a help text needs the names alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final

from pg_freeze.model import LOCK, PRIVILEGES, READ_ONLY

if TYPE_CHECKING:
    from pg_freeze.strategies.base import Strategy

GROUP: Final = "pg_freeze.strategies"
#: What each of ours does, in a few words. The module of a strategy has its name, with ``_`` for ``-``.
OURS: Final[Mapping[str, str]] = {
    LOCK: "writers wait, nobody is ended",
    READ_ONLY: "writes are refused, sessions are ended",
    PRIVILEGES: "the rights to write are revoked, from inside one database",
}


@cache
def named(name: str) -> Strategy:
    """Return a strategy.

    :raises InvalidRequest: if there is none of this name.
    """
    from pg_freeze.errors import InvalidRequest  # noqa: PLC0415
    from pg_freeze.strategies.base import Strategy  # noqa: PLC0415

    found: object = None
    if name in OURS:
        found = import_module(f"{__name__}.{name.replace('-', '_')}").STRATEGY
    else:
        for point in entry_points(group=GROUP, name=name):
            found = point.load()
    if isinstance(found, Strategy):
        return found
    raise InvalidRequest(
        f"strategy is {name!r}: it must be one of {', '.join(OURS)}, or one that is installed here as an entry point "
        f"of the group {GROUP}"
    )


def of(name: str) -> Strategy:
    """Return the strategy that a journal names; if it is not installed here, one that can show and thaw its freezes."""
    from pg_freeze.errors import InvalidRequest  # noqa: PLC0415
    from pg_freeze.strategies.base import NotInstalled  # noqa: PLC0415

    try:
        return named(name)
    except InvalidRequest:
        return NotInstalled(name)
