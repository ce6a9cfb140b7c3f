"""The pause: a freeze that outlives the process that makes it."""

from __future__ import annotations

from collections.abc import Callable

from pg_freeze.control import Connect, ConnectTo, control
from pg_freeze.errors import InvalidRequest
from pg_freeze.freeze.attempt import Attempt
from pg_freeze.model import Freeze, Progress
from pg_freeze.request import FreezeRequest
from pg_freeze.strategies import named


def pause(
    connect: Connect,
    request: FreezeRequest,
    *,
    connect_to: ConnectTo | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Freeze:
    """Freeze databases: refuse writes, make the sessions that may still write go, and report the freeze.

    Called again by the same holder it adopts the freeze that stands, extends its lease and drains on.

    :param connect: returns a new connection to the maintenance database.
    :param request: what to freeze, and how: see :meth:`FreezeRequest.of`.
    :param connect_to: returns a new connection to the named database, for a strategy that works from inside.
    :param progress: called after each poll of the drain.
    :returns: the freeze, in state ``frozen``.
    :raises InvalidRequest: for a strategy that ends with the process that froze.
    :raises FreezeRefused: if preflight refuses, or another holder has a database; nothing was changed.
    :raises DrainTimeout: if sessions were left; everything was undone.
    :raises LeaseLost: if somebody resumed, a newer attempt took over, or the lease ended meanwhile.
    :raises ServerLost: if the server went away.
    :raises ThawFailed: if something failed and could not be undone: still frozen until the lease ends.
    """
    check_outlives(request.strategy)
    attempt = Attempt.of(connect, connect_to, request, progress)
    try:
        with control(attempt.connect, "pause") as conn:
            return attempt.freeze(conn)
    except BaseException as error:
        # BaseException: Airflow's task timeout is one, and so are KeyboardInterrupt and SystemExit. They may come as
        # late as while the connection is closed, hence outside of it.
        attempt.undo(error)
        raise


def check_outlives(strategy: str) -> None:
    """Refuse a strategy by which nothing would be left of a pause.

    :raises InvalidRequest: saying what to use instead.
    """
    if not named(strategy).outlives:
        raise InvalidRequest(
            f"a freeze by the strategy {strategy} ends with the process that froze, so nothing would be left of a "
            "pause: freeze for the time of a command with pg-freeze run, for the time of a block with frozen() or "
            "@task.pg_frozen, or use strategy=read-only"
        )
