"""Where nobody can connect, the size of the whole database is recorded from outside, and a smaller copy is not good."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from devtools.asking import frozen
from devtools.pgserver import Server
from devtools.rights import checkpointer, create_application_database, create_roles
from pg_freeze import sizes
from tests.server.copies import Copies, copied, frozen_copies

DATABASE = "app_1"
ROWS = "SELECT i AS id FROM generate_series(1, 100000) i"


@pytest.fixture(scope="module")
def own(pg_version: int) -> Iterator[Server]:
    with Server(pg_version, settings={"autovacuum": "off"}) as server:
        create_roles(server)
        create_application_database(server, DATABASE)
        server.execute(f"CREATE TABLE things AS {ROWS}", dbname=DATABASE)
        yield server


@pytest.fixture(scope="module")
def path(own: Server) -> str:
    """Where the table is, asked while somebody can."""
    ((found,),) = own.execute("SELECT pg_relation_filepath('things')", dbname=DATABASE)
    return str(found)


@pytest.fixture(scope="module")
def copies(own: Server, path: str) -> Iterator[Copies]:
    with frozen_copies(own, [DATABASE], admit="nobody") as copies:
        yield copies


def test_a_whole_copy_is_good_and_says_that_no_single_relation_was_compared(copies):
    found = copies.verify(copies.clone())

    assert found.problems == ()
    assert copies.closed.level == "strict"
    assert any("the sizes of the single relations of 'app_1'" in one for one in found.unseen)


def test_a_table_that_was_cut_is_found_by_the_size_of_the_whole(copies, path):
    copy = copies.clone()
    os.truncate(copy / path, 3 * 8192)

    found = copies.verify(copy)

    assert any("while it was frozen" in problem for problem in found.problems)


def test_the_directory_of_another_database_is_found_by_its_size(own, copies):
    ((number,),) = own.execute(f"SELECT oid FROM pg_database WHERE datname = '{DATABASE}'")
    copy = copies.clone()
    shutil.rmtree(copy / "base" / str(number))
    copied(copy / "base" / "1", copy / "base" / str(number))

    found = copies.verify(copy)

    assert any("while it was frozen" in problem for problem in found.problems)


def test_a_block_that_closes_a_database_records_its_size_too(own):
    create_application_database(own, "app_2")
    connect = own.connect_factory(checkpointer(own.version))

    def into(name: str):
        return own.connect_factory(checkpointer(own.version), name)()

    with frozen(connect, into, databases=["app_2"], holder="x", strategy="read-only", admit="nobody") as hold:
        pass

    ((number, size),) = own.execute("SELECT oid, pg_database_size(oid) FROM pg_database WHERE datname = 'app_2'")
    assert hold.attestation is not None
    assert hold.attestation.level == "strict"
    assert hold.attestation.sizes[str(number)]["bytes"] == size


def test_the_size_of_the_whole_says_nothing_if_part_of_it_is_unlogged(own):
    # The others here have it frozen.
    create_application_database(own, "app_3")
    ((number, size),) = own.execute("SELECT oid, pg_database_size(oid) FROM pg_database WHERE datname = 'app_3'")
    kept = {str(number): {"name": "app_3", "unseen": "it is closed", "bytes": size + 2**20}}
    with own.control("app_3") as conn, conn.transaction(force_rollback=True):
        assert [bad for bad, _ in sizes.compare(conn, kept, number, "app_3")] == [False, True]
        conn.execute("CREATE UNLOGGED TABLE emptied ()")
        ((bad, said),) = sizes.compare(conn, kept, number, "app_3")
    assert not bad
    assert "unlogged" in said
