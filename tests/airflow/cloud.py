"""What there is in the AWS of a test, and DAGs from their files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_pg_freeze.snapshots import tags as tagging
from devtools import aws

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import DAG

DAGS = Path(__file__).parents[2] / "dags"


def load(name: str) -> "DAG":
    """Return the DAG of dags/*name*.py, read afresh."""
    try:
        from airflow.dag_processing.dagbag import DagBag
    except ImportError:  # Airflow 3.1
        from airflow.models.dagbag import DagBag  # type: ignore[no-redef]

    bag = DagBag(dag_folder=DAGS / f"{name}.py")
    assert not bag.import_errors
    dag: DAG = bag.dags[name]
    return dag


def make_volumes(moto_port: int, number: int, **tags: str) -> list[str]:
    """Return new volumes, which belong to no instance."""
    moto = aws.client("ec2", moto_port)
    specification = [{"ResourceType": "volume", "Tags": tagging.as_list(tags)}] if tags else []
    return [
        moto.create_volume(AvailabilityZone=f"{aws.REGION}a", Size=1, TagSpecifications=specification)["VolumeId"]
        for _ in range(number)
    ]


def make_instance(moto_port: int) -> str:
    """Return a new instance with a boot volume and two more."""
    moto = aws.client("ec2", moto_port)
    instance: str = moto.run_instances(ImageId="ami-12c6146b", MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]
    for device, volume in zip(("/dev/sdf", "/dev/sdg"), make_volumes(moto_port, 2), strict=True):
        moto.attach_volume(InstanceId=instance, VolumeId=volume, Device=device)
    return instance


def snapshots_of(moto_port: int, volumes: list[str]) -> list[dict[str, Any]]:
    """Return all snapshots of *volumes*."""
    found: list[dict[str, Any]] = aws.client("ec2", moto_port).describe_snapshots(
        Filters=[{"Name": "volume-id", "Values": volumes}]
    )["Snapshots"]
    return found


def volumes_of(moto_port: int, instance: str) -> list[str]:
    """Return the volumes of *instance*."""
    found = aws.client("ec2", moto_port).describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]
    return [mapping["Ebs"]["VolumeId"] for mapping in found["BlockDeviceMappings"]]
