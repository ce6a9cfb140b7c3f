"""Fixtures for tests of the core.

``busy_client(database, transaction=…, server=None) -> BusyClient``
    a context manager: a client of role ``app`` that is never idle
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

import psycopg
import pytest

from devtools.pgserver import Server
from tests.server.clients import BusyClient


@pytest.fixture
def busy_client(request: pytest.FixtureRequest) -> Callable[..., AbstractContextManager[BusyClient]]:
    @contextmanager
    def work(
        database: str, transaction: timedelta = timedelta(seconds=1), server: Server | None = None, **options: str
    ) -> Iterator[BusyClient]:
        where = server or request.getfixturevalue("server")
        dsn = where.dsn(database, "app", **options)
        client = BusyClient(lambda: psycopg.connect(dsn, autocommit=True), transaction)
        try:
            yield client
        finally:
            client.stop()

    return work
