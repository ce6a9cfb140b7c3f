"""What a strategy is.

A strategy keeps writers out of databases for the time of a freeze. All else is the same for all of them: tickets,
lease, dead-man switch, journal, attestation, command line and operators. The state machine in ``freeze/`` drives each
strategy through this one type. A strategy says, in the order in which that is asked:

1. **Where its journal is** (:attr:`~Strategy.own_journal`): in the maintenance database, or in the frozen database
   itself. All that follows happens over a connection to the database that has the journal.
2. **What it needs** (:meth:`~Strategy.findings`): what preflight looks for, beside what every freeze needs.
3. **How it engages** (:meth:`~Strategy.engage`). By default the server does it, in the transaction that writes the
   journal's row: it calls the routine ``pgfreeze.engage_<name>``. On disk a database is then frozen and journalled, or
   neither. A strategy that holds something in sessions of its own takes hold first, and then has the row written. The
   row names these sessions. When one of them is gone, the server closes the freeze.
4. **Whom it waits for** (:meth:`~Strategy.drain`): the sessions for which :attr:`~Strategy.lingers` is true.
5. **What its proof is** (:attr:`~Strategy.proof`): what an attestation must find, beside that nothing was changed.
6. **How it releases**. The server thaws, and only the server: ``pgfreeze.thaw`` ends the sessions that the row names,
   brings back the settings in ``prior_settings``, and calls the routine ``pgfreeze.release_<name>`` if there is one.
   :meth:`Engaged.release` only lets go of what this process holds.
7. **Whether it outlives its process** (:attr:`~Strategy.outlives`): then a pause can leave it behind for a resume.

In the names of routines ``-`` is ``_``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final, LiteralString

from pg_freeze import backends, findings, journal
from pg_freeze.control import Connect, ConnectTo, Control, control
from pg_freeze.errors import InvalidRequest
from pg_freeze.model import Finding, Freeze, OnDrainTimeout, State
from pg_freeze.names import visible
from pg_freeze.request import FreezeRequest

if TYPE_CHECKING:
    from pg_freeze.findings import Around
    from pg_freeze.freeze.attempt import Attempt

#: Parts of a proof. The databases are read-only by default, and nobody has changed that or overrides it.
SETTINGS: Final = "settings"
#: No session is there for which the strategy waits, and no transaction is open that writes.
SESSIONS: Final = "sessions"


class Engaged:
    """What this process holds while it freezes. By default that is nothing: all is in the server."""

    def unlocked(self) -> tuple[str, ...] | None:
        """Return what this strategy should hold, and does not; None if that cannot be known."""
        return ()

    def release(self) -> None:
        """Let go of it. May be called several times."""


class Strategy(ABC):
    """A way to keep writers out. Has no state of its own: that of an attempt is in :class:`~Attempt`."""

    name: ClassVar[str]
    #: Whether a freeze goes on after the process that began it is gone.
    outlives: ClassVar[bool] = True
    #: Whether the journal is in the frozen database itself, of which there can then be only one.
    own_journal: ClassVar[bool] = False
    #: Whether it needs a session in each database. Sessions from before the freeze then stay, ours too.
    enters: ClassVar[bool] = True
    #: Which options that only some strategies know it takes: ``admit`` (``nobody``), ``roles``.
    options: ClassVar[frozenset[str]] = frozenset()
    #: Which sessions linger, as an SQL condition on the names that ``backends.py`` has for this. False: none.
    lingers: ClassVar[LiteralString] = "false"
    #: Whether a lingering session that is idle, or whose transaction began after the barrier, is ended at once.
    ends_idle: ClassVar[bool] = True
    #: Whether a session that was starting at the barrier lingers: it may have read its settings just before.
    ends_starting: ClassVar[bool] = False
    proof: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def findings(self, around: Around) -> Iterator[Finding]:
        """Yield what makes such a freeze fail or leak, beside what does so to every freeze."""

    def journal(self, connect: Connect, connect_to: ConnectTo | None, request: FreezeRequest) -> Connect:
        """Return what connects to the database that has the journal.

        :raises FreezeRefused: if that is a frozen database, and we may not enter it.
        """
        if not self.own_journal:
            return connect
        if connect_to is None:
            raise InvalidRequest(f"the strategy {self.name} works from inside the database: give connect_to")
        (name,) = request.databases
        # From outside first: what is wrong is said more clearly there than by a connection that fails.
        with control(connect, "freeze") as outside:
            findings.check(tuple(findings.not_enterable(outside, [name])))
        return partial(connect_to, name)

    def install(self, conn: Control) -> None:  # noqa: B027  few have any
        """Put routines into the journal that it needs, and that are not part of every journal."""

    def engages_within(self, request: FreezeRequest) -> timedelta:  # noqa: ARG002  one strategy waits before
        """Return how long it may take from the start of the dead-man switch to the journal's row."""
        return timedelta(minutes=1)

    def engage(self, attempt: Attempt) -> Freeze:
        """Keep writers out and write the journal's row, or adopt the freeze that this holder has already.

        What the process itself holds is left in ``attempt.engaged``.

        :raises psycopg.Error: with the SQLSTATEs that ``install.sql`` lists.
        """
        return journal.begin_freeze(attempt.conn, attempt.ticket, attempt.token, attempt.request)

    def drain(self, attempt: Attempt) -> backends.Drained:
        """Make those go who may still write, and return how that ended."""
        request = attempt.request
        return backends.drain(
            attempt.conn,
            attempt.token,
            attempt.ticket,
            self,
            request.drain_timeout,
            terminate_at_timeout=request.on_drain_timeout is OnDrainTimeout.TERMINATE,
            progress=attempt.progress,
        )

    def check_thawed(self, conn: Control, freeze: Freeze) -> None:  # noqa: B027
        """Make sure that a thaw has given back all of it.

        :raises ThawFailed: if it has not.
        """

    def thaw_copy(self, conn: Control, freeze: Freeze) -> None:  # noqa: B027
        """Give back in a copy of the server, as a superuser, what is neither a setting nor ``ALLOW_CONNECTIONS``."""

    def headline(self, freeze: Freeze) -> str:
        """Return what a freeze does to its databases, for one database."""
        return {
            State.DRAINING: "is being frozen: sessions that may still write are made to go",
            State.FROZEN: "is FROZEN",
            State.THAWING: "is writable again; sessions that are still read-only are being ended",
            State.THAWED: "is not frozen",
        }[freeze.state]

    def facts(self, freeze: Freeze) -> dict[str, str]:
        """Return what is to be known of a freeze, beside what all freezes have: names and values."""
        if not freeze.holds:
            return {}
        alive = f"alive (pid {freeze.dead_man_pid}): the server thaws by itself when the lease ends"
        unseen = "none seen by this role; unless another role has one there, only `pg-freeze guard` enforces the lease"
        return {"dead-man switch": unseen if freeze.dead_man_pid is None else alive}

    def journal_database(self, freeze: Freeze) -> str | None:
        """Return the database that has the journal, if that is not the maintenance database."""
        return freeze.databases[0] if self.own_journal else None


@dataclass(frozen=True)
class NotInstalled(Strategy):
    """A strategy that the journal names, and that is not installed here. Its freezes can be shown and thawed."""

    name: str  # type: ignore[misc]
    proof = frozenset({SESSIONS})

    def findings(self, around: Around) -> Iterator[Finding]:  # noqa: ARG002
        """Return nothing: nobody can freeze by it here."""
        return iter(())

    def facts(self, freeze: Freeze) -> dict[str, str]:
        """Return that it is not known."""
        return {"strategy": f"{visible(self.name)}, which is not installed here", **super().facts(freeze)}
