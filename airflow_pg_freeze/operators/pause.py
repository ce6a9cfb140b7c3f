"""Freezes databases, and takes the freeze back if it is ended before it has done so."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from airflow.providers.common.compat.sdk import BaseOperator, Context

from airflow_pg_freeze.constants import Checked, check_constants, is_constant
from airflow_pg_freeze.hooks.pg_freeze import RUN, PgFreezeHook, refused_fails_at_once
from pg_freeze import DRAIN_TIMEOUT, LEASE, Admit, Freeze, FreezeRequest, OnDrainTimeout, Progress, pause
from pg_freeze.durations import Duration
from pg_freeze.freeze.pause import check_outlives
from pg_freeze.request import OPTIONS

_SAY_EVERY: Final = timedelta(seconds=1)


# Not an Exception: nobody on the way up may take it for a failure of his own. Airflow retries a task that ends with a
# BaseException, which is right for a worker that is shut down; when a person ends a task, Airflow has set its state
# before and keeps it.
class Terminated(BaseException):
    """The task was told to end (SIGTERM) while it froze the database."""


class _Phase(StrEnum):
    WAITING = "waiting"
    FREEZING = "freezing"
    TERMINATED = "terminated"
    DONE = "done"


class PgPauseOperator(Checked, BaseOperator):
    """Freeze databases: refuse writes, make the sessions that may still write go, and leave the lease to watch.

    When it succeeds no session can write in the ordinary way, and the XCom says since when. When it fails, is ended by
    a person, or times out, it has undone everything first. Run again in the same DAG run it adopts the freeze that
    stands and extends its lease, so that it is safe to retry and to clear.

    Whatever becomes of the DAG run, the server itself thaws when the lease ends.

    The XCom is a dictionary with ``token``, ``holder``, ``databases``, ``strategy``, ``state``, ``admit``,
    ``requested_at``, ``barrier_at``, ``drained_at``, ``frozen_at``, ``lease_until``, ``checkpoint_lsn``,
    ``terminated`` (how many sessions were ended, by reason), ``lingering`` (sessions that could not be ended) and
    ``warnings``. Times are ISO 8601 in UTC.

    :param postgres_conn_id: the Airflow connection to the server. (templated)
    :param database: the database, or a list of those to freeze at the same time; by default the connection's schema.
        (templated)
    :param maintenance_database: the database to control the freeze from. (templated)
    :param holder: who owns the freeze; by default the DAG run. Give the other tasks the same. (templated)
    :param lease: after this time, a timedelta or seconds, the server thaws by itself. Longer than the snapshot takes
        to begin, shorter than your users' patience. (templated)
    :param drain_timeout: how long, a timedelta or seconds, transactions that were open at the barrier may go on.
        (templated)
    :param on_drain_timeout: what happens then: ``terminate`` ends what is left, ``abort`` undoes the freeze and fails.
        (templated)
    :param strategy: ``read-only`` refuses writes and ends sessions; ``privileges`` revokes the privileges to write, in
        one database. One that ends with its process, such as ``lock``, is refused: use ``@task.pg_frozen``. (templated)
    :param admit: for the strategy ``read-only``: who may connect while the database is frozen:
        ``readers-once-drained``, ``readers`` (never refuse a connection), or ``nobody``, which alone also stops clients
        that override the read-only default. (templated)
    :param roles: for the strategy ``privileges``: whose privileges to write to revoke; by default everybody's.
        (templated)
    :param checkpoint: make the final checkpoint here, which saves a :class:`PgCheckpointOperator` and its hop.
    :param switch_wal: switch to a new WAL file after that checkpoint; implies it.
    :param strict: fail on what is only warned of otherwise, such as prepared transactions.
    :param dead_man: whether a session on the server must watch the lease. Without it somebody has to call
        ``pgfreeze.thaw_expired()``.
    """

    template_fields: Sequence[str] = (
        "postgres_conn_id",
        "database",
        "maintenance_database",
        "holder",
        "lease",
        "drain_timeout",
        "on_drain_timeout",
        "strategy",
        "admit",
        "roles",
    )
    ui_color = "#b3d9ff"

    def __init__(
        self,
        *,
        postgres_conn_id: str = "postgres_default",
        database: str | Sequence[str] | None = None,
        maintenance_database: str = "postgres",
        holder: str | None = None,
        lease: Duration = LEASE,
        drain_timeout: Duration = DRAIN_TIMEOUT,
        on_drain_timeout: OnDrainTimeout | str = "terminate",
        strategy: str = "read-only",
        admit: Admit | str = "readers-once-drained",
        roles: Sequence[str] = (),
        checkpoint: bool = False,
        switch_wal: bool = False,
        strict: bool = False,
        dead_man: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.maintenance_database = maintenance_database
        self.holder = RUN if holder is None else holder
        self.lease = lease
        self.drain_timeout = drain_timeout
        self.on_drain_timeout = on_drain_timeout
        self.strategy = strategy
        self.admit = admit
        self.roles = roles
        self.checkpoint = checkpoint
        self.switch_wal = switch_wal
        self.strict = strict
        self.dead_man = dead_man
        self._phase = _Phase.WAITING
        check_constants(self)
        if is_constant(strategy):
            check_outlives(strategy)

    def execute(self, context: Context) -> dict[str, Any]:
        """Freeze, and return the freeze as JSON-ready values.

        :raises AirflowFailException: if preflight refuses, or another holder has a database.
        """
        if self._phase is not _Phase.TERMINATED:
            self._phase = _Phase.FREEZING
        self._stop_if_terminated()
        with refused_fails_at_once():
            hook = PgFreezeHook(self.postgres_conn_id, maintenance_database=self.maintenance_database)
            request = requested(self, hook, context)
            try:
                freeze = pause(hook.connect, request, connect_to=hook.connect_to, progress=reporter(self.log))
            finally:
                self._phase = _Phase.DONE
        self._report(freeze)
        return freeze.as_dict()

    def on_kill(self) -> None:
        """End the pause with an exception, upon which the core undoes it.

        Airflow calls this in its SIGTERM handler and then lets execute() go on, so that anything but an exception would
        let the task succeed, and the snapshot begin. Before execute() it only leaves a note; afterwards the freeze
        stands, and is the resume's to end; a second signal must not interrupt the undo.

        :raises Terminated: while the database is being frozen.
        """
        if self._phase is _Phase.WAITING:
            self._phase = _Phase.TERMINATED
        elif self._phase is _Phase.FREEZING:
            self._phase = _Phase.TERMINATED
            self._stop_if_terminated()

    def _stop_if_terminated(self) -> None:
        if self._phase is _Phase.TERMINATED:
            raise Terminated("the pause was told to end (SIGTERM); nothing stays frozen")

    def _report(self, freeze: Freeze) -> None:
        drained = (
            (freeze.drained_at - freeze.barrier_at).total_seconds() if freeze.drained_at and freeze.barrier_at else 0.0
        )
        ended = ", ".join(f"{count} {reason}" for reason, count in freeze.terminated.items()) or "none"
        self.log.info(
            "Frozen: %s by %r (token %s), drained in %.3f s; sessions ended: %s; left: %d; thaws by itself at %s",
            ", ".join(map(repr, freeze.databases)),
            freeze.holder,
            freeze.token,
            drained,
            ended,
            len(freeze.lingering),
            freeze.lease_until.isoformat(),
        )
        for warning in freeze.warnings:
            self.log.warning("%s → %s", warning["message"], warning["remedy"])
        for backend in freeze.lingering:
            self.log.warning("May still write, and could not be ended: %s", backend)


def requested(operator: Any, hook: PgFreezeHook, context: Context) -> FreezeRequest:
    """Return the freeze that an operator's keywords ask for.

    :raises FreezeRefused: if they make no sense.
    """
    options = {name: getattr(operator, name) for name in OPTIONS if hasattr(operator, name)}
    # The worker's clock set start_date, so it is the one to compare with. A resume that came after the task's start,
    # while this process was being set up, voids this attempt.
    age = max(datetime.now(UTC) - context["ti"].start_date, timedelta(0))
    return FreezeRequest.of(hook.databases(operator.database), operator.holder, age=age, **options)


def reporter(log: Any) -> Callable[[Progress], None]:
    """Return what tells a task's log once a second for whom it waits."""
    said_at = time.monotonic()

    def progress(drain: Progress) -> None:
        nonlocal said_at
        if not drain.lingering or time.monotonic() - said_at < _SAY_EVERY.total_seconds():
            return
        said_at = time.monotonic()
        shown = "; ".join(map(str, drain.lingering[:5])) + ("; …" if len(drain.lingering) > 5 else "")
        log.info(
            "Draining for %.1f s, %.1f s left, %d session(s) may still write: %s",
            drain.elapsed.total_seconds(),
            drain.remaining.total_seconds(),
            len(drain.lingering),
            shown,
        )

    return progress
