import time
from datetime import timedelta

import pytest

from devtools.asking import pause
from tests.airflow.cloud import load


@pytest.fixture
def guard(monkeypatch):
    def told_of(*connections: str):
        monkeypatch.setenv("AIRFLOW_VAR_PG_FREEZE_GUARD", ", ".join(connections))
        return load("pg_freeze_guard")

    return told_of


def test_an_overdue_freeze_is_thawed_though_another_server_is_away(
    app_database, app_connect, connect, connection, guard, new_database, run
):
    overdue, held = app_database, new_database()
    lease = {"lease": timedelta(seconds=1), "drain_timeout": timedelta(milliseconds=500), "dead_man": False}
    pause(connect, databases=[overdue], holder="gone", **lease)
    pause(connect, databases=[held], holder="here")
    time.sleep(1)
    away = connection(None, conn_id="away", port=1)
    finished = run(guard(away, connection(None)))

    assert finished.state == "failed", "nobody would hear that a server is away"
    app_connect(overdue).execute("CREATE TABLE writable ()")
    with pytest.raises(Exception, match="read-only"):
        app_connect(held).execute("CREATE TABLE writable ()")


def test_a_server_without_a_journal_is_left_as_it_is(connection, guard, own_server, run):
    assert run(guard(f"{connection(None, server=own_server)}/template1")).state == "success"


def test_a_guard_that_was_told_of_nobody_fails(guard, metadata_database, run):
    assert run(guard()).state == "failed"
