"""What a copy brings along to have more done than verified, or what is missing in it."""

from __future__ import annotations

import json
import os
import pwd
import shutil

import pytest

from devtools.pgserver import Server
from devtools.rights import create_application_database, create_roles
from pg_freeze import FreezeError, FreezeRefused
from tests.server.copies import TRUSTED, frozen_copies

DATABASE = """a"b'c%s{0} %(d)s \\ host=/nowhere ünï"""


@pytest.fixture(scope="module")
def copies(pg_version):
    with Server(pg_version, settings={"wal_level": "logical", "autovacuum": "off"}) as server:
        create_roles(server)
        create_application_database(server, DATABASE)
        # It keeps dead rows of the catalogs for whoever never comes.
        server.execute("SELECT pg_create_logical_replication_slot('never', 'pgoutput')", dbname=DATABASE)
        for statement in (
            """CREATE TABLE "t%s{0}'" AS SELECT i AS "i%s{1}", i::text AS word FROM generate_series(1, 500) i""",
            """CREATE INDEX "x%s{}'" ON "t%s{0}'" ("i%s{1}", (word || '%s{2}')) WHERE word <> '%s{}' """,
            """CREATE SEQUENCE "s%s{0}'" """,
            "CREATE TABLE gone (id int PRIMARY KEY)",
            "DROP TABLE gone",
            "CREATE TABLE kinds (point point, words tsvector, number int)",
            "INSERT INTO kinds SELECT point(i, i), to_tsvector('simple', i::text), i FROM generate_series(1, 300) i",
            "CREATE INDEX kinds_gist ON kinds USING gist (point)",
            "CREATE INDEX kinds_spgist ON kinds USING spgist (point)",
            "CREATE INDEX kinds_gin ON kinds USING gin (words)",
            "CREATE INDEX kinds_hash ON kinds USING hash (number)",
            "CREATE INDEX kinds_brin ON kinds USING brin (number)",
        ):
            server.execute(statement, dbname=DATABASE)
        with frozen_copies(server, [DATABASE]) as copies:
            yield copies


def refused(copies, copy, **options):
    with pytest.raises(FreezeRefused) as raised:
        copies.verify(copy, **options)
    return str(raised.value)


@pytest.mark.every_version
def test_odd_names_and_a_slot_that_keeps_dead_rows_are_no_damage_and_other_indexes_are_named(copies):
    copy = copies.clone()
    words = (copy / "postmaster.opts").read_text()
    found = copies.verify(copy)
    assert found.problems == ()
    assert found.thawed == (DATABASE,)
    for method in ("gist", "spgist", "gin", "hash", "brin"):
        assert [one for one in found.unseen if f"kinds_{method} " in one and f"access method is {method}" in one]
    # `pg_ctl restart` takes up what is written there.
    assert (copy / "postmaster.opts").read_text() == words
    assert not (copy / ".verify-copy").exists()


@pytest.mark.needs("isolation")
@pytest.mark.parametrize(
    "state",
    [
        {"lent_to": None, "moved": ["../planted"]},
        {"lent_to": None, "moved": ["/etc/planted"]},
        {"lent_to": None, "moved": ["base/planted"]},
        {"lent_to": None, "moved": [".."]},
        {"lent_to": None, "moved": "x"},
        {"lent_to": 0, "moved": []},
        {"lent_to": pwd.getpwnam("nobody").pw_uid, "moved": []},
        {"lent_to": True, "moved": []},
        {"lent_to": 165_536, "moved": []},
        {"lent_to": None, "moved": [], "owner": ["x", "y"]},
        [],
    ],
)
def test_a_state_that_an_earlier_run_would_not_have_left_is_refused(copies, state):
    copy = copies.clone()
    aside = copy / ".verify-copy"
    aside.mkdir(mode=0o700)
    (aside / "0").write_text("planted")
    owner = copy.stat().st_uid
    whole = {"owner": [owner, owner], "roots": ["/etc", str(copies.place)], **state} if state else state
    (aside / "state.json").write_text(json.dumps(whole))
    before = {path: path.stat().st_uid for path in (copies.place, copies.attestation)}

    assert "is not as verify-copy leaves it" in refused(copies, copy)

    assert not (copies.place / "planted").exists()
    assert {path: path.stat().st_uid for path in before} == before


