"""Fixtures on real PostgreSQL servers.

The version comes from ``--pg 16`` or from the environment variable PG; 18 otherwise. With one version, every test runs
on it, but for those that ``@pytest.mark.pg(">=16")`` deselects. With several, as in ``--pg 14,15,18`` or ``--pg all``,
the newest of them runs everything, and the others the tests marked ``every_version``: what depends on the server.

``@pytest.mark.needs("volumes")`` leaves a test out where the machine lacks something. The summary names what was left
out. With the environment variable REQUIRE_VOLUMES the lack is an error.

``@pytest.mark.thorough`` is for one more case of what other tests try as well, where each case takes seconds:
``make test`` leaves it out and says so, ``make test-all`` and CI do not (``--all``).

Each process of pytest-xdist has a shared server of each version. There is no ``__init__.py`` below tests/, so files may
share a name.

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

import argparse
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pytest
from packaging.specifiers import SpecifierSet

from devtools.binaries import VERSIONS
from devtools.machine import NEEDS, memory_directory, variable
from devtools.pgserver import Server
from devtools.rights import create_application_database, create_roles
from pg_freeze import install
from tests.together import Together

Connect = Callable[[], psycopg.Connection[Any]]
#: The version of a test that fits none of those asked for.
NONE = 0
_numbers = itertools.count(1)


class OpenConnection(Protocol):
    """Opens connections that are closed at the end of the test."""

    def __call__(
        self, database: str = ..., user: str = ..., server: Server | None = None, **options: str | int
    ) -> psycopg.Connection[Any]: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pg",
        type=_versions,
        default=os.environ.get("PG") or "18",
        help="major versions of PostgreSQL to test on, as in 14,18 or all (default: environment variable PG, or 18)",
    )
    parser.addoption("--all", action="store_true", help="also what is marked as thorough")


def _versions(text: str) -> tuple[int, ...]:
    chosen = VERSIONS if text == "all" else tuple(sorted({int(word) for word in text.split(",")}))
    if unknown := set(chosen) - set(VERSIONS):
        raise argparse.ArgumentTypeError(f"{unknown} is not among {', '.join(map(str, VERSIONS))}")
    return chosen


def pytest_configure(config: pytest.Config) -> None:
    # For servers, copies and Airflow's database. Processes that we start, pytest's workers too, take it from us.
    if "TMPDIR" not in os.environ and (memory := memory_directory()):
        os.environ["TMPDIR"] = str(memory)
        tempfile.tempdir = None
    # Airflow writes its configuration there as soon as it is imported: never into the home of whoever runs the tests.
    home = tempfile.TemporaryDirectory(prefix="pgf-airflow-", ignore_cleanup_errors=True)
    os.environ["AIRFLOW_HOME"] = home.name
    config.add_cleanup(home.cleanup)
    for need, missing in NEEDS.items():
        if os.environ.get(variable(need)) and missing():
            raise pytest.UsageError(f"{variable(need)} is set, but {need} cannot be tested here: {missing()}")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together | None:
    # Where all tests are of that kind, few workers would leave the others idle.
    alone = all(Path(name).as_posix().startswith("tests/airflow") for name in config.args)
    return None if alone else Together(config, log)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pg_version" not in metafunc.fixturenames:
        return
    versions: tuple[int, ...] = metafunc.config.getoption("--pg")
    alone = len(versions) == 1
    if not metafunc.definition.get_closest_marker("every_version"):
        versions = versions[-1:]
    fit = [version for version in versions if _fits(metafunc.definition, version)]
    # An empty list would be reported as a skip.
    ids = [pytest.HIDDEN_PARAM] if alone else [f"pg{version}" for version in fit or [NONE]]
    metafunc.parametrize("pg_version", fit or [NONE], indirect=True, ids=ids, scope="session")


def _fits(item: Any, version: int) -> bool:
    return all(SpecifierSet(mark.args[0]).contains(str(version)) for mark in item.iter_markers("pg"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    newest = config.getoption("--pg")[-1]
    wanted: list[pytest.Item] = []
    unwanted: list[pytest.Item] = []
    for item in items:
        callspec = getattr(item, "callspec", None)
        version = newest if callspec is None else callspec.params.get("pg_version", newest)
        fits = version != NONE and _fits(item, version) and not _left_out(config, item)
        (wanted if fits else unwanted).append(item)
    if unwanted:
        config.hook.pytest_deselected(items=unwanted)
        items[:] = wanted
    # The longest first: what begins last should not be what everybody then waits for.
    items.sort(key=_longest, reverse=True)


def _left_out(config: pytest.Config, item: pytest.Item) -> bool:
    too_long = item.get_closest_marker("thorough") is not None and not config.getoption("--all")
    return too_long or any(NEEDS[mark.args[0]]() for mark in item.iter_markers("needs"))


def _longest(item: pytest.Item) -> float:
    limit = item.get_closest_marker("timeout")
    return 0 if limit is None else float(limit.args[0])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # At the very end, and without counting: only the workers of pytest-xdist know the items.
    for need, missing in NEEDS.items():
        if lacking := missing():
            terminalreporter.write_line(f"NOT TESTED, what needs {need}: {lacking}", yellow=True)
    if not terminalreporter.config.getoption("--all"):
        terminalreporter.write_line("NOT TESTED, what is marked as thorough: make test-all tests it, too", yellow=True)


@pytest.fixture(scope="session")
def pg_version(request: pytest.FixtureRequest) -> int:
    # A test that asks for the server while it runs is not seen to depend on its version.
    return int(getattr(request, "param", request.config.getoption("--pg")[-1]))


@pytest.fixture(scope="session")
def _servers() -> Iterator[Callable[[int], Server]]:
    with ExitStack() as stack:

        @cache
        def start(version: int) -> Server:
            # An ANALYZE by autovacuum takes transaction ids, by which an attestation may have to go.
            server = stack.enter_context(Server(version, settings={"autovacuum_naptime": "1d"}))
            create_roles(server)
            # Two roles freeze here, one of them a superuser, who does not use a journal of the other one's.
            install(server.control, grant=["freezer"])
            return server

        yield start


@pytest.fixture(scope="session")
def server(pg_version: int, _servers: Callable[[int], Server]) -> Server:
    return _servers(pg_version)


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
def new_database(request: pytest.FixtureRequest, pg_version: int) -> Iterator[Callable[..., str]]:
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
