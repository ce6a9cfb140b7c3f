"""What a copy can have lost, and how verify-copy finds it."""

from __future__ import annotations

import json
import re

import pytest

from devtools.pgserver import Server
from devtools.rights import create_application_database, create_roles
from tests.server.copies import frozen_copies

DATABASE = "app_1"
PAGE = 8192


@pytest.fixture(scope="module")
def copies(pg_version):
    with Server(pg_version, settings={"autovacuum": "off"}) as server:
        create_roles(server)
        create_application_database(server, DATABASE)
        for statement in (
            "CREATE TABLE indexed AS SELECT i AS id, md5(i::text) AS word FROM generate_series(1, 3000) i",
            "CREATE INDEX indexed_id ON indexed (id)",
            "CREATE INDEX indexed_id_too ON indexed (id DESC NULLS FIRST)",
            'CREATE INDEX indexed_word ON indexed (lower(word) COLLATE "C" text_pattern_ops) WHERE id > 10',
            "CREATE TABLE shorter AS SELECT i AS id FROM generate_series(1, 2000) i",
            "CREATE INDEX shorter_id ON shorter (id)",
            "CREATE TABLE bare AS SELECT i AS id FROM generate_series(1, 3000) i",
            "INSERT INTO bare SELECT 1 FROM generate_series(1, 200) i",
            "CREATE TABLE never_vacuumed AS SELECT i AS id FROM generate_series(1, 3000) i",
            "INSERT INTO never_vacuumed VALUES (0)",
            "CREATE TABLE analyzed AS SELECT i AS id FROM generate_series(1, 500) i",
            "ANALYZE analyzed",
            "CREATE TABLE fresh (id serial, box box, EXCLUDE USING gist (box WITH &&))",
            "CREATE UNLOGGED TABLE forgetful AS SELECT 1 AS id",
            # Rows that nobody sees any more still have entries in the indexes.
            "DELETE FROM indexed WHERE id % 7 = 0",
            "UPDATE indexed SET id = -id WHERE id % 5 = 0",
            "DELETE FROM bare WHERE id > 1000",
            "VACUUM bare",
            "INSERT INTO fresh (box) SELECT box(point(i, i), point(i, i)) FROM generate_series(1, 500) i",
        ):
            server.execute(statement, dbname=DATABASE)
        server.execute("GRANT SELECT, USAGE ON fresh_id_seq TO PUBLIC", dbname=DATABASE)
        server.execute("CHECKPOINT")
        stale = (
            server.data / server.execute("SELECT pg_relation_filepath('fresh_id_seq')", dbname=DATABASE)[0][0]
        ).read_bytes()
        server.execute("SELECT nextval('fresh_id_seq') FROM generate_series(1, 100)", dbname=DATABASE)
        with frozen_copies(server, [DATABASE]) as copies:
            copies.stale = stale
            yield copies


def path(copies, copy, relation):
    return copy / copies.server.execute(f"SELECT pg_relation_filepath('{relation}')", dbname=DATABASE)[0][0]


def zero(file, page):
    with file.open("r+b") as out:
        out.seek(page * PAGE)
        out.write(bytes(PAGE))


def problems(copies, copy, **options):
    return " ".join(copies.verify(copy, **options).problems)


@pytest.mark.every_version
def test_rows_that_were_deleted_or_moved_are_no_damage_and_what_was_not_looked_at_is_said(copies):
    found = copies.verify(copies.clone())
    assert found.problems == ()
    assert any("forgetful" in one and "unlogged" in one for one in found.unseen)
    assert any("fresh" in one and "no B-tree" in one for one in found.unseen)
    assert not [one for one in found.unseen if "own order" in one or "pg_xact" in one]
    assert any(one.startswith("the contents of the rows: they are not compared") for one in found.unseen)


@pytest.mark.every_version
def test_a_zeroed_page_of_a_table_is_found_by_the_entries_of_its_index(copies):
    copy = copies.clone()
    zero(path(copies, copy, "indexed"), 3)
    assert "entries have no row in the table" in problems(copies, copy)


@pytest.mark.every_version
def test_rows_that_an_index_does_not_have_are_found(copies):
    copy = copies.clone()
    path(copies, copy, "indexed_id").write_bytes(path(copies, copy, "shorter_id").read_bytes())
    assert "index public.indexed_id of" in problems(copies, copy)


@pytest.mark.every_version
@pytest.mark.parametrize("relation", ["indexed", "bare", "fresh_id_seq", "indexed_word"])
def test_a_relation_of_no_bytes_is_found(copies, relation):
    copy = copies.clone()
    path(copies, copy, relation).write_bytes(b"")
    assert f"public.{relation} of 'app_1' has 0 bytes, and had" in problems(copies, copy)


