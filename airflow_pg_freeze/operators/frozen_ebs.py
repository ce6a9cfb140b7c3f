"""Freezes, snapshots EBS volumes, thaws and certifies, all in one task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airflow.providers.common.compat.sdk import AirflowFailException, Context

from airflow_pg_freeze.hooks.pg_freeze import TASK
from airflow_pg_freeze.indexes import refuse_same_database_of_mapped
from airflow_pg_freeze.operators._one_task import FIELDS, OneTask
from airflow_pg_freeze.operators._snapshot import hopeless_fails_at_once
from airflow_pg_freeze.operators.ebs import EbsCreateSnapshotsOperator
from airflow_pg_freeze.snapshots import SnapshotFailed
from airflow_pg_freeze.snapshots.ebs import certify
from pg_freeze import DRAIN_TIMEOUT, LEASE, Admit, Hold, LeaseLost, OnDrainTimeout
from pg_freeze.attestation import Level
from pg_freeze.durations import Duration


class PgFrozenEbsSnapshotOperator(EbsCreateSnapshotsOperator):
    """Freeze databases, snapshot the EBS volumes under them, thaw, and write on the snapshots what was attested.

    ::

        PgFrozenEbsSnapshotOperator(task_id="snapshot", postgres_conn_id="gitlab", instance_id="i-0abc", retries=2)

    One task: no task hop lies inside the outage, which is about as long as AWS takes to accept the snapshots. Whatever
    ends the task early, a person included, thaws first. The keywords of :class:`EbsCreateSnapshotsOperator` are taken
    as well.

    The XCom is that of :class:`EbsCreateSnapshotsOperator`, with ``certified`` and ``level`` added; the attestation is
    another one, with the key ``attestation``. A retry freezes anew and makes new snapshots. Those of a try that failed
    stay, tagged ``certified=false``, unless *delete_partial* is set.

    :param strategy: ``lock`` makes writers wait and ends nobody, ``read-only`` refuses writes and ends sessions.
        (templated)
    :param lease: after this time, a timedelta or seconds, the server thaws by itself. (templated)
    :param drain_timeout: how long, a timedelta or seconds, to wait for transactions that are in the way. (templated)
    :param on_drain_timeout: what happens then: ``terminate`` ends what is left, ``abort`` undoes the freeze and fails.
        (templated)
    :param admit: for the strategy ``read-only``: who may connect meanwhile. (templated)
    :param checkpoint: write all that is in memory to the volume, before the freeze and in it. False where the role may
        not CHECKPOINT (PostgreSQL 14, RDS): the copy is as good and takes longer to recover.
    :param roles: for the strategy ``privileges``: whose privileges to write to revoke; by default everybody's.
        (templated)
    :param require: the level below which the task fails, after the snapshots are tagged: ``quiesced`` or ``strict``;
        None never fails. (templated)
    :param attestation_file: a file to write the attestation to, for ``pg-freeze verify-copy``. (templated)
    :param holder: who owns the freeze; by default the DAG run and the task. (templated)
    """

    template_fields: Sequence[str] = tuple(dict.fromkeys((*EbsCreateSnapshotsOperator.template_fields, *FIELDS)))

    def __init__(
        self,
        *,
        strategy: str = "lock",
        lease: Duration = LEASE,
        drain_timeout: Duration = DRAIN_TIMEOUT,
        on_drain_timeout: OnDrainTimeout | str = "terminate",
        admit: Admit | str = "readers-once-drained",
        checkpoint: bool = True,
        roles: Sequence[str] = (),
        require: Level | str | None = "quiesced",
        attestation_file: str | None = None,
        holder: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(holder=TASK if holder is None else holder, **kwargs)
        self.strategy = strategy
        self.lease = lease
        self.drain_timeout = drain_timeout
        self.on_drain_timeout = on_drain_timeout
        self.admit = admit
        self.checkpoint = checkpoint
        self.roles = roles
        self.require = require
        self.attestation_file = attestation_file
        self._frozen = OneTask(self)

    @classmethod
    def check_mapped(cls, operator: Any) -> None:
        """Check what a mapped task was made with, and refuse indexes that would freeze the same database."""
        super().check_mapped(operator)
        refuse_same_database_of_mapped(operator)

    def execute(self, context: Context) -> dict[str, Any]:
        """Freeze, snapshot, thaw and certify; return which snapshots there are.

        :raises AirflowFailException: if preflight or AWS refuses.
        :raises SnapshotFailed: if AWS could not do it in time.
        :raises FreezeError: if the freeze did not last, or the level is below the required one.
        """

        def snapshot(hold: Hold) -> dict[str, Any]:
            self.maintenance_database = hold.journal_database
            return super(PgFrozenEbsSnapshotOperator, self).execute(context)

        try:
            made, attestation = self._frozen.run(self, context, snapshot)
        except AirflowFailException as error:
            # A task that waits for somebody else's freeze cannot make it come back; this one freezes anew.
            if isinstance(error.__cause__, LeaseLost):
                raise error.__cause__ from error
            raise
        try:
            with hopeless_fails_at_once():
                certified, level = certify(self._client(), made["snapshot_ids"], attestation.as_dict())
        except SnapshotFailed as error:
            self.log.warning("The snapshots are made, and stay tagged certified=false: %s", error)
            raise
        self._frozen.demand(self, attestation)
        return {**made, "certified": certified, "level": level}

    def on_kill(self) -> None:
        """End with an exception, upon which the database is thawed, and what was made is deleted if so asked."""
        self._frozen.kill()
