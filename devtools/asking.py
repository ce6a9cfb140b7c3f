"""The acts that take a request, called by its keywords: a test then reads as one line."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pg_freeze as core

Tell = Callable[[core.Progress], None]


def pause(
    connect: core.Connect, *, connect_to: core.ConnectTo | None = None, progress: Tell | None = None, **wanted: Any
) -> core.Freeze:
    """Pause, as :meth:`FreezeRequest.of` takes it. A *connect* that leads into the database is a way into it, too."""
    if connect_to is None and wanted.get("strategy") == core.PRIVILEGES:
        connect_to = lambda _: connect()  # noqa: E731
    return core.pause(connect, core.FreezeRequest.of(**wanted), connect_to=connect_to, progress=progress)


def frozen(
    connect: core.Connect, connect_to: core.ConnectTo, *, progress: Tell | None = None, **wanted: Any
) -> AbstractContextManager[core.Hold]:
    """Freeze for a block, as :meth:`FreezeRequest.for_block` takes it."""
    return core.frozen(connect, connect_to, core.FreezeRequest.for_block(**wanted), progress=progress)


def preflight(connect: core.Connect, *, connect_to: core.ConnectTo | None = None, **wanted: Any) -> core.Preflight:
    """Examine, as :meth:`FreezeRequest.of` takes it."""
    return core.preflight(connect, core.FreezeRequest.of(**wanted), connect_to=connect_to)
