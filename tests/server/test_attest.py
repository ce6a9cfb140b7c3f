"""An attestation says what state a snapshot was taken in; each way to break a freeze really breaks it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from devtools.asking import frozen as under_locks
from devtools.asking import pause, preflight
from devtools.pgserver import Server
from pg_freeze import Connect, FreezeError, LeaseLost, attest, resume
from pg_freeze.attestation import Attestation
from pg_freeze.wal_records import RECORDS, Means, databases_in, meaning

pytestmark = pytest.mark.every_version


@pytest.fixture
def table(app_connect: Callable[..., psycopg.Connection[Any]], app_database: str) -> str:
    with app_connect(app_database) as conn:
        conn.execute("CREATE TABLE things (id serial PRIMARY KEY, name text)")
        conn.execute("INSERT INTO things (name) SELECT 'thing ' || i FROM generate_series(1, 100) i")
    return "things"


@pytest.fixture
def walinspect(server: Server) -> Iterator[None]:
    server.execute("CREATE EXTENSION IF NOT EXISTS pg_walinspect")
    server.execute("GRANT EXECUTE ON FUNCTION pg_get_wal_records_info(pg_lsn, pg_lsn) TO freezer")
    server.execute("GRANT pg_read_all_data TO freezer")
    # A test may make checkpoints, which recycle what is to be read.
    server.execute("ALTER SYSTEM SET wal_keep_size = '1GB'")
    server.execute("SELECT pg_reload_conf()")
    yield
    server.execute("ALTER SYSTEM RESET wal_keep_size")
    server.execute("SELECT pg_reload_conf()")
    server.execute("REVOKE pg_read_all_data FROM freezer")
    server.execute("DROP EXTENSION pg_walinspect")


@pytest.fixture
def looking(server: Server) -> Any:
    """Return what looks before a snapshot and after it, as the command line does."""

    class Looking:
        def into(self, name: str) -> psycopg.Connection[Any]:
            return server.connect_factory(dbname=name)()

        def frozen(self, connect: Connect, database: str, **options: Any) -> None:
            pause(connect, databases=[database], holder="attested", **options)
            attest.before(connect, databases=[database], holder="attested", connect_to=self.into)

        def after(self, connect: Connect, database: str) -> Attestation:
            return attest.after(connect, databases=[database], holder="attested", connect_to=self.into)

    return Looking()


@pytest.mark.pg("!=16,!=17")
@pytest.mark.pg(">=15")
def test_preflight_says_beforehand_which_proof_can_be_had_and_how_to_have_a_better_one(
    request, server, connect, app_database
):
    def proof() -> dict[str, Any]:
        found: dict[str, Any] = preflight(connect, databases=[app_database], holder="attested").as_dict()["proof"]
        return found

    assert proof()["method"] == "transaction-ids"
    assert (
        "as a superuser in database 'postgres': CREATE EXTENSION pg_walinspect SCHEMA pg_catalog;" in proof()["advice"]
    )
    server.execute("CREATE EXTENSION pg_walinspect SCHEMA pg_catalog")
    request.addfinalizer(lambda: server.execute("DROP EXTENSION pg_walinspect"))
    assert proof()["advice"].endswith("GRANT EXECUTE ON FUNCTION pg_get_wal_records_info TO freezer;")
    server.execute("GRANT EXECUTE ON FUNCTION pg_get_wal_records_info(pg_lsn, pg_lsn) TO freezer")
    assert proof() == {"method": "wal", "advice": None}


def frozen(connect: Connect, database: str, **options: Any) -> None:
    pause(connect, databases=[database], holder="attested", **options)
    attest.before(connect, databases=[database], holder="attested")


def after(connect: Connect, database: str) -> Attestation:
    return attest.after(connect, databases=[database], holder="attested")


def codes(attestation: Attestation) -> set[str]:
    return {violation.code for violation in attestation.violations}


@pytest.mark.pg(">=15,!=16,!=17")
@pytest.mark.parametrize(("admit", "level"), [("readers", "quiesced"), ("nobody", "strict")])
def test_a_database_that_stood_still_is_attested_from_the_wal(
    connect, app_connect, app_database, table, walinspect, admit, level, super_connect, looking
):
    looking.frozen(connect, app_database, admit=admit)
    # Neither readers nor vacuum nor other databases count.
    if admit == "readers":
        with app_connect(app_database) as reader:
            assert reader.execute(f"SELECT count(*) FROM {table}").fetchone() == (100,)
            reader.execute(f"VACUUM (ANALYZE) {table}")
    super_connect().execute("CREATE TABLE elsewhere AS SELECT 1 AS one")
    super_connect().execute("DROP TABLE elsewhere")

    found = looking.after(connect, app_database)

    assert (found.level, found.method, found.violations) == (level, "wal", ())
    assert found.certified


def test_without_walinspect_the_transaction_ids_say_so(connect, app_database, table):
    frozen(connect, app_database, admit="nobody")
    found = after(connect, app_database)
    assert (found.method, found.level, found.violations) == ("transaction-ids", "strict", ())
    assert [said for said in found.unseen if "nobody can connect" in said], "that the sequences were not looked at"


@pytest.mark.pg(">=15,!=16,!=17")
def test_a_client_that_says_read_write_is_found_out(connect, app_connect, app_database, table, walinspect):
    frozen(connect, app_database)
    with app_connect(app_database) as rogue:
        rogue.execute("BEGIN READ WRITE")
        rogue.execute(f"INSERT INTO {table} (name) VALUES ('rogue')")
        rogue.execute("COMMIT")
    found = after(connect, app_database)
    assert found.level == "crash-only"
    assert "row-change" in codes(found)


UNSEEN_BY_STATISTICS = {
    "a client that stays connected": ("INSERT INTO things (name) VALUES ('x')",),
    "a table made and dropped": ("CREATE TABLE brief ()", "DROP TABLE brief"),
    "a sequence that is set": ("SELECT setval('things_id_seq', 7)",),
    "an unlogged table": ("INSERT INTO unlogged VALUES (1)",),
}


def written_between(looking: Any, how: str, connect: Connect, app_connect: Any, database: str) -> Attestation:
    """Write in one of these ways, in spite of the freeze, between the two looks."""
    app_connect(database).execute("CREATE UNLOGGED TABLE unlogged (id integer)")
    looking.frozen(connect, database, admit="readers")
    rogue = app_connect(database, options="-c default_transaction_read_only=off")
    for statement in UNSEEN_BY_STATISTICS[how]:
        rogue.execute(statement)
    found: Attestation = looking.after(connect, database)
    return found


@pytest.mark.parametrize("how", UNSEEN_BY_STATISTICS)
def test_without_walinspect_nothing_is_certified_that_took_a_transaction_id(
    how, connect, app_connect, app_database, table, looking
):
    found = written_between(looking, how, connect, app_connect, app_database)

    assert (found.method, found.level) == ("none", "crash-only")
    assert "not-proved" in codes(found)
    assert found.advice is not None
    assert "pg_walinspect" in found.advice


@pytest.mark.pg(">=15,!=16,!=17")
@pytest.mark.parametrize("how", UNSEEN_BY_STATISTICS)
def test_the_wal_and_the_ids_together_find_each_of_these(
    how, connect, app_connect, app_database, table, looking, walinspect
):
    found = written_between(looking, how, connect, app_connect, app_database)

    assert (found.method, found.level) == ("wal", "crash-only")
    assert found.violations


@pytest.mark.pg(">=15,!=16,!=17")
@pytest.mark.parametrize("values", [1, 40, 100])
def test_a_sequence_that_ran_ahead_is_named_and_makes_no_row_wrong(
    values, connect, app_connect, app_database, table, looking, walinspect
):
    looking.frozen(connect, app_database, admit="readers")
    app = app_connect(app_database, options="-c default_transaction_read_only=off")
    app.execute("SELECT nextval('things_id_seq') FROM generate_series(1, %s)", [values])

    found = looking.after(connect, app_database)

    assert (found.level, found.violations) == ("quiesced", ())
    assert [said for said in found.sequences if "public.things_id_seq" in said]


@pytest.mark.pg(">=15,!=16,!=17")
@pytest.mark.parametrize(
    "moves",
    [("setval('things_id_seq', 5000)",), ("setval('things_id_seq', 1)", "setval('things_id_seq', 101)")],
)
def test_a_sequence_that_was_set_did_not_only_run_ahead(
    moves, connect, app_connect, app_database, table, looking, walinspect
):
    looking.frozen(connect, app_database, admit="readers")
    app = app_connect(app_database, options="-c default_transaction_read_only=off")
    for move in moves:
        app.execute("SELECT " + move)
    found = looking.after(connect, app_database)
    assert (found.level, codes(found)) == ("crash-only", {"sequence"})


def test_a_sequence_that_moves_without_a_transaction_id_is_named(
    connect, server, app_connect, app_database, table, looking
):
    server.execute("GRANT app TO freezer")
    app = app_connect(app_database, options="-c default_transaction_read_only=off")
    pause(connect, databases=[app_database], holder="attested", admit="readers")
    app = app_connect(app_database, options="-c default_transaction_read_only=off")
    app.execute("SELECT nextval('things_id_seq')")  # logs 32 values ahead
    attest.before(connect, databases=[app_database], holder="attested", connect_to=looking.into)
    app.execute("SELECT nextval('things_id_seq')")
    found = looking.after(connect, app_database)
    assert (found.method, found.level) == ("transaction-ids", "quiesced"), found.reasons
    assert [said for said in found.sequences if "from 101 to 102" in said]


@pytest.mark.parametrize("what", ["ALLOW_CONNECTIONS", "a default"])
def test_what_was_altered_and_altered_back_breaks_it(what, connect, server, app_database, walinspect_if_there):
    frozen(connect, app_database, admit="nobody")
    if what == "ALLOW_CONNECTIONS":
        server.execute(f'ALTER DATABASE "{app_database}" ALLOW_CONNECTIONS true')
        server.execute(f'ALTER DATABASE "{app_database}" ALLOW_CONNECTIONS false')
    else:
        server.execute(f'ALTER DATABASE "{app_database}" SET default_transaction_read_only = off')
        server.execute(f'ALTER DATABASE "{app_database}" SET default_transaction_read_only = on')
    found = after(connect, app_database)
    assert found.level == "crash-only"
    assert "setting" in codes(found)


@pytest.fixture
def walinspect_if_there(request: pytest.FixtureRequest, pg_version: int) -> None:
    if pg_version in (15, 18):
        request.getfixturevalue("walinspect")


@pytest.mark.pg(">=15,!=16,!=17")
def test_a_database_that_was_moved_to_another_tablespace_and_back_is_found_in_the_wal(
    connect, server, app_database, walinspect
):
    place = server.directory / f"moved_{app_database}"
    place.mkdir()
    if os.geteuid() == 0:
        shutil.chown(place, server.data.owner())
    server.execute(f"CREATE TABLESPACE elsewhere LOCATION '{place}'")
    try:
        frozen(connect, app_database, admit="nobody")
        server.execute(f'ALTER DATABASE "{app_database}" SET TABLESPACE elsewhere')
        server.execute(f'ALTER DATABASE "{app_database}" SET TABLESPACE pg_default')
        found = after(connect, app_database)
    finally:
        server.execute("DROP TABLESPACE elsewhere")
    assert found.level == "crash-only"
    assert "Database/CREATE_FILE_COPY" in found.reasons


@pytest.mark.pg(">=15,!=16,!=17")
def test_a_row_that_was_killed_by_pg_surgery_is_found(connect, super_connect, app_database, table, walinspect, looking):
    with super_connect(app_database) as boss:
        boss.execute("CREATE EXTENSION pg_surgery")
    looking.frozen(connect, app_database, admit="readers")
    with super_connect(app_database) as boss:
        boss.execute("SELECT heap_force_kill('things', ARRAY['(0,1)']::tid[])")
    assert "XLOG/FPI" in looking.after(connect, app_database).reasons


@pytest.mark.pg(">=15,!=16,!=17")
def test_a_level_is_recorded_even_if_the_wal_is_gone(connect, super_connect, app_database, table, walinspect, server):
    frozen(connect, app_database, admit="nobody")
    super_connect().execute("UPDATE pgfreeze.attestations SET before = jsonb_set(before, '{lsn}', '\"0/28\"')")
    found = after(connect, app_database)
    # One id of this test's own: the UPDATE.
    assert (found.method, found.level) == ("none", "crash-only")
    assert "cannot be read" in found.reasons


@pytest.mark.parametrize("writes", ["REFRESH MATERIALIZED VIEW seen", "SELECT lo_from_bytea(0, 'x')"])
def test_a_transaction_from_before_the_locks_that_is_prepared_and_committed_under_them_breaks_it(
    writes, connect, server, app_connect, app_database, table, walinspect_if_there
):
    server.execute("GRANT app TO freezer")
    app = app_connect(app_database)
    app.execute("CREATE MATERIALIZED VIEW seen AS SELECT 1 AS one")
    app.execute("BEGIN")
    app.execute(writes.encode())

    with under_locks(
        connect,
        lambda name: server.connect_factory(dbname=name)(),
        databases=[app_database],
        holder="l",
        checkpoint=server.version >= 15,
    ) as hold:
        app.execute("PREPARE TRANSACTION 'under the locks'")
        app.execute("COMMIT PREPARED 'under the locks'")

    assert hold.attestation is not None
    assert not hold.attestation.certified
    assert "open-write" in codes(hold.attestation)


def test_a_role_that_may_not_see_whether_the_server_crashed_proves_nothing(connect, server, app_database):
    pause(connect, databases=[app_database], holder="attested")
    server.execute("REVOKE pg_read_all_stats FROM freezer")
    try:
        attest.before(connect, databases=[app_database], holder="attested")
        found = after(connect, app_database)
    finally:
        server.execute("GRANT pg_read_all_stats TO freezer")
    assert (found.level, codes(found)) == ("crash-only", {"not-proved"})
    assert "GRANT pg_read_all_stats" in found.reasons


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
    assert ("thawed", "lease ended") in {(one.code, one.who) for one in found.violations}


def test_a_resume_in_between_breaks_it(connect, app_database):
    frozen(connect, app_database)
    resume(connect, databases=[app_database], holder="attested")
    assert "thawed" in codes(after(connect, app_database))


def test_a_superuser_who_lingers_breaks_it(connect, super_connect, app_database):
    super_connect(app_database)
    frozen(connect, app_database)
    found = after(connect, app_database)
    assert found.level == "crash-only"
    assert "lingering" in codes(found)


@pytest.mark.pg(">=15,!=16,!=17")
def test_a_superuser_who_writes_is_found_out(connect, super_connect, app_database, table, walinspect):
    frozen(connect, app_database)
    boss = super_connect(app_database, options="-c default_transaction_read_only=off")
    boss.execute(f"DELETE FROM {table} WHERE id = 1")
    found = after(connect, app_database)
    assert found.level == "crash-only"
    assert "Heap/DELETE" in "".join(violation.what for violation in found.violations)


@pytest.mark.pg(">=15,!=16,!=17")
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
    assert "role-override" in codes(after(connect, app_database))
    attest.before(connect, databases=[app_database], holder="attested")
    server.execute(f'ALTER DATABASE "{app_database}" RESET default_transaction_read_only')
    assert "setting" in codes(after(connect, app_database))


@pytest.mark.pg(">=15,!=16,!=17")
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


@pytest.mark.pg("==18")
def test_every_resource_manager_of_the_server_has_its_decisions(server, walinspect):
    known = {name for (name,) in server.execute("SELECT rm_name FROM pg_get_wal_resource_managers() WHERE rm_builtin")}
    assert known == set(RECORDS)


def test_what_is_not_known_counts_as_a_change_and_a_database_that_is_only_copied_from_does_not():
    assert meaning("Heap2", "OF_A_LATER_VERSION") == meaning("custom128", "UNKNOWN") == Means.CHANGE
    assert [meaning("XLOG", "FPI", fork) for fork in ("main", "vm")] == [Means.CHANGE, Means.NOTHING]
    assert list(databases_in("Database", "copy dir 1663/5 to 1663/7")) == [7]
    assert list(databases_in("Database", "dir 1663/5 1664/5")) == [5, 5]
    assert list(databases_in("Storage", "pg_tblspc/16436/PG_18_202506291/16391/16417")) == [16391]
    assert databases_in("Storage", "of a later version") is None