@pytest.mark.needs("isolation")
def test_what_an_earlier_run_has_lent_is_given_back_in_the_copy_only(copies):
    copy = copies.clone()
    aside = copy / ".verify-copy"
    aside.mkdir(mode=0o700)
    owner, lent = copy.stat().st_uid, 1_900_000_001
    state = {"owner": [owner, owner], "lent_to": lent, "moved": [], "roots": [str(copies.place)]}
    (aside / "state.json").write_text(json.dumps(state))
    outside = copies.place / "outside"
    outside.write_text("")
    for path in (outside, copy, copy / "PG_VERSION"):
        os.chown(path, lent, lent)

    assert copies.verify(copy).problems == ()

    assert outside.stat().st_uid == lent
    assert (copy / "PG_VERSION").stat().st_uid == owner


def test_a_link_in_a_circle_is_refused(copies):
    copy = copies.clone()
    (copy / "base" / "round").symlink_to("round")
    assert "leads nowhere" in refused(copies, copy)


def test_a_version_that_is_none_or_too_old_or_not_installed_is_refused(copies):
    copy = copies.clone()
    for version, said in (
        ("99", "no postgres of version 99"),
        ("13", "14 is the oldest version"),
        ("9.6", "14 is the oldest version"),
        ("x", "PG_VERSION in it has no version"),
        ("\udcff", "PG_VERSION in it has no version"),
        ("18" + "\n" * 15, "more than 16 bytes"),
    ):
        (copy / "PG_VERSION").write_text(version, errors="surrogateescape")
        assert said in refused(copies, copy)


def test_a_version_is_not_read_from_a_link_or_a_pipe(copies):
    copy, version = copies.clone(), copies.clone() / "PG_VERSION"
    kept = version.rename(copies.place / "kept-version")
    version.symlink_to(kept)
    assert "is no PostgreSQL data directory: PG_VERSION: Too many levels" in refused(copies, version.parent)
    version.unlink()
    os.mkfifo(version)
    assert "is no PostgreSQL data directory: PG_VERSION: it is no file" in refused(copies, version.parent)
    (copy / "postmaster.pid").write_text("1\n" * 2**20)
    assert copies.verify(copy).problems == ()


@pytest.mark.needs("isolation")
def test_a_copy_that_this_user_may_not_read_is_refused(copies):
    copy = copies.clone()
    copy.chmod(0o700)
    os.seteuid(65533)
    try:
        assert "Permission denied" in refused(copies, copy, trusted=True)
    finally:
        os.seteuid(0)


def test_a_copy_without_its_wal_does_not_start_and_is_left_as_it_was(copies):
    copy = copies.clone()
    shutil.rmtree(copy / "pg_wal")
    (copy / "pg_wal" / "archive_status").mkdir(parents=True)
    for path in (copy / "pg_wal", copy / "pg_wal" / "archive_status"):
        os.chown(path, copy.stat().st_uid, copy.stat().st_gid)
    before = sorted(path.name for path in copy.iterdir())
    with pytest.raises(FreezeError, match=r"(?s)does not start.*checkpoint record"):
        copies.verify(copy)
    assert sorted(path.name for path in copy.iterdir()) == before


@pytest.mark.needs("isolation")
def test_an_amcheck_of_the_copy_s_own_is_not_believed_and_is_there_afterwards(copies):
    assert not TRUSTED
    own = Server(copies.server.version, data=copies.clone())
    with own:
        if not own.execute("SELECT 1 FROM pg_available_extensions WHERE name = 'amcheck'"):
            pytest.fail("amcheck is not installed")
        with own.control(DATABASE) as session:
            for statement in (
                "SET default_transaction_read_only = off",
                "CREATE EXTENSION amcheck",
                """CREATE OR REPLACE FUNCTION bt_index_check(index regclass, heapallindexed boolean) RETURNS void
                   LANGUAGE plpgsql AS $$ BEGIN RAISE 'of the copy'; END $$""",
            ):
                session.execute(statement)
        own.stop("immediate")
    found = copies.verify(own.data, attestation=None)
    assert not [one for one in (*found.problems, *found.unseen) if "of the copy'" in one or "amcheck" in one]
    with Server(copies.server.version, data=own.data) as again:
        assert again.execute("SELECT extname::text FROM pg_extension WHERE extname = 'amcheck'", dbname=DATABASE)
