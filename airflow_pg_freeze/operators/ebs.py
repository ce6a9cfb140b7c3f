"""Snapshots the EBS volumes under a frozen server, and writes on snapshots what was attested about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, TypeGuard

from airflow.providers.amazon.aws.hooks.ec2 import EC2Hook
from airflow.providers.amazon.aws.links.base_aws import BASE_AWS_CONSOLE_LINK, BaseAwsLink
from airflow.providers.amazon.aws.operators.base_aws import AwsBaseOperator
from airflow.providers.common.compat.sdk import Context, XComArg
from botocore.exceptions import BotoCoreError

from airflow_pg_freeze.constants import Checked, check_constants
from airflow_pg_freeze.hooks.pg_freeze import RUN, PgFreezeHook
from airflow_pg_freeze.operators._snapshot import (
    Terminated,
    hopeless_fails_at_once,
    impatient_client,
    origin,
    task_key,
)
from airflow_pg_freeze.snapshots import SnapshotRefused
from airflow_pg_freeze.snapshots import tags as tagging
from airflow_pg_freeze.snapshots.aws import reworded
from airflow_pg_freeze.snapshots.ebs import UNATTESTED, certify
from airflow_pg_freeze.snapshots.ebs_creation import Creation
from airflow_pg_freeze.snapshots.ebs_wanted import Wanted, snapshot_ids
from airflow_pg_freeze.snapshots.standing import server_time, standing_until, still_standing, wait_until
from pg_freeze import LeaseLost
from pg_freeze.durations import Duration, duration
from pg_freeze.model import iso

MAX_WAIT: Final = timedelta(minutes=1)
#: How long to wait for AWS's clock: where it tells whole seconds, one of them, and as much for clocks that differ.
_CUT_OFF: Final = timedelta(seconds=2)


class EbsSnapshotsLink(BaseAwsLink):
    """Opens the snapshots in the AWS console."""

    name = "EBS snapshots"
    key = "_ebs_snapshots"
    format_str = BASE_AWS_CONSOLE_LINK + "/ec2/home?region={region_name}#Snapshots:snapshotId={snapshot_ids}"


class EbsOperator(Checked, AwsBaseOperator[EC2Hook]):
    """Has a client for EC2 that sends each request once."""

    aws_hook_class = EC2Hook
    ui_color = "#eeaa88"
    operator_extra_links = (EbsSnapshotsLink(),)

    @property
    def _hook_parameters(self) -> dict[str, Any]:
        return {**super()._hook_parameters, "api_type": "client_type"}

    def _client(self, deadline: float | None = None) -> Any:
        try:
            return impatient_client(self.hook, deadline)
        except BotoCoreError as error:
            raise reworded(error, "connect to AWS") from error

    def _link(self, context: Context, ids: Sequence[str]) -> None:
        EbsSnapshotsLink.persist(
            context=context,
            operator=self,
            region_name=self.hook.conn_region_name,
            aws_partition=self.hook.conn_partition,
            snapshot_ids=",".join(f":{one}" for one in ids),
        )


class EbsCreateSnapshotsOperator(EbsOperator):
    """Snapshot EBS volumes of a frozen server, and return as soon as AWS has accepted it.

    The data is fixed then, and the database may be thawed: copying goes on for minutes to hours, which an
    :class:`~airflow_pg_freeze.sensors.ebs.EbsSnapshotCompletedSensor` outside the freeze can follow.

    Give either *instance_id*, whose volumes are then snapshotted at one point in time, or *volume_ids*, which are
    snapshotted one after the other: alike to one point in time for whatever stands still, and only for that.

    Fails if the freeze does not stand, before or after. A retry finds by their tags the snapshots that an earlier try
    of this task has made in the same freeze, and makes what is missing. While AWS is throttling or failing it tries
    again, never for longer than *max_wait*, nor than the freeze's lease allows.

    The tags are ``pg-freeze:token``, ``:task``, ``:holder``, ``:databases``, ``:asked-at``, ``:checkpoint-lsn``,
    ``:dag``, ``:run``, ``:level`` and ``certified``, which is ``false`` until an :class:`EbsCertifySnapshotsOperator`
    says otherwise.
    Characters that AWS does not take everywhere are written as ``=XX``.

    The XCom is a dictionary with ``snapshot_ids``, ``volumes`` (snapshot to volume), ``started_at`` (the first one's,
    ISO 8601 in UTC) and ``token``.

    :param instance_id: the instance. (templated)
    :param volume_ids: the volumes. (templated)
    :param exclude_boot_volume: leave out the instance's boot volume.
    :param exclude_volume_ids: leave out these of the instance's data volumes. (templated)
    :param tags: more tags, as a dictionary. (templated)
    :param copy_volume_tags: give each snapshot the tags of its volume as well.
    :param delete_partial: delete what was made if the set does not become complete, or the freeze did not stand.
        Otherwise it stays for the next try, and the error names it.
    :param max_wait: how long, a timedelta, seconds or text such as ``5m``, to try while AWS is throttling or failing;
        the database stands still meanwhile.
    :param postgres_conn_id: the Airflow connection to the server. (templated)
    :param database: the frozen database or databases; by default the connection's schema. (templated)
    :param maintenance_database: the database that the freeze is controlled from. (templated)
    :param holder: who owns the freeze; by default the DAG run. Within ``pg_frozen() as frozen`` it is
        ``frozen.holder``. (templated)
    :param aws_conn_id: the Airflow connection to AWS. (templated)
    :param region_name: the region, if not the connection's. (templated)
    """

    template_fields: Sequence[str] = (
        "instance_id",
        "volume_ids",
        "exclude_volume_ids",
        "tags",
        "postgres_conn_id",
        "database",
        "maintenance_database",
        "holder",
        "aws_conn_id",
        "region_name",
        "verify",
    )

    def __init__(
        self,
        *,
        instance_id: str | None = None,
        volume_ids: Sequence[str] = (),
        exclude_boot_volume: bool = False,
        exclude_volume_ids: Sequence[str] = (),
        tags: Mapping[str, str] | None = None,
        copy_volume_tags: bool = False,
        delete_partial: bool = False,
        max_wait: Duration = MAX_WAIT,
        postgres_conn_id: str = "postgres_default",
        database: str | Sequence[str] | None = None,
        maintenance_database: str = "postgres",
        holder: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.instance_id = instance_id
        self.volume_ids = volume_ids
        self.exclude_boot_volume = exclude_boot_volume
        self.exclude_volume_ids = exclude_volume_ids
        self.tags = tags
        self.copy_volume_tags = copy_volume_tags
        self.delete_partial = delete_partial
        self.max_wait = max_wait
        self.postgres_conn_id = postgres_conn_id
        self.database = database
        self.maintenance_database = maintenance_database
        self.holder = RUN if holder is None else holder
        self._working = False
        check_constants(self)

    def execute(self, context: Context) -> dict[str, Any]:
        """Snapshot, and return which snapshots there are.

        :raises AirflowFailException: if the freeze does not stand, or AWS refuses.
        :raises SnapshotFailed: if AWS could not do it in time.
        """
        with hopeless_fails_at_once():
            hook = PgFreezeHook(self.postgres_conn_id, maintenance_database=self.maintenance_database)
            freeze, deadline = standing_until(
                hook,
                databases=hook.databases(self.database),
                holder=self.holder,
                max_wait=duration("max_wait", self.max_wait),
            )
            asked_at = server_time(hook, freeze)
            tags = tagging.freeze_tags(
                freeze,
                task=task_key(context),
                level=UNATTESTED,
                origin=origin(context),
                own=self.tags or {},
                asked_at=asked_at,
            )
            creation = Creation(
                self._client(deadline),
                self._wanted(),
                tags,
                description=f"PostgreSQL {', '.join(map(repr, freeze.databases))} frozen by {freeze.holder}"[:255],
                deadline=deadline,
                copy_volume_tags=self.copy_volume_tags,
                delete_partial=self.delete_partial,
            )
            self._working = True
            try:
                made = creation.run()
                try:
                    # AWS cuts times off: a look before that second is over could not be told from an earlier one.
                    begun = max((one.begun_until or asked_at for one in made), default=asked_at)
                    wait_until(hook, freeze, begun, _CUT_OFF)
                    still_standing(hook, freeze)
                except BaseException:
                    creation.discard()
                    raise
            finally:
                self._working = False
        for snapshot in made:
            self.log.info("Accepted: %s; its data is fixed", snapshot)
        self._link(context, [snapshot.id for snapshot in made])
        return {
            "snapshot_ids": [snapshot.id for snapshot in made],
            "volumes": {snapshot.id: snapshot.volume for snapshot in made},
            "started_at": iso(min((one.started_at for one in made if one.started_at is not None), default=None)),
            "token": str(freeze.token),
        }

    def on_kill(self) -> None:
        """End with an exception, upon which what was made is deleted if so asked; Airflow would let execute() go on.

        :raises Terminated: while snapshots are being made; once, for a second signal must not interrupt the clean-up.
        """
        if self._working:
            self._working = False
            raise Terminated("the snapshot was told to end (SIGTERM)")

    def _wanted(self) -> Wanted:
        for name in ("volume_ids", "exclude_volume_ids"):
            if isinstance(getattr(self, name), str):
                raise SnapshotRefused(f"{name} is the text {getattr(self, name)!r}: give a list")
        return Wanted(
            self.instance_id or None, tuple(self.volume_ids), self.exclude_boot_volume, tuple(self.exclude_volume_ids)
        )


class EbsCertifySnapshotsOperator(EbsOperator):
    """Write on snapshots what the attestation says: the tags ``certified`` and ``pg-freeze:level``.

    Belongs after the thaw: it needs no freeze. Certified are snapshots of a database that provably stood still from
    before they were begun until after they were accepted. One that may have been begun before the first look at the
    freeze, or after the second, or whose own tags are not those of that freeze and its databases, is tagged
    ``crash-only``, and the task fails: nobody knows what it holds. The clocks of AWS and of the database server must
    agree.

    :param snapshot_ids: the snapshots, as in the XCom of :class:`EbsCreateSnapshotsOperator`. (templated)
    :param attestation: the XCom of the second attestation: a dictionary with ``certified``, ``level``, ``token``,
        ``databases``, ``before_at`` and ``after_at``. (templated)
    :param token: the token of the freeze in which the snapshots were made; another attestation's is refused.
        (templated)
    :param aws_conn_id: the Airflow connection to AWS. (templated)
    :param region_name: the region, if not the connection's. (templated)
    """

    template_fields: Sequence[str] = ("snapshot_ids", "attestation", "token", "aws_conn_id", "region_name", "verify")

    def __init__(
        self,
        *,
        snapshot_ids: Sequence[str] | str,
        attestation: Mapping[str, Any] | XComArg,
        token: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.snapshot_ids = snapshot_ids
        self.attestation = attestation
        self.token = token
        check_constants(self)

    def execute(self, context: Context) -> dict[str, Any]:
        """Tag, and return what was written.

        :raises AirflowFailException: if AWS refuses, or the attestation does not cover these snapshots.
        """
        with hopeless_fails_at_once():
            ids = snapshot_ids(self.snapshot_ids)
            found = self.attestation
            if not is_attestation(found):
                raise SnapshotRefused(f"attestation is {self.attestation!r}: give the XCom of the second attestation")
            if self.token is not None and found.get("token") != self.token:
                raise LeaseLost(
                    f"the attestation is of freeze {found.get('token')}, the snapshots are of {self.token}: "
                    "not certified"
                )
            certified, level = certify(self._client(), ids, found)
        self._link(context, ids)
        return {"snapshot_ids": ids, "certified": certified, "level": level}


def is_attestation(given: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether *given* is an attestation's XCom, and not what became of a missing one."""
    return isinstance(given, Mapping) and {"level", "certified", "token"} <= given.keys()
