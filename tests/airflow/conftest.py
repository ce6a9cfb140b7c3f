"""Fixtures for tests with a real Airflow: its metadata database is a SQLite file in a temporary AIRFLOW_HOME.

``connect -> Connect``
    what the core takes, for the same role
``connection(database, conn_id="pg", user=None, server=None, **extra) -> str``
    an Airflow connection, in the environment; returns its id. Its role is ``freezer`` unless given, and before
    PostgreSQL 15 a superuser, since most DAGs CHECKPOINT
``can_write() -> bool``
    a session of the application tries to insert into the table ``things`` of ``app_database``; whether it could
``new_dag() -> DAG``
    a DAG named after the test; fill it with ``with new_dag() as dag:``
``run(dag, **conf) -> Run``
    ``dag.test()``: every task through the task runner, deferred ones through their triggers; what became of them
``moto_port -> int``
    an AWS endpoint in a process of its own, shared by all tests
``proxy -> Proxy``
    one that can fail, before it; the Airflow connection ``aws_default`` leads there
``ec2``, ``volumes -> list[str]``, ``instance -> str``
    a client through the proxy; two volumes, and an instance with three, that no other test has
``task_process -> TaskProcess``
    a process that runs tasks, to send signals to; shared, like the server
"""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from devtools import aws
from devtools.pgserver import Server, password
from devtools.rights import checkpointer

# pytest may import this file before AIRFLOW_HOME is set, so Airflow itself is imported by the fixtures only.
if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import DAG

    from tests.airflow.running import Run, TaskProcess

os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
os.environ["AIRFLOW__CORE__DAGS_FOLDER"] = os.devnull


@pytest.fixture(scope="session")
def metadata_database() -> None:
    from tests.airflow.running import migrate

    migrate()


@pytest.fixture
def connect(server: Server) -> Callable[[], psycopg.Connection[Any]]:
    return server.connect_factory(checkpointer(server.version))


@pytest.fixture
def connection(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def define(
        database: str | None, conn_id: str = "pg", user: str | None = None, server: Server | None = None, **extra: Any
    ) -> str:
        where = server or request.getfixturevalue("server")
        user = user or checkpointer(where.version)
        monkeypatch.setenv(
            f"AIRFLOW_CONN_{conn_id.upper()}",
            json.dumps(
                {
                    "conn_type": "postgres",
                    "host": "127.0.0.1",
                    "port": where.port,
                    "login": user,
                    "password": password(user),
                    "schema": database,
                    "extra": extra,
                }
            ),
        )
        return conn_id

    return define


@pytest.fixture
def can_write(server: Server, app_database: str) -> Callable[[], bool]:
    dsn = server.dsn(app_database, "app")

    def can_write() -> bool:
        with psycopg.connect(dsn, autocommit=True, options="-c lock_timeout=300ms") as client:
            try:
                client.execute("INSERT INTO things VALUES ('written')")
            except (
                psycopg.errors.LockNotAvailable,
                psycopg.errors.ReadOnlySqlTransaction,
                psycopg.errors.InsufficientPrivilege,
            ):
                return False
        return True

    return can_write


@pytest.fixture
def new_dag(request: pytest.FixtureRequest) -> "Callable[..., DAG]":
    from airflow.providers.common.compat.sdk import DAG

    def create(**arguments: Any) -> DAG:
        return DAG(re.sub(r"\W+", "_", request.node.name)[:200], schedule=None, **arguments)

    return create


@pytest.fixture
def run(metadata_database: None) -> "Iterator[Callable[..., Run]]":
    from tests.airflow.running import run_dag

    # The task runner installs a handler of its own in this process, and leaves it there.
    before = signal.getsignal(signal.SIGTERM)
    yield run_dag
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def moto_port() -> Iterator[int]:
    with aws.moto() as port:
        yield port


@pytest.fixture
def proxy(moto_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[aws.Proxy]:
    with aws.proxy(moto_port) as proxy:
        monkeypatch.setenv("AIRFLOW_CONN_AWS_DEFAULT", proxy.connection())
        yield proxy


@pytest.fixture
def ec2(proxy: aws.Proxy) -> Any:
    return aws.client("ec2", proxy.port)


@pytest.fixture
def volumes(moto_port: int) -> list[str]:
    from tests.airflow.cloud import make_volumes

    return make_volumes(moto_port, 2)


@pytest.fixture
def instance(moto_port: int) -> str:
    from tests.airflow.cloud import make_instance

    return make_instance(moto_port)


@pytest.fixture(scope="session")
def task_process(metadata_database: None) -> "Iterator[TaskProcess]":
    from tests.airflow.running import TaskProcess

    with TaskProcess() as process:
        yield process
