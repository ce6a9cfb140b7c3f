"""A copy of which a volume, or a file, is from after the thaw, while the WAL is that of the freeze."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta

import pytest

from devtools.asking import pause
from pg_freeze import resume
from pg_freeze.copies import lsns
from pg_freeze.copies.tree import inspect
from tests.server.copies import copied, frozen_copies, scratch, verify

LATER = "of the copy are from after the second look of the attestation, at WAL "
OWN = "of the copy are from after the end of the copy's own WAL, at WAL "


@pytest.fixture
def database(own_server, new_database):
    name = new_database(own_server)
    for statement in (
        "CREATE TABLE things (id int PRIMARY KEY, word text)",
        "INSERT INTO things SELECT i, repeat('x', 100) FROM generate_series(1, 3000) i",
        "VACUUM ANALYZE things",
        "CHECKPOINT",
    ):
        own_server.execute(statement, dbname=name)
    return name


def thaw_and_delete(server, database):
    """Leave tables that are as large as before, and fit to their indexes."""
    resume(server.connect_factory(), databases=[database], holder="copier")
    for statement in ("DELETE FROM things WHERE id % 2 = 0", "VACUUM (TRUNCATE OFF) things", "CHECKPOINT"):
        server.execute(statement, dbname=database)


def files_of(server, database, *relations):
    paths = [server.execute(f"SELECT pg_relation_filepath('{one}')", dbname=database)[0][0] for one in relations]
    return [path + fork for path in paths for fork in ("", "_vm", "_fsm") if (server.data / (path + fork)).exists()]


@pytest.mark.every_version
def test_single_files_of_after_the_thaw_are_found(own_server, database):
    files = files_of(own_server, database, "things", "things_pkey")
    with frozen_copies(own_server, [database]) as copies:
        thaw_and_delete(own_server, database)
        copy, again = copies.clone(), copies.clone()
        for file in files:
            shutil.copy(own_server.data / file, copy / file)
        shutil.copy(own_server.data / files[0], again / files[0])

        said = next(one for one in copies.verify(copy).problems if LATER in one)
        alone = " ".join(verify(again, own_server).problems)
        whole = copies.verify(copies.clone())

    assert f"public.things of '{database}', {files[0]} (a page of WAL " in said
    assert f"public.things_pkey of '{database}', " in said
    assert f"1 file(s) {OWN}" in alone
    assert whole.problems == ()
    assert "the LSN of each page, against the second look of the attestation" in whole.looked_at


@pytest.mark.every_version
def test_the_volume_of_a_tablespace_that_was_copied_after_the_thaw_is_found(own_server, database, tmp_path):
    with scratch() as place:
        volume = place / "volume"
        volume.mkdir(mode=0o700)
        status = own_server.data.stat()
        os.chown(volume, status.st_uid, status.st_gid)
        own_server.execute(f"CREATE TABLESPACE elsewhere LOCATION '{volume}'")
        own_server.execute("ALTER TABLE things SET TABLESPACE elsewhere", dbname=database)
        own_server.execute("CHECKPOINT")
        with frozen_copies(own_server, [database]) as copies:
            inside = copied(volume, place / "inside")
            thaw_and_delete(own_server, database)
            after = copied(volume, place / "after")
            good = copies.verify(copies.clone(), tablespaces={str(volume): inside})
            late = copies.verify(copies.clone(), tablespaces={str(volume): after})
        own_server.execute(f"DROP DATABASE {database} WITH (FORCE)")
        own_server.execute("DROP TABLESPACE elsewhere")
    assert good.problems == ()
    assert any(LATER in one and f"public.things of '{database}', {after}/PG_" in one for one in late.problems)


def test_what_is_unlogged_or_temporary_or_of_another_version_has_no_lsn_that_counts(own_server, database):
    own_server.execute("CREATE UNLOGGED TABLE forgetful AS SELECT 1 AS id", dbname=database)
    own_server.execute("CHECKPOINT")
    (file,) = files_of(own_server, database, "forgetful")
    page = b"\xff" * 18 + bytes.fromhex("0420") + bytes(8172)
    with scratch() as place:
        copy = copied(own_server.data, place / "copy")
        directory = (copy / file).parent
        for name in (file, directory / "t3_99998", "base/pgsql_tmp/1", "pg_tblspc/1/PG_13_202007201/5/99998"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(page)
        with (directory / "99999").open("wb") as endless:
            endless.truncate(2**42)
        tree = inspect(copy, {}, None)
        found = lsns.read(tree, own_server.version, limit=timedelta(minutes=1))
        highest = max(one.lsn for one in found.newest)
        (directory / "99998").write_bytes(bytes(8192) + page)
        more = lsns.read(tree, own_server.version, limit=timedelta(minutes=1))
        late = lsns.read(tree, own_server.version, limit=timedelta())
    assert (found.block, found.unread, more.unread) == (8192, None, None)
    assert 0 < highest < 2**64 - 1
    assert max(one.lsn for one in more.newest) == 2**64 - 1
    assert "could not be read within" in late.unread


@pytest.mark.every_version
def test_full_pages_that_only_hints_have_written_are_no_later_ones(server_factory, new_database):
    """With wal_log_hints a page gets an LSN where no row has changed, also in the map of free space."""
    server = server_factory(settings={"wal_log_hints": "on"})
    database = new_database(server)
    server.execute("CREATE TABLE things AS SELECT i AS id FROM generate_series(1, 20000) i", dbname=database)

    def read():
        server.execute("CHECKPOINT")
        server.execute("SELECT count(*) FROM things", dbname=database)
        server.execute("CHECKPOINT")

    with frozen_copies(server, [database], meanwhile=read) as copies:
        told, alone = copies.verify(copies.clone()), verify(copies.clone(), server)
    assert told.problems == ()
    assert not [one for one in alone.problems if OWN in one]


def test_a_copy_without_any_look_is_compared_with_its_own_wal(own_server, database):
    with scratch() as place:
        pause(own_server.connect_factory("postgres"), databases=[database], holder="copier", checkpoint=True)
        found = verify(copied(own_server.data, place / "copy"), own_server)
    assert not [one for one in found.problems if OWN in one]
    assert "the LSN of each page, against the end of the copy's own WAL" in found.looked_at