@pytest.mark.every_version
def test_a_table_that_lost_its_last_page_is_found_by_the_sizes_in_the_attestation(copies):
    copy = copies.clone()
    file = path(copies, copy, "bare")
    file.write_bytes(file.read_bytes()[:-PAGE])
    assert "while it was frozen" in problems(copies, copy)


def test_the_sizes_that_the_journal_of_the_copy_has_are_enough(copies):
    copy = copies.clone()
    file = path(copies, copy, "bare")
    file.write_bytes(file.read_bytes()[:-PAGE])
    assert "while it was frozen" in problems(copies, copy, attestation=None)


@pytest.mark.every_version
def test_a_zeroed_sequence_is_found(copies):
    copy = copies.clone()
    zero(path(copies, copy, "fresh_id_seq"), 0)
    assert "sequence public.fresh_id_seq" in problems(copies, copy)


@pytest.mark.every_version
def test_a_sequence_of_an_earlier_state_is_found(copies):
    copy = copies.clone()
    path(copies, copy, "fresh_id_seq").write_bytes(copies.stale)
    assert "sequence public.fresh_id_seq of 'app_1' says 5" in problems(copies, copy)


@pytest.mark.every_version
def test_a_transaction_of_which_it_is_not_known_whether_it_was_committed_is_named(copies):
    copy = copies.clone()
    query = "SELECT max(xmin::text::bigint) FROM never_vacuumed"
    xid = copies.server.execute(query, dbname=DATABASE)[0][0]
    with (copy / "pg_xact" / "0000").open("r+b") as out:
        out.seek(xid // 4)
        byte = out.read(1)[0]
        out.seek(xid // 4)
        out.write(bytes([byte & ~(3 << 2 * (xid % 4))]))
    said = f"the rows of 1 transaction(s) from before the first look ({xid} to {xid}): pg_xact does not say"
    assert [one for one in copies.verify(copy).unseen if one.startswith(said)]


def test_a_table_all_of_whose_pages_are_empty_is_found_if_it_was_analyzed(copies):
    copy = copies.clone()
    file = path(copies, copy, "analyzed")
    file.write_bytes(bytes(file.stat().st_size))
    assert "public.analyzed of 'app_1': all pages are empty, and it had rows" in problems(copies, copy)


def test_a_zeroed_page_of_a_table_without_an_index_is_found_by_its_visibility_map(copies):
    copy = copies.clone()
    zero(path(copies, copy, "bare"), 2)
    assert "public.bare of 'app_1': 1 pages are empty, which had rows" in problems(copies, copy)


def test_where_neither_index_nor_map_can_tell_an_empty_page_is_named_also_the_last_one(copies):
    copy = copies.clone()
    file = path(copies, copy, "never_vacuumed")
    zero(file, file.stat().st_size // PAGE - 1)
    found = copies.verify(copy)
    assert [one for one in found.unseen if re.match(r"\d+ of \d+ pages of public.never_vacuumed", one)]


def test_a_zeroed_page_of_an_index_is_found(copies):
    copy = copies.clone()
    zero(path(copies, copy, "indexed_id"), 2)
    assert "index public.indexed_id of" in problems(copies, copy)


@pytest.mark.pg("==18.*")
def test_a_page_of_which_a_bit_fell_over_is_found_by_its_checksum(copies):
    copy = copies.clone()
    # Vacuum passes by the pages of a large table on which everything is visible to everybody.
    file = path(copies, copy, "shorter_id")
    with file.open("r+b") as out:
        out.seek(PAGE * 2 + 4000)
        out.write(b"\x55")
    said = problems(copies, copy)
    assert "pg_checksums:" in said or "checksum" in said


def test_a_lost_file_is_found(copies):
    copy = copies.clone()
    path(copies, copy, "shorter").unlink()
    assert "shorter" in problems(copies, copy)


def test_a_level_of_crash_only_from_outside_makes_no_good_copy(copies, tmp_path):
    document = json.loads(copies.attestation.read_text())
    why = {"code": "row-change", "what": "1 of Heap/INSERT on file 7", "who": None, "when": None}
    document["attestation"] |= {"level": "crash-only", "certified": False, "violations": [why]}
    worse = tmp_path / "attestation.json"
    worse.write_text(json.dumps(document))
    assert "crash-only: 1 of Heap/INSERT on file 7" in problems(copies, copies.clone(), attestation=worse)
