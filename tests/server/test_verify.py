"""A copy is started, thawed and checked: a good one passes, each bad one says what is wrong with it."""

from __future__ import annotations

import json
import re

import pytest

from devtools.asking import frozen, pause
from devtools.rights import checkpointer, create_application_database
from pg_freeze import FreezeError, FreezeRefused, InvalidRequest, resume
from pg_freeze.verify import verify_copy
from tests.server.copies import TRUSTED, copied, frozen_copies, scratch, verify


@pytest.fixture
def database(own_server, new_database):
    name = new_database(own_server)
    own_server.execute("CREATE TABLE things AS SELECT i AS id FROM generate_series(1, 1000) i", dbname=name)
    own_server.execute("CREATE INDEX ON things (id)", dbname=name)
    return name


@pytest.mark.every_version
def test_a_copy_taken_inside_a_freeze_is_good_and_writable_again(own_server, database):
    with frozen_copies(own_server, [database]) as copies:
        copy = copies.clone()

        found = copies.verify(copy)

        assert found.problems == ()
        assert found.thawed == (database,)
        assert [str(freeze.token) for freeze in found.freezes] == [str(copies.closed.token)]
        assert [(one.id, one.level) for one in found.attestations] == [(copies.closed.id, None)]
        assert "the attestation that was given" in found.looked_at
        assert f"tables, B-trees and sequences of {database!r}" in found.looked_at
        assert "database 'postgres': it was not frozen" in found.unseen
        assert not (copy / "postmaster.pid").exists()
        assert not (copy / ".verify-copy").exists()
        assert copy.stat().st_uid == copies.taken.stat().st_uid
        again = copies.verify(copy)  # the copy was thawed: it is no frozen copy any more, and says so
        assert not again.good
        (problem,) = again.problems
        assert "was thawed before, by verify-copy" in problem


@pytest.mark.every_version
def test_a_copy_taken_under_locks_is_good(own_server, database):
    own_server.execute("GRANT app TO freezer")
    own_server.execute("ALTER TABLE things OWNER TO app_owner", dbname=database)
    options = {"databases": [database], "holder": "copier", "checkpoint": own_server.version >= 15}

    def connect_to(name):
        return own_server.connect_factory(dbname=name)()

    with scratch() as place:
        with frozen(own_server.connect_factory(), connect_to, **options) as hold:
            copy = copied(own_server.data, place / "copy")
        hold.attestation.write(place / "attestation.json")

        found = verify(copy, own_server, attestation=place / "attestation.json")

    assert found.problems == ()
    assert [freeze.token for freeze in found.freezes] == [hold.freeze.token]
    assert found.thawed == (database,)
    assert hold.attestation.sizes[str(oid(own_server, database))]["relations"]


@pytest.mark.every_version
def test_privileges_are_granted_again_in_a_copy_as_they_were(own_server, database):
    own_server.execute("GRANT INSERT, UPDATE (id) ON things TO app", dbname=database)
    own_server.execute("ALTER TABLE things OWNER TO app_owner", dbname=database)
    before = acls(own_server, database)

    def connect_to(name):
        return own_server.connect_factory("postgres", dbname=name)()

    with scratch() as place:
        options = {"databases": [database], "holder": "copier", "strategy": "privileges", "roles": ["app", "public"]}
        with frozen(own_server.connect_factory("postgres"), connect_to, **options) as hold:
            copy = copied(own_server.data, place / "copy")
        hold.attestation.write(place / "attestation.json")
        given = {"attestation": place / "attestation.json", "maintenance_database": database}

        assert "--maintenance-database" in verify(copied(copy, place / "other"), own_server).problems[0]
        found = verify(copy, own_server, **given)

        assert found.problems == ()
        again = own_server.__class__(own_server.version, data=copy)
        with again:
            assert acls(again, database) == before
            again.execute("DROP OWNED BY app", dbname=database)
            assert "app=" not in str(acls(again, database))


def acls(server, database):
    query = "SELECT relacl::text, (SELECT attacl::text FROM pg_attribute WHERE attrelid = c.oid AND attnum = 1)"
    return server.execute(f"{query} FROM pg_class c WHERE relname = 'things'", dbname=database)


def oid(server, database):
    return server.execute(f"SELECT oid FROM pg_database WHERE datname = '{database}'")[0][0]


def test_a_copy_of_a_running_database_says_that_it_was_not_frozen(own_server, database):
    connect = own_server.connect_factory()
    pause(connect, databases=[database], holder="copier")
    resume(connect, databases=[database], holder="copier")
    with scratch() as place:
        own_server.execute("CHECKPOINT")
        own_server.stop("fast")
        found = verify(copied(own_server.data, place / "copy"), own_server)
    assert not found.good
    assert any("not taken inside a freeze" in problem for problem in found.problems)


