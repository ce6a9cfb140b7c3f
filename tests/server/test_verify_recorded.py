"""What was recorded under the freeze is believed more than what the catalogs of a copy say."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.server.copies import frozen_copies


@pytest.fixture
def database(own_server, new_database):
    name = new_database(own_server)
    for statement in (
        "CREATE TABLE things AS SELECT i AS id FROM generate_series(1, 100) i",
        "CREATE SEQUENCE small",
        "SELECT nextval('small')",
        "CREATE SEQUENCE unused",
        "CREATE SEQUENCE large",
        "SELECT setval('large', 1000000)",
        "GRANT SELECT, USAGE ON ALL SEQUENCES IN SCHEMA public TO PUBLIC",
    ):
        own_server.execute(statement, dbname=name)
    return name


@pytest.mark.pg("==18.*")
def test_imported_statistics_say_nothing_of_the_size_of_a_table(own_server, database, tmp_path):
    imported = "SELECT pg_restore_relation_stats('schemaname', 'public', 'relname', 'things', 'relpages', 500)"
    own_server.execute(imported, dbname=database)
    with frozen_copies(own_server, [database]) as copies:
        sized, copy = copies.verify(copies.clone()), copies.clone()
        # With sizes of another table only.
        document = json.loads(copies.attestation.read_text())
        for one in document["sizes"].values():
            one["relations"] = [row for row in one["relations"] if row[1] != "public.things"]
        less = tmp_path / "less.json"
        less.write_text(json.dumps(document))
        unsized = copies.verify(copy, attestation=less)
    assert sized.problems == unsized.problems == ()
    assert not [one for one in sized.unseen if "public.things" in one and "pages" in one]
    assert [one for one in unsized.unseen if one.startswith(f"public.things of '{database}' has 1 pages, and had 500")]


@pytest.mark.every_version
@pytest.mark.parametrize(("sequence", "said"), [("small", "said 1 while"), ("unused", "said unused while")])
def test_a_sequence_that_is_further_ahead_than_nextval_logs_is_found(own_server, database, sequence, said):
    path = "SELECT pg_relation_filepath(%s::regclass)"
    with own_server.control(database) as session:
        from_, to = (session.execute(path, [name]).fetchone()[0] for name in ("large", sequence))
    own_server.execute("CHECKPOINT")
    with frozen_copies(own_server, [database]) as copies:
        copy = copies.clone()
        shutil.copy(copy / from_, copy / to)
        found = copies.verify(copy)
    known = found.problems if (own_server.programs / "pg_waldump").exists() else found.unseen
    assert [one for one in known if f"public.{sequence} of" in one and f"says 1000000, and {said}" in one]


@pytest.mark.every_version
def test_a_sequence_that_runs_ahead_as_far_as_it_is_logged_is_none_that_is_wrong(own_server, database):
    own_server.execute("ALTER SEQUENCE small CACHE 5 INCREMENT 3", dbname=database)
    own_server.execute("CHECKPOINT")
    own_server.execute("SELECT nextval('small')", dbname=database)
    with frozen_copies(own_server, [database]) as copies:
        found = copies.verify(copies.clone())
    assert found.problems == ()
    assert not [one for one in found.unseen if "further ahead" in one]
