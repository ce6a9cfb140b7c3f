"""What the operators have in common that freeze, do something and thaw in one task."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from airflow.providers.common.compat.sdk import Context

from airflow_pg_freeze.constants import FREEZE, check_constants
from airflow_pg_freeze.hooks.pg_freeze import PgFreezeHook, refused_fails_at_once
from airflow_pg_freeze.indexes import refuse_same_database_in_group
from airflow_pg_freeze.operators.pause import Terminated, reporter, requested
from pg_freeze import Admit, FreezeError, Hold, frozen, resume
from pg_freeze.attestation import Attestation, Level, check_writable, required
from pg_freeze.freeze.thaw import undo

T = TypeVar("T")

#: The XCom under which the attestation is found.
ATTESTATION: Final = "attestation"
#: The keywords of such an operator that are templated.
FIELDS: Final = ("postgres_conn_id", "maintenance_database", "attestation_file", *FREEZE)


class Wish(Protocol):
    """What such an operator says, beside what it asks of the freeze."""

    postgres_conn_id: str
    maintenance_database: str
    strategy: str
    admit: Admit | str
    require: Level | str | None
    attestation_file: str | None

    @property
    def log(self) -> Any:
        """The task's log."""


class _Phase(StrEnum):
    WAITING = "waiting"
    WORKING = "working"
    TERMINATED = "terminated"
    DONE = "done"


class OneTask:
    """The freeze of one task, which a signal ends first and then the task."""

    def __init__(self, wish: Wish) -> None:
        self._phase = _Phase.WAITING
        check_constants(wish)
        refuse_same_database_in_group(wish)

    def run(self, wish: Wish, context: Context, work: Callable[[Hold], T]) -> tuple[T, Attestation]:
        """Freeze, *work*, thaw; return what it returned, and what state the databases were in meanwhile.

        The attestation is an XCom as well, even if the freeze did not last.

        :raises AirflowFailException: if preflight refuses, or another holder has a database.
        :raises LeaseLost: if the freeze did not last as long as the work.
        """
        if self._phase is not _Phase.TERMINATED:
            self._phase = _Phase.WORKING
        self._stop_if_terminated()
        ti: Any = context["ti"]
        with refused_fails_at_once():
            _required(wish)
            file = Path(wish.attestation_file) if wish.attestation_file else None
            check_writable(file)
            hook = PgFreezeHook(wish.postgres_conn_id, maintenance_database=wish.maintenance_database)
            request = requested(wish, hook, context)
            hold: Hold | None = None
            try:
                with frozen(hook.connect, hook.connect_to, request, progress=reporter(wish.log)) as hold:
                    _report_frozen(wish.log, hold)
                    done = work(hold)
            except BaseException as error:
                # A signal or a timeout may have come where no block had begun yet, or was over. What a newer try of the
                # same holder has adopted meanwhile is not this one's to thaw.
                if hold is not None and not isinstance(error, Exception):
                    undo(hold.connect, hold.freeze.ticket, hold.freeze.databases, error)
                elif not isinstance(error, Exception):
                    resume(hook.connect, databases=request.databases, holder=request.holder, connect_to=hook.connect_to)
                raise
            finally:
                if hold is not None and hold.attestation is not None:
                    ti.xcom_push(key=ATTESTATION, value=hold.attestation.as_dict())
        assert hold is not None
        assert hold.attestation is not None
        _report_thawed(wish.log, hold.attestation)
        if file is not None:
            hold.attestation.write(file)
        return done, hold.attestation

    def demand(self, wish: Wish, found: Attestation) -> None:
        """Fail below the required level; what was made stays. The task is at its end.

        :raises FreezeError: which a retry may cure, since it freezes anew.
        """
        self._phase = _Phase.DONE
        level = _required(wish)
        if level is not None and not found.reaches(level):
            raise FreezeError(f"what was made while frozen is {found.level}, and {level} is required: {found.reasons}")

    def kill(self) -> None:
        """Do what ``on_kill`` must: end the task with an exception, since Airflow lets execute() go on otherwise.

        :raises Terminated: while the task is at work; once, for a second signal must not interrupt the thaw.
        """
        if self._phase is _Phase.WAITING:
            self._phase = _Phase.TERMINATED
        elif self._phase is _Phase.WORKING:
            self._phase = _Phase.TERMINATED
            self._stop_if_terminated()

    def _stop_if_terminated(self) -> None:
        if self._phase is _Phase.TERMINATED:
            raise Terminated("the task was told to end (SIGTERM); nothing stays frozen")


def _required(wish: Wish) -> Level | None:
    return required(wish.require, wish.strategy, wish.admit)


def _report_frozen(log: Any, hold: Hold) -> None:
    freeze = hold.freeze
    log.info(
        "Frozen by the strategy %s: %s for %r (token %s); thaws by itself at %s",
        freeze.strategy,
        ", ".join(map(repr, freeze.databases)),
        freeze.holder,
        freeze.token,
        freeze.lease_until.isoformat(),
    )
    for warning in freeze.warnings:
        log.warning("%s → %s", warning["message"], warning["remedy"])


def _report_thawed(log: Any, found: Attestation) -> None:
    log.info("Thawed. Attestation %d: %s, by %s", found.id, found.level, found.method)
    for one in found.violations:
        log.warning("%s", one)