def test_what_changed_before_the_copy_shows_in_its_own_wal_or_its_level_is_unknown(own_server, database):
    def write():
        with own_server.control(database) as session:
            session.execute("BEGIN READ WRITE")
            session.execute("INSERT INTO things VALUES (0)")
            session.execute("COMMIT")

    with frozen_copies(own_server, [database], meanwhile=write) as copies:
        found = verify(copies.clone(), own_server)
        told = copies.verify(copies.clone())
    said = " ".join(found.problems)
    if (own_server.programs / "pg_waldump").exists():
        assert re.search(r"a row changed while app_\d+ was frozen: Heap/INSERT", said)
    else:
        assert "is not known: give the closed attestation" in said
    assert any("the attestation says crash-only" in problem for problem in told.problems)


@pytest.mark.pg("==18.*")
def test_without_an_attestation_from_outside_the_copy_s_own_wal_says_that_nothing_changed(own_server, database):
    with frozen_copies(own_server, [database]) as copies:
        found = verify(copies.clone(), own_server)
    assert found.problems == ()
    assert "the copy's own WAL, from the first look at the freeze on" in found.looked_at


@pytest.mark.pg("==18.*")
def test_without_any_look_a_commit_after_the_checkpoint_leaves_it_unknown_what_was_open_then(
    server_factory, new_database
):
    own_server = server_factory(settings={"max_prepared_transactions": 2})
    database = new_database(own_server)
    connect = own_server.connect_factory(checkpointer(own_server.version))
    with own_server.control(database) as session:
        session.execute("CREATE TABLE things (id int)")
        session.execute("BEGIN; INSERT INTO things VALUES (0); PREPARE TRANSACTION 'open'")
    with scratch() as place:
        pause(connect, databases=[database], holder="copier", checkpoint=True)
        before = copied(own_server.data, place / "before")
        own_server.execute("COMMIT PREPARED 'open'", dbname=database)
        after = copied(own_server.data, place / "after")
        assert verify(before, own_server).problems == ()
        found = verify(after, own_server)
    assert "give the closed attestation" in found.problems[0]
    assert any("was committed" in one and "nobody had looked before" in one for one in found.unseen)


def test_an_attestation_must_be_closed_and_of_this_copy(own_server, database, tmp_path):
    with frozen_copies(own_server, [database]) as copies:
        document = json.loads(copies.attestation.read_text())
        other, still_open = tmp_path / "other.json", tmp_path / "open.json"
        record = document["attestation"]
        other.write_text(json.dumps({"attestation": {**record, "token": "00000000-0000-0000-0000-000000000000"}}))
        still_open.write_text(json.dumps({"attestation": {**record, "level": None, "certified": False}}))

        found = copies.verify(copies.clone(), attestation=other)
        assert any("in which the copy was not taken" in problem for problem in found.problems)
        with pytest.raises(InvalidRequest, match="still open"):
            copies.verify(copies.clone(), attestation=still_open)


def test_a_database_whose_name_is_a_connection_string_is_looked_for_in_the_copy_only(own_server):
    name = f"host={own_server.socket_dir} port={own_server.port} dbname=postgres"
    create_application_database(own_server, name)
    own_server.execute("CREATE TABLE only_here AS SELECT 1 AS id", dbname=name)
    with frozen_copies(own_server, [name]) as copies:
        found = copies.verify(copies.clone())
    assert found.problems == ()
    assert f"tables, B-trees and sequences of {name!r}" in found.looked_at


def test_a_directory_that_is_in_use_or_none_at_all_is_refused(own_server, tmp_path):
    with pytest.raises(FreezeRefused, match="server runs"):
        verify(own_server.data, own_server)
    with pytest.raises(FreezeRefused, match="no PostgreSQL data directory"):
        verify_copy(tmp_path, trusted=TRUSTED)
    assert own_server.running


def test_a_copy_that_does_not_start_shows_the_end_of_its_log_and_is_left_as_it_was(own_server, database):
    with frozen_copies(own_server, [database]) as copies:
        copy = copies.clone()
        (copy / "global" / "pg_control").write_bytes(b"\0" * 8192)
        before = sorted(path.name for path in copy.iterdir())
        with pytest.raises(FreezeError, match=r"does not start.*Its log ends with: .+"):
            copies.verify(copy)
        assert sorted(path.name for path in copy.iterdir()) == before
