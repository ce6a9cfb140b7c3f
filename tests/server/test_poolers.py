"""A connection pooler before the server: refused, in words that can be read, with nothing changed."""

import psycopg
import pytest

from devtools.pgbouncer import PgBouncer
from pg_freeze import FreezeRefused, connector, status
from tests.server.acts import ACTS

pytestmark = pytest.mark.needs("pgbouncer")


@pytest.fixture
def pooled(server):
    """Return the port of a PgBouncer in front of the server."""
    with PgBouncer(server, ["freezer"]) as pooler:
        yield pooler.port


def test_a_connection_through_a_pooler_is_refused(server, pooled, app_database):
    for act in ACTS:
        with pytest.raises(FreezeRefused, match="goes through a connection pooler"):
            act(server.connect_factory(port=pooled), app_database)


def test_what_a_pooler_says_of_our_startup_packet_is_readable_too(server, pooled, app_database):
    for act in ACTS:
        with pytest.raises(FreezeRefused, match="goes through a connection pooler"):
            act(connector(server.dsn("postgres", "freezer", port=pooled)), app_database)


def test_a_pooled_session_keeps_its_settings_when_we_are_refused(server, pooled):
    with psycopg.connect(server.dsn("postgres", "freezer", port=pooled), autocommit=True) as before:
        path = before.execute("SHOW search_path").fetchone()
    with pytest.raises(FreezeRefused):
        status(server.connect_factory(port=pooled))
    with psycopg.connect(server.dsn("postgres", "freezer", port=pooled), autocommit=True) as after:
        assert after.execute("SHOW search_path").fetchone() == path
