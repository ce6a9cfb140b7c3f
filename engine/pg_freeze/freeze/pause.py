"""The pause: applies the steps that the state machine decides on, and undoes them if anything ends it early."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NoReturn
from uuid import UUID, uuid4

import psycopg

from pg_freeze import dead_man as switch
from pg_freeze import journal, schema
from pg_freeze.backends import Drained, drain
from pg_freeze.control import Connect, Control, control, reworded, unhurried
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
    InvalidRequest,
    LeaseLost,
    Overtaken,
)
from pg_freeze.freeze.checkpoint import lost, write_out
from pg_freeze.freeze.steps import Seen, Step, next_step
from pg_freeze.freeze.thaw import undo
from pg_freeze.model import Freeze, OnDrainTimeout, Progress, Strategy
from pg_freeze.preflight_checks import Preflight, adoptable, examine
from pg_freeze.request import FreezeRequest

log = logging.getLogger(__name__)


def pause(connect: Connect, request: FreezeRequest, *, progress: Callable[[Progress], None] | None = None) -> Freeze:
    """Freeze databases: refuse writes, make the sessions that may still write go, and report the freeze.

    Called again by the same holder it adopts the freeze that stands, extends its lease and drains on.

    :param connect: returns a new connection to the maintenance database; for the strategy ``privileges``, to the
        database to freeze.
    :param request: what to freeze, and how: see :meth:`FreezeRequest.of`.
    :param progress: called after each poll of the drain.
    :returns: the freeze, in state ``frozen``.
    :raises InvalidRequest: for a strategy that lasts as long as a block.
    :raises FreezeRefused: if preflight refuses, or another holder has a database; nothing was changed.
    :raises DrainTimeout: if sessions were left; everything was undone.
    :raises LeaseLost: if somebody resumed, a newer attempt took over, or the lease ended meanwhile.
    :raises ServerLost: if the server went away.
    :raises ThawFailed: if something failed and could not be undone: still frozen until the lease ends.
    """
    if request.strategy is Strategy.LOCK:
        raise InvalidRequest("the strategy lock lasts as long as a block: use frozen(), or pg-freeze run")
    ticket: journal.Ticket | None = None
    try:
        with control(connect, "pause") as conn:
            began_at = journal.server_time(conn, request.began)
            found = preflighted(conn, request)
            schema.install(conn)
            journal.close_orphans(conn, request.databases)
            ticket = journal.draw_ticket(conn, "pause", request.holder, request.databases, began_at)
            if not ticket.valid:
                raise LeaseLost(
                    f"{request.holder!r} was resumed, or made a newer attempt, after this one began: nothing was "
                    "frozen. Start a new attempt"
                )
            try:
                return _Attempt(connect, conn, request, found, ticket.number, progress).run()
            except psycopg.Error as error:
                raise reworded(error, "pause, undone") from error
    except BaseException as error:
        # BaseException: Airflow's task timeout is one, and so are KeyboardInterrupt and SystemExit. They may come as
        # late as while the connection is closed, hence outside of it.
        if ticket is not None and ticket.valid:
            undo(connect, ticket.number, request.databases, error)
        raise


# What preflight finds that does not matter where no setting of the database is changed: locks and revoked privileges
# need no ownership of it, and no client can override them.
_NOT_FOR = {
    Strategy.READ_ONLY: set[str](),
    Strategy.LOCK: {"not-owner", "role-override", "superuser-session", "client-override", "subscription"},
    Strategy.PRIVILEGES: {"not-owner", "role-override", "client-override", "maintenance-database"},
}


def preflighted(conn: Control, request: FreezeRequest, ignored: Collection[str] = ()) -> Preflight:
    """Return what preflight finds, if the freeze may begin.

    :param ignored: codes of findings that do not matter to this freeze, beside those that do not to its strategy.
    :raises FreezeRefused: with each finding that keeps it from beginning, and its remedy.
    """
    found = examine(conn, request)
    not_for_us = _NOT_FOR[request.strategy] | set(ignored)
    found = replace(found, findings=tuple(finding for finding in found.findings if finding.code not in not_for_us))
    reasons = found.findings if request.strict else found.refusals
    if reasons:
        listed = "; ".join(f"{finding.message} → {finding.remedy}" for finding in reasons)
        raise FreezeRefused(f"refused, nothing was changed: {listed}", reasons)
    return found


@dataclass(slots=True)
class _Attempt:
    """One attempt, with its ticket: what it was asked, and what it has done so far."""

    connect: Connect
    conn: Control
    request: FreezeRequest
    found: Preflight
    ticket: int
    progress: Callable[[Progress], None] | None
    drained: Drained | None = None
    checkpointed: bool = False

    def run(self) -> Freeze:
        """Go on until the freeze stands; return it."""
        freeze = self._own()
        token = uuid4() if freeze is None else freeze.token
        if freeze is None and not any(finding.code == "no-checkpoint" for finding in self.found.findings):
            # Outside the outage, so that the final checkpoint finds little to write.
            with unhurried(self.conn):
                self.conn.execute("CHECKPOINT")
        try:
            return self._go_on(freeze, token)
        except Overtaken:
            if freeze is None:
                raise
            # Somebody thawed between our look and our adoption; if it was this holder's resume, the ticket is void too.
            return self._go_on(None, uuid4())

    def _go_on(self, freeze: Freeze | None, token: UUID) -> Freeze:
        if self.request.dead_man and not switch.watches(self.conn, token):
            switch.start(self.connect, self.conn, token, self.ticket, lease=self.request.lease)
        while True:
            seen = Seen(self.ticket, freeze, self.drained, self.request.checkpoint, self.checkpointed)
            step = next_step(seen)
            log.debug("%s: %s", self.request.holder, step)
            if step is Step.DONE and freeze is not None:
                if self.request.dead_man and freeze.dead_man_pid is None:  # it was ended meanwhile
                    switch.start(self.connect, self.conn, token, self.ticket, lease=self.request.lease)
                    freeze = journal.by_token(self.conn, token)
                if journal.still_holds(self.conn, self.ticket):
                    return freeze
            freeze = self._apply(step, token, freeze)

    def _own(self) -> Freeze | None:
        """Return the freeze to adopt, if an earlier attempt of this holder left one."""
        wanted = self.request
        for freeze in journal.active(self.conn, wanted.databases):
            if freeze.holds and adoptable(freeze, wanted):
                return freeze
        return None

    def _apply(self, step: Step, token: UUID, freeze: Freeze | None) -> Freeze:
        """Take one step, and return the freeze as it left it."""
        request, after = self.request, None
        match step:
            case Step.BEGIN:
                after = _begin(self.conn, self.ticket, token, request)
            case Step.MARK_BARRIER:
                after = journal.read_barrier(self.conn, token)
            case Step.DRAIN:
                self.drained = drain(
                    self.conn,
                    token,
                    self.ticket,
                    request.drain_timeout,
                    terminate_at_timeout=request.on_drain_timeout is OnDrainTimeout.TERMINATE,
                    progress=self.progress,
                )
                after = freeze
            case Step.RECORD if self.drained is not None:
                warnings = [finding.as_dict() for finding in self.found.warnings]
                ended = dict(self.drained.terminated)
                try:
                    after = journal.record_frozen(self.conn, self.ticket, ended, self.drained.left, warnings)
                except psycopg.Error as error:
                    raise_begun(error)
            case Step.CHECKPOINT:
                after = write_out(self.conn, token, request.holder, switch_wal=request.switch_wal, required=True)
                self.checkpointed = True
            case Step.ABORT if self.drained is not None:
                raise _not_drained(self.drained, request.drain_timeout)
        if after is None:
            raise lost(request.holder)
        return after


_BEGIN_ERRORS = {
    TICKET_VOID: (LeaseLost, "this attempt was resumed, or a newer one began, before it froze anything"),
    HELD: (FreezeRefused, "somebody else was faster; see `pg-freeze status`"),
    NO_DEAD_MAN: (FreezeError, "the dead-man switch ended before the freeze began; nothing was frozen. Try again"),
    THAWED: (Overtaken, "the freeze to adopt was thawed meanwhile"),
    LOCKS_LOST: (FreezeError, "the server ended a session that held the locks; nothing was frozen. Try again"),
    NO_SUCH_DATABASE: (FreezeRefused, "a database was dropped or renamed meanwhile; nothing was frozen"),
    NOT_REVOCABLE: (FreezeRefused, "the strategy privileges cannot freeze this; nothing was changed"),
}


def _begin(conn: Control, ticket: int, token: UUID, request: FreezeRequest) -> Freeze:
    try:
        return journal.begin_freeze(conn, ticket, token, request)
    except psycopg.Error as error:
        raise_begun(error)


def raise_begun(error: psycopg.Error) -> NoReturn:
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
