"""A second record of one freeze counts from the freeze's first look: the snapshot of the first try may be kept."""

from __future__ import annotations

from typing import Any

import pytest

from devtools.asking import pause
from pg_freeze import attest
from tests.server.names import CRASH_ONLY, QUIESCED, SCHEMA

pytestmark = pytest.mark.every_version
BY_THE_WAL = pytest.param("wal", marks=[pytest.mark.pg(">=15"), pytest.mark.pg("!=16,!=17")])
by_each_method = pytest.mark.parametrize("method", [BY_THE_WAL, "transaction-ids"])


@pytest.fixture
def which(connect, server, app_database, app_connect, method) -> Any:
    """What to attest; the WAL may be read, or not."""
    with app_connect(app_database) as conn:
        conn.execute("CREATE TABLE things (name text); CREATE UNLOGGED TABLE fleeting (name text)")
    if method == "wal":
        server.execute("CREATE EXTENSION IF NOT EXISTS pg_walinspect SCHEMA pg_catalog")
        server.execute("GRANT EXECUTE ON FUNCTION pg_get_wal_records_info(pg_lsn, pg_lsn) TO freezer")
    options: dict[str, Any] = {"databases": [app_database], "holder": "again"}
    pause(connect, **options)
    yield {**options, "connect_to": lambda name: server.connect_factory(dbname=name)()}
    server.execute("DROP EXTENSION IF EXISTS pg_walinspect")


@by_each_method
@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_what_changed_before_a_second_record_was_opened_is_found(connect, app_connect, app_database, which, closed):
    first = attest.before(connect, **which)
    if closed:
        attest.after(connect, **which)
    with app_connect(app_database) as rogue:
        rogue.execute("BEGIN READ WRITE; INSERT INTO things VALUES ('rogue'); COMMIT")
    second = attest.before(connect, **which)
    assert (second.before_at, second.wal_from) == (first.before_at, first.wal_from)

    assert attest.after(connect, **which).level == CRASH_ONLY


@by_each_method
def test_where_nothing_changed_each_of_many_records_is_good(connect, which, method):
    for number in range(3):
        attest.before(connect, **which)  # a try that was given up
        attest.before(connect, **which)
        found = attest.after(connect, **which)
        assert (number, found.level, found.method, found.violations) == (number, QUIESCED, method, ())


@pytest.mark.parametrize("method", ["transaction-ids"])
def test_a_transaction_of_another_is_never_taken_for_one_of_our_records(connect, server, which, method):
    attest.before(connect, **which)
    attest.before(connect, **which)
    server.execute(f"UPDATE {SCHEMA}.attestations SET advice = NULL")  # both have an id of another's now, and only that
    assert attest.after(connect, **which).level == CRASH_ONLY
