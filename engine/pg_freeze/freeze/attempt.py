"""One attempt to freeze: applies the steps that the state machine decides on, by the strategy that was asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, NoReturn
from uuid import UUID, uuid4

import psycopg

from pg_freeze import dead_man as switch
from pg_freeze import findings, journal, trust
from pg_freeze.backends import Drained
from pg_freeze.control import Connect, ConnectTo, Control, reworded, unhurried
from pg_freeze.errors import (
    HELD,
    LOCKS_LOST,
    NO_DEAD_MAN,
    NO_SUCH_DATABASE,
    NOT_REVOCABLE,
    THAWED,
    TICKET_VOID,
    DrainTimeout,
    FreezeError,
    FreezeRefused,
    LeaseLost,
    Overtaken,
)
from pg_freeze.freeze.checkpoint import lost, write_out
from pg_freeze.freeze.steps import Seen, Step, next_step
from pg_freeze.freeze.thaw import undo
from pg_freeze.journal.install import ensure
from pg_freeze.model import Freeze, Progress, iso
from pg_freeze.preflight_checks import Preflight, adoptable, examine
from pg_freeze.request import FreezeRequest
from pg_freeze.strategies import named
from pg_freeze.strategies.base import Engaged, Strategy

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Attempt:
    """One attempt, with its ticket: what it was asked, and what it has done so far.

    :ivar connect: connects to the database that has the journal.
    :ivar ticket: its number; 0 before it has one that is valid.
    :ivar token: of the freeze that it adopts, or begins.
    :ivar engaged: what this process itself holds.
    """

    strategy: Strategy
    connect: Connect
    connect_to: ConnectTo | None
    request: FreezeRequest
    progress: Callable[[Progress], None] | None
    conn: Control = field(init=False)
    found: Preflight = field(init=False)
    ticket: int = 0
    token: UUID = field(default_factory=uuid4)
    engaged: Engaged = field(default_factory=Engaged)
    drained: Drained | None = None
    checkpointed: bool = False

    @classmethod
    def of(
        cls,
        connect: Connect,
        connect_to: ConnectTo | None,
        request: FreezeRequest,
        progress: Callable[[Progress], None] | None,
    ) -> Attempt:
        """Begin one, which has done nothing yet.

        :raises FreezeRefused: if the database that has the journal cannot be entered.
        """
        strategy = named(request.strategy)
        return cls(strategy, strategy.journal(connect, connect_to, request), connect_to, request, progress)

    def freeze(self, conn: Control) -> Freeze:
        """Go on until the freeze stands; return it. Whatever it raises, :meth:`undo` is left to the caller.

        :param conn: a connection to the database that has the journal.
        """
        self.conn, request = conn, self.request
        try:
            began_at = journal.server_time(conn, request.began)
            if self.strategy.own_journal:
                _check_own_journal(conn)
            self.found = examine(conn, self.connect_to, request)
            findings.check(self.found.findings if request.strict else self.found.refusals)
            ensure(conn)
            self.strategy.install(conn)
            journal.close_orphans(conn, request.databases)
            ticket = journal.draw_ticket(conn, "pause", request.holder, request.databases, began_at)
            if not ticket.valid:
                raise LeaseLost(
                    f"{request.holder!r} was resumed, or made a newer attempt, after this one began: nothing was "
                    "frozen. Start a new attempt"
                )
            self.ticket = ticket.number
            return self._run()
        except psycopg.Error as error:
            raise reworded(error, "freeze, undone") from error

    def undo(self, why: BaseException) -> None:
        """Let go of what is held, void the ticket, and thaw its freeze if it has one. For an attempt that is to end.

        :raises ThawFailed: from *why*, if it could not be done.
        """
        self.engaged.release()
        if self.ticket:
            undo(self.connect, self.ticket, self.request.databases, why)

    def _run(self) -> Freeze:
        freeze = self._own()
        if freeze is not None:
            self.token = freeze.token
        elif (self.request.checkpoint or self.strategy.outlives) and not self.found.has("no-checkpoint"):
            # Outside the outage, so that the final checkpoint, now or later, finds little to write.
            with unhurried(self.conn):
                self.conn.execute("CHECKPOINT")
        try:
            return self._go_on(freeze)
        except Overtaken:
            if freeze is None:
                raise
            # Somebody thawed between our look and our adoption; if it was this holder's resume, the ticket is void too.
            self.token = uuid4()
            return self._go_on(None)

    def _go_on(self, freeze: Freeze | None) -> Freeze:
        if self.request.dead_man and not switch.watches(self.conn, self.token):
            self._start_switch()
        while True:
            seen = Seen(self.ticket, freeze, self.drained, self.request.checkpoint, self.checkpointed)
            step = next_step(seen)
            log.debug("%s: %s", self.request.holder, step)
            if step is Step.DONE and freeze is not None:
                if self.request.dead_man and freeze.dead_man_pid is None:  # it was ended meanwhile
                    self._start_switch()
                    freeze = journal.by_token(self.conn, self.token)
                if journal.still_holds(self.conn, self.ticket):
                    return freeze
            freeze = self._apply(step, freeze)

    def _start_switch(self) -> None:
        within = self.strategy.engages_within(self.request)
        switch.start(self.connect, self.conn, self.token, self.ticket, lease=self.request.lease, patience=within)

    def _own(self) -> Freeze | None:
        """Return the freeze to adopt, if an earlier attempt of this holder left one."""
        for freeze in journal.active(self.conn, self.request.databases):
            if freeze.holds and adoptable(freeze, self.request):
                return freeze
        return None

    def _apply(self, step: Step, freeze: Freeze | None) -> Freeze:
        """Take one step, and return the freeze as it left it."""
        request, after = self.request, None
        match step:
            case Step.BEGIN:
                try:
                    after = self.strategy.engage(self)
                except psycopg.Error as error:
                    _raise_begun(error)
                if freeze is not None and freeze.lease_until == after.lease_until:
                    kept = iso(after.lease_until)
                    log.warning("A lease is only extended, never shortened: that of %r stays %s", request.holder, kept)
            case Step.MARK_BARRIER:
                after = journal.read_barrier(self.conn, self.token)
            case Step.DRAIN:
                self.drained = self.strategy.drain(self)
                after = freeze
            case Step.RECORD if self.drained is not None:
                warnings = [finding.as_dict() for finding in self.found.warnings]
                ended = dict(self.drained.terminated)
                try:
                    after = journal.record_frozen(self.conn, self.ticket, ended, self.drained.left, warnings)
                except psycopg.Error as error:
                    _raise_begun(error)
            case Step.CHECKPOINT:
                after = write_out(self.conn, self.token, request.holder, switch_wal=request.switch_wal, required=True)
                self.checkpointed = True
            case Step.ABORT if self.drained is not None:
                raise _not_drained(self.drained, request.drain_timeout)
        if after is None:
            raise lost(request.holder)
        return after


def _check_own_journal(conn: Control) -> None:
    """Make sure that the journal inside a database is one to trust before anything of it is used."""
    if not trust.has_journal(conn):
        with suppress(psycopg.errors.InsufficientPrivilege):  # preflight says what to grant
            ensure(conn)
        trust.has_journal(conn)


_BEGIN_ERRORS: Final = {
    TICKET_VOID: (LeaseLost, "this attempt was resumed, or a newer one began, before it froze anything"),
    HELD: (FreezeRefused, "somebody else was faster; see `pg-freeze status`"),
    NO_DEAD_MAN: (FreezeError, "the dead-man switch ended before the freeze began; nothing was frozen. Try again"),
    THAWED: (Overtaken, "the freeze to adopt was thawed meanwhile"),
    LOCKS_LOST: (FreezeError, "the server ended a session that held the locks; nothing was frozen. Try again"),
    NO_SUCH_DATABASE: (FreezeRefused, "a database was dropped or renamed meanwhile; nothing was frozen"),
    NOT_REVOCABLE: (FreezeRefused, "the strategy privileges cannot freeze this; nothing was changed"),
}


def _raise_begun(error: psycopg.Error) -> NoReturn:
    """Raise our error for one of the SQLSTATEs of ``install.sql``, or the error itself."""
    if error.sqlstate not in _BEGIN_ERRORS:
        raise error
    kind, meaning = _BEGIN_ERRORS[error.sqlstate]
    raise kind(f"{meaning} ({error.diag.message_primary})") from error


def _not_drained(drained: Drained, timeout: timedelta) -> DrainTimeout:
    left = drained.left
    sessions = "; ".join(map(str, left[:10])) + ("; …" if len(left) > 10 else "")
    return DrainTimeout(
        f"{len(left)} session(s) did not go within {timeout.total_seconds():g} s: {sessions}. Everything was undone. "
        "End them, give a longer drain timeout, or on_drain_timeout=terminate",
        left,
    )
