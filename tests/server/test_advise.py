"""The advice on real servers: what it reads, and that the remedies it names lead to locks."""

import psycopg
import pytest
from psycopg import sql

from devtools.pgserver import Server
from pg_freeze import ConnectTo
from pg_freeze.advise import advise


@pytest.fixture
def connect_to_database(server: Server) -> ConnectTo:
    return lambda name: psycopg.connect(server.dsn(name, "advised"), autocommit=True)


@pytest.fixture
def advised(server, app_database, app_connect):
    """A role that may look, and nothing else yet; a database that is not open to everybody."""
    server.create_role("advised")
    server.execute("GRANT pg_read_all_stats TO advised")
    server.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(sql.Identifier(app_database)))
    server.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO app").format(sql.Identifier(app_database)))
    app_connect(app_database).execute("CREATE TABLE things (id integer)")
    yield server.connect_factory("advised")
    server.execute("DROP OWNED BY advised", app_database)
    server.execute("DROP OWNED BY advised")
    server.execute("DROP ROLE advised")


def test_each_remedy_brings_the_advice_nearer_to_locks(
    advised, connect_to_database, server, app_database, app_connect, pg_version
):
    def look():
        return advise(advised, connect_to_database, databases=[app_database])

    first = look()
    assert first.strategy == "read-only"
    assert len(first.reasons) == 1
    server.execute(first.reasons[0].partition(": ")[2].encode())

    second = look()
    assert second.strategy == "read-only"
    assert "may not lock 1 table(s)" in second.reasons[0]
    server.execute("GRANT pg_maintain TO advised" if pg_version >= 17 else "GRANT pg_write_all_data TO advised")

    application = app_connect(app_database)
    third = look()
    assert third.strategy == "lock"
    assert "all tables can be locked" in third.reasons[1]
    assert application.info.backend_pid


def test_an_unknown_application_is_no_pooler_and_a_pooler_by_its_name_is_noted(
    connect, server, app_database, app_connect
):
    server.execute("GRANT app TO freezer")

    def notes():
        found = advise(
            connect,
            lambda name: psycopg.connect(server.dsn(name, "freezer"), autocommit=True),
            databases=[app_database],
        )
        return " ".join(found.notes)

    app_connect(app_database, application_name="gitlab")
    assert "in front" not in notes()
    app_connect(app_database, application_name="PgBouncer")
    assert "pgbouncer is in front" in notes()
