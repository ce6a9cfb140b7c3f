"""Prepared transactions of a copy: one that was lost, one that has ended, and what they keep locked."""

from __future__ import annotations

import pytest

from tests.server.copies import frozen_copies


@pytest.fixture
def database(own_server, new_database):
    name = new_database(own_server)
    for statement in (
        "CREATE TABLE things (id int PRIMARY KEY)",
        "INSERT INTO things SELECT generate_series(1, 1000)",
        "CREATE TABLE others (id int PRIMARY KEY)",
        "INSERT INTO others SELECT generate_series(1, 1000)",
        "CHECKPOINT",
    ):
        own_server.execute(statement, dbname=name)
    return name


def found_in(copies, copy):
    """Return what is wrong, but for a level that is lower since nobody could read what became of the transaction."""
    found = copies.verify(copy)
    return [one for one in found.problems if not one.startswith("the attestation says crash-only: ")], found.unseen


def prepare(server, database, name, statement):
    with server.control(database) as session:
        session.execute("BEGIN")
        session.execute(statement)
        session.execute(f"PREPARE TRANSACTION '{name}'")


@pytest.mark.every_version
def test_a_prepared_transaction_that_was_lost_is_found(own_server, database):
    prepare(own_server, database, "mine", "INSERT INTO things VALUES (0)")
    with frozen_copies(own_server, [database]) as copies:
        good, _ = found_in(copies, copies.clone())
        copy = copies.clone()
        for file in (copy / "pg_twophase").iterdir():
            file.unlink()
        bad, _ = found_in(copies, copy)
    assert good == []
    assert [one for one in bad if one.startswith("the prepared transaction mine (")]


@pytest.mark.every_version
def test_a_prepared_transaction_that_was_rolled_back_meanwhile_is_not_lost(own_server, database):
    prepare(own_server, database, "mine", "INSERT INTO things VALUES (0)")

    def roll_back():
        own_server.execute("ROLLBACK PREPARED 'mine'", dbname=database)

    with frozen_copies(own_server, [database], meanwhile=roll_back) as copies:
        found, _ = found_in(copies, copies.clone())
    assert found == []


@pytest.mark.every_version
def test_what_a_prepared_transaction_has_locked_is_named_and_all_else_is_checked(own_server, database):
    own_server.execute("CREATE SEQUENCE numbers", dbname=database)
    prepare(own_server, database, "ddl", "ALTER TABLE things ADD COLUMN more int; ALTER SEQUENCE numbers INCREMENT 2")
    paths = dict(own_server.execute("SELECT relname, pg_relation_filepath(oid) FROM pg_class", dbname=database))
    with frozen_copies(own_server, [database]) as copies:
        good, unseen = found_in(copies, copies.clone())
        copy = copies.clone()
        (copy / paths["others"]).write_bytes(b"")
        bad, _ = found_in(copies, copy)
    assert good == []
    assert f"public.things of {database!r}: a prepared transaction has it locked" in unseen
    assert f"public.numbers of {database!r}: a prepared transaction has it locked" in unseen
    assert not [one for one in unseen if "sizes of the" in one]
    assert [one for one in bad if f"public.others of {database!r} has 0 bytes, and had" in one]
