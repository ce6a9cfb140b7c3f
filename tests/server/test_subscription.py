"""Logical replication: what is published goes on, and what is applied goes on in spite of read-only."""

import pytest

from devtools.asking import pause, preflight
from pg_freeze import Severity, resume
from tests.server.clients import alter, wait_until

pytestmark = pytest.mark.every_version


@pytest.fixture
def replicated(own_server, new_database):
    """Two databases of one server: what is written to the first arrives in the second."""
    source, target = new_database(own_server), new_database(own_server)
    for name in (source, target):
        own_server.execute("CREATE TABLE t (i int PRIMARY KEY)", name)
        own_server.execute("GRANT ALL ON t TO PUBLIC", name)
    own_server.execute("CREATE PUBLICATION p FOR TABLE t", source)
    own_server.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')", source)
    with own_server.control(target) as conn:
        # Source and target share a server, where creating the slot here would wait for this very statement.
        conn.execute(
            f"CREATE SUBSCRIPTION s CONNECTION '{own_server.dsn(source)}' PUBLICATION p "
            "WITH (create_slot = false)".encode()
        )
    own_server.execute("INSERT INTO t VALUES (1)", source)
    wait_until(lambda: rows(own_server, target) == {1}, within=30)
    yield own_server, source, target
    own_server.execute("ALTER SUBSCRIPTION s DISABLE", target)


def rows(server, database):
    return {i for (i,) in server.execute("SELECT i FROM t", database)}


def test_an_enabled_subscription_is_warned_of_since_it_writes_on_and_the_remedy_stops_it(replicated, connect_to):
    server, source, target = replicated
    connect = connect_to(server)
    (found,) = [
        one for one in preflight(connect, databases=[target], holder="test").findings if one.code == "subscription"
    ]
    assert (found.severity, "'s'" in found.message) == (Severity.WARN, True)

    frozen = pause(connect, databases=[target], holder="test")

    assert found.as_dict() in frozen.warnings
    server.execute("INSERT INTO t VALUES (2)", source)
    wait_until(lambda: rows(server, target) == {1, 2}, within=30)
    resume(connect, databases=[target], holder="test")
    server.execute(found.remedy.split(";")[0].encode(), target)
    assert "subscription" not in {one.code for one in preflight(connect, databases=[target], holder="test").findings}


def test_the_walsender_of_a_frozen_publisher_goes_on(replicated, connect_to):
    server, source, target = replicated
    connect = connect_to(server)
    before = server.execute("SELECT pid FROM pg_stat_replication")

    frozen = pause(connect, databases=[source], holder="test")

    assert frozen.lingering == ()
    assert server.execute("SELECT pid FROM pg_stat_replication") == before
    resume(connect, databases=[source], holder="test")
    server.execute("INSERT INTO t VALUES (3)", source)
    wait_until(lambda: rows(server, target) == {1, 3}, within=30)


def test_a_superusers_freeze_ends_the_apply_worker_which_comes_back_after_the_thaw(replicated):
    server, source, target = replicated
    superuser = server.connect_factory("postgres")

    pause(superuser, databases=[target], holder="test", admit="nobody")

    server.execute("INSERT INTO t VALUES (4)", source)
    resume(superuser, databases=[target], holder="test")
    wait_until(lambda: rows(server, target) == {1, 4}, within=30)
    alter(server, "ALTER DATABASE {} SET work_mem = '4MB'", target)
