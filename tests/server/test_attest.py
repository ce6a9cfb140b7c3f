"""An attestation says what state a snapshot was taken in; each way to break a freeze really breaks it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from airflow_pg_freeze.core import Connect, FreezeError, LeaseLost, attest, pause, resume
from airflow_pg_freeze.core import frozen as under_locks
from airflow_pg_freeze.core.attestation import Attestation
from devtools.pgserver import Server


@pytest.fixture
def table(app_connect: Callable[..., psycopg.Connection[Any]], app_database: str) -> str:
    with app_connect(app_database) as conn:
        conn.execute("CREATE TABLE things (id serial PRIMARY KEY, name text)")
        conn.execute("INSERT INTO things (name) SELECT 'thing ' || i FROM generate_series(1, 100) i")
    return "things"


@pytest.fixture
def walinspect(server: Server, pg_version: int) -> Iterator[None]:
    server.execute("CREATE EXTENSION IF NOT EXISTS pg_walinspect")
    for signature in ("block_info(pg_lsn, pg_lsn, boolean)", "records_info(pg_lsn, pg_lsn)"):
        server.execute(f"GRANT EXECUTE ON FUNCTION pg_get_wal_{signature} TO freezer")
    yield
    server.execute("DROP EXTENSION pg_walinspect")


def frozen(connect: Connect, database: str, **options: Any) -> None:
    pause(connect, databases=[database], holder="attested", **options)
    attest.before(connect, databases=[database], holder="attested")


def after(connect: Connect, database: str) -> Attestation:
    return attest.after(connect, databases=[database], holder="attested")


def codes(attestation: Attestation) -> set[str]:
    return {violation.code for violation in attestation.violations}


@pytest.mark.pg(">=16")
@pytest.mark.parametrize(("admit", "level"), [("readers", "read-only"), ("nobody", "strict")])
def test_a_database_that_stood_still_is_attested_from_the_wal(
    connect, app_connect, app_database, table, walinspect, admit, level, super_connect
):
    frozen(connect, app_database, admit=admit)
    # Neither readers nor vacuum nor other databases count.
    if admit == "readers":
        with app_connect(app_database) as reader:
            assert reader.execute(f"SELECT count(*) FROM {table}").fetchone() == (100,)
            reader.execute(f"VACUUM (ANALYZE) {table}")
    super_connect().execute("CREATE TABLE elsewhere AS SELECT 1 AS one")
    super_connect().execute("DROP TABLE elsewhere")

    found = after(connect, app_database)

    assert (found.level, found.method, found.violations) == (level, "wal", ())
    assert found.certified


def test_without_walinspect_the_counters_say_so(connect, app_database, table):
    time.sleep(1.2)  # counters are up to a second late
    frozen(connect, app_database, admit="nobody")
    found = after(connect, app_database)
    assert (found.method, found.level) == ("counters", "strict")


@pytest.mark.pg(">=16")
def test_a_client_that_says_read_write_is_found_out(connect, app_connect, app_database, table, walinspect):
    frozen(connect, app_database)
    with app_connect(app_database) as rogue:
        rogue.execute("BEGIN READ WRITE")
        rogue.execute(f"INSERT INTO {table} (name) VALUES ('rogue')")
        rogue.execute("COMMIT")
    found = after(connect, app_database)
    assert found.level == "crash-only"
    assert codes(found) == {"row-change"}
    assert any("Sequence" in violation.what for violation in found.violations)
    assert any(violation.when and violation.when.startswith("20") for violation in found.violations)


def test_the_counters_find_a_client_that_says_read_write(connect, app_connect, super_connect, app_database, table):
    counter = "SELECT tup_inserted FROM pg_stat_database WHERE datname = %s"
    time.sleep(1.2)
    frozen(connect, app_database)
    looking = super_connect()
    (inserted,) = looking.execute(counter, [app_database]).fetchone()
    rogue = app_connect(app_database)
    rogue.execute("SET default_transaction_read_only = off")
    rogue.execute(f"INSERT INTO {table} (name) VALUES ('rogue')")
    rogue.close()
    # A closed session reports what it did soon, but not at once: before 15 through a process of its own.
    deadline = time.monotonic() + 10
    while looking.execute(counter, [app_database]).fetchone() == (inserted,) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert codes(after(connect, app_database)) == {"row-change"}


def test_an_open_writing_transaction_is_named_with_its_session(connect, app_connect, app_database, table):
    pause(connect, databases=[app_database], holder="attested")
    rogue = app_connect(app_database, application_name="rogue app")
    rogue.execute("BEGIN READ WRITE")
    rogue.execute(f"DELETE FROM {table}")
    attest.before(connect, databases=[app_database], holder="attested")
    found = after(connect, app_database)
    assert found.level == "crash-only"
    assert any("rogue app" in (v.who or "") for v in found.violations if v.code == "open-write")


def test_a_prepared_transaction_that_commits_breaks_it(connect, app_connect, app_database, table, super_connect):
    with app_connect(app_database) as app:
        app.execute("BEGIN")
        app.execute(f"INSERT INTO {table} (name) VALUES ('two-phase')")
        app.execute("PREPARE TRANSACTION 'attested two-phase'")
    frozen(connect, app_database)
    with super_connect(app_database) as admin:
        admin.execute("COMMIT PREPARED 'attested two-phase'")
    found = after(connect, app_database)
    assert found.level == "crash-only"
    assert any("attested two-phase" in (v.who or "") for v in found.violations if v.code == "prepared")


def test_a_lapsed_lease_breaks_it(connect, app_database):
    frozen(connect, app_database, lease=timedelta(seconds=1), drain_timeout=timedelta(milliseconds=500))
    time.sleep(2)
    found = after(connect, app_database)
    assert found.level == "crash-only"
    assert codes(found) == {"thawed"}
    assert [v.who for v in found.violations] == ["lease ended"]


def test_a_resume_in_between_breaks_it(connect, app_database):
    frozen(connect, app_database)
    resume(connect, databases=[app_database], holder="attested")
    assert codes(after(connect, app_database)) == {"thawed"}


def test_a_superuser_who_lingers_breaks_it(connect, super_connect, app_database):
    super_connect(app_database)
    frozen(connect, app_database)
    found = after(connect, app_database)
    assert found.level == "crash-only"
    assert "lingering" in codes(found)


@pytest.mark.pg(">=16")
def test_a_superuser_who_writes_is_found_out(connect, super_connect, app_database, table, walinspect):
    frozen(connect, app_database)
    boss = super_connect(app_database, options="-c default_transaction_read_only=off")
    boss.execute(f"DELETE FROM {table} WHERE id = 1")
    found = after(connect, app_database)
    assert found.level == "crash-only"
    assert "Heap/DELETE" in "".join(violation.what for violation in found.violations)


@pytest.mark.pg(">=16")
def test_what_was_written_before_the_locks_and_commits_under_them_breaks_it(
    connect, server, app_connect, app_database, table, walinspect
):
    server.execute("GRANT app TO freezer")
    app = app_connect(app_database)
    app.execute("BEGIN")
    app.execute("CREATE TABLE made_before_the_locks ()")

    with under_locks(
        connect, lambda name: server.connect_factory(dbname=name)(), databases=[app_database], holder="l"
    ) as hold:
        app.execute("COMMIT")

    assert hold.attestation is not None
    assert not hold.attestation.certified
    assert "open-write" in codes(hold.attestation)


def test_a_setting_changed_by_hand_breaks_it(connect, server, app_database):
    frozen(connect, app_database)
    server.execute(f'ALTER ROLE app IN DATABASE "{app_database}" SET default_transaction_read_only = off')
    assert codes(after(connect, app_database)) == {"role-override"}
    attest.before(connect, databases=[app_database], holder="attested")
    server.execute(f'ALTER DATABASE "{app_database}" RESET default_transaction_read_only')
    assert "setting" in codes(after(connect, app_database))


@pytest.mark.pg(">=16")
def test_an_apply_worker_that_writes_is_found_out(connect, app_connect, server, new_database, app_database, walinspect):
    source = new_database()
    for name in (source, app_database):
        server.execute("CREATE TABLE replicated (id integer PRIMARY KEY)", dbname=name)
    server.execute("CREATE PUBLICATION everything FOR TABLE replicated", dbname=source)
    slot = f"slot_{app_database}"[:60].lower().replace("-", "_")
    server.execute(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')", dbname=source)
    server.execute(
        f"CREATE SUBSCRIPTION \"{slot}\" CONNECTION '{server.dsn(source)}' PUBLICATION everything "
        f"WITH (create_slot = false, copy_data = false, slot_name = '{slot}')",
        dbname=app_database,
    )
    try:
        frozen(connect, app_database, admit="readers")
        server.execute("INSERT INTO replicated VALUES (1)", dbname=source)
        deadline = time.monotonic() + 30
        while not server.execute("SELECT 1 FROM replicated", dbname=app_database):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        found = after(connect, app_database)
        assert found.level == "crash-only"
        assert "row-change" in codes(found)
    finally:
        resume(connect, databases=[app_database], holder="attested")
        server.execute(f'ALTER SUBSCRIPTION "{slot}" DISABLE', dbname=app_database)
        server.execute(f'ALTER SUBSCRIPTION "{slot}" SET (slot_name = NONE)', dbname=app_database)
        server.execute(f'DROP SUBSCRIPTION "{slot}"', dbname=app_database)
        while server.execute(f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{slot}' AND active"):
            time.sleep(0.1)
        server.execute(f"SELECT pg_drop_replication_slot('{slot}')", dbname=source)


def test_there_is_nothing_to_attest_without_a_freeze(connect, app_database):
    with pytest.raises(LeaseLost):
        attest.before(connect, databases=[app_database], holder="attested")
    with pytest.raises(FreezeError, match="open attestation"):
        after(connect, app_database)
