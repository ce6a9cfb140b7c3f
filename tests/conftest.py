"""Fixtures on real PostgreSQL servers.

The version comes from ``--pg 16`` or from the environment variable PG; 18 otherwise. ``@pytest.mark.pg(">=16")``
deselects a test on all other versions. Each process of pytest-xdist has its own shared server. There is no
``__init__.py`` below tests/, so files may share a name.

``pg_version -> int``
    the major version under test
``server -> Server``
    shared by all tests; what you change on it, you must change back
``own_server -> Server``
    a fresh one for this test alone, started, with the same roles
``server_factory(version=…, settings={}, hba=[], data=None) -> Server``
    more servers of one's own, started, with the same roles
``app_database -> str``
    a new database on ``server``, dropped afterwards however it is left
``new_database(server=None) -> str``
    the same, as often as called, on any server
``connect -> Connect``
    what the core takes: opens an autocommit connection of ``freezer`` to ``postgres``, which the caller closes
``connect_to(server) -> Connect``
    the same for another server
``app_connect(database, user="app", server=None, **options) -> Connection``
    an autocommit connection, closed at the end of the test; options are libpq's
``super_connect(database="postgres", server=None, **options) -> Connection``
    the same for the superuser

The roles are ``freezer`` (least rights, see ``devtools.rights``), ``app_owner`` (owns the databases, no login) and
``app`` (the application: a plain login that may create tables in ``public``). All but the superuser log in over TCP,
with ``devtools.pgserver.password(user)``.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import psycopg
import pytest
from packaging.specifiers import SpecifierSet

from devtools import volumes
from devtools.binaries import VERSIONS
from devtools.pgserver import Server
from devtools.rights import create_application_database, create_roles

Connect = Callable[[], psycopg.Connection[Any]]
_numbers = itertools.count(1)


class OpenConnection(Protocol):
    """Opens connections that are closed at the end of the test."""

    def __call__(
        self, database: str = ..., user: str = ..., server: Server | None = None, **options: str | int
    ) -> psycopg.Connection[Any]: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pg",
        type=int,
        choices=VERSIONS,
        default=int(os.environ.get("PG") or 18),
        help="major version of PostgreSQL to test on (default: environment variable PG, or 18)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Airflow writes its configuration there as soon as it is imported: never into the home of whoever runs the tests.
    home = tempfile.TemporaryDirectory(prefix="pgf-airflow-", ignore_cleanup_errors=True)
    os.environ["AIRFLOW_HOME"] = home.name
    config.add_cleanup(home.cleanup)
    if os.environ.get("REQUIRE_VOLUMES") and volumes.missing():
        raise pytest.UsageError(f"REQUIRE_VOLUMES is set, but volumes cannot be tested here: {volumes.missing()}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if volumes.missing():
        terminalreporter.write_line(f"NOT TESTED, real volumes: {volumes.missing()}", yellow=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    version = str(config.getoption("--pg"))
    wanted: list[pytest.Item] = []
    unwanted: list[pytest.Item] = []
    for item in items:
        fits = all(SpecifierSet(mark.args[0]).contains(version) for mark in item.iter_markers("pg"))
        fits = fits and not (item.get_closest_marker("volumes") and volumes.missing())
        (wanted if fits else unwanted).append(item)
    if unwanted:
        config.hook.pytest_deselected(items=unwanted)
        items[:] = wanted


@pytest.fixture(scope="session")
def pg_version(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--pg"))


@pytest.fixture(scope="session")
def server(pg_version: int) -> Iterator[Server]:
    # An ANALYZE by autovacuum moves the counters that an attestation may have to go by. Tests of that start their own.
    with Server(pg_version, settings={"autovacuum_naptime": "1d"}) as server:
        create_roles(server)
        yield server


@pytest.fixture
def server_factory(pg_version: int) -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:

        def start(version: int = pg_version, **arguments: Any) -> Server:
            server = stack.enter_context(Server(version, **arguments))
            create_roles(server)
            return server

        yield start


@pytest.fixture
def own_server(server_factory: Callable[..., Server]) -> Server:
    return server_factory()


@pytest.fixture
def new_database(request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    with ExitStack() as stack:

        def create(server: Server | None = None) -> str:
            where = server or request.getfixturevalue("server")
            name = f"app_{next(_numbers)}"
            create_application_database(where, name)
            if server is None:
                stack.callback(where.drop_database, name)
            return name

        yield create


@pytest.fixture
def app_database(new_database: Callable[..., str]) -> str:
    return new_database()


@pytest.fixture
def connect(server: Server) -> Connect:
    return server.connect_factory()


@pytest.fixture
def connect_to() -> Callable[[Server], Connect]:
    return lambda server: server.connect_factory()


@pytest.fixture
def app_connect(request: pytest.FixtureRequest, new_database: Callable[..., str]) -> Iterator[OpenConnection]:
    # Depends on new_database so that connections are closed before their databases go.
    yield from _open_connections(request, user="app")


@pytest.fixture
def super_connect(request: pytest.FixtureRequest, new_database: Callable[..., str]) -> Iterator[OpenConnection]:
    yield from _open_connections(request, user="postgres")


def _open_connections(request: pytest.FixtureRequest, user: str) -> Iterator[OpenConnection]:
    default_user = user
    with ExitStack() as stack:

        def connect(
            database: str = "postgres", user: str = default_user, server: Server | None = None, **options: str | int
        ) -> psycopg.Connection[Any]:
            where = server or request.getfixturevalue("server")
            conn: psycopg.Connection[Any] = psycopg.connect(where.dsn(database, user, **options), autocommit=True)
            stack.callback(conn.close)
            return conn

        yield connect
