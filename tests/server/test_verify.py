"""A copy is started, thawed and checked: a good one passes, each bad one says what is wrong with it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from airflow_pg_freeze.core import Connect, FreezeError, FreezeRefused, attest, frozen, pause, resume
from airflow_pg_freeze.core.verify import Verified, verify_copy
from devtools.binaries import temp_root
from devtools.pgserver import Server
from devtools.rights import checkpointer


@pytest.fixture
def connect_own(own_server: Server, connect_to: Callable[[Server], Connect]) -> Connect:
    return connect_to(own_server)


@pytest.fixture
def database(own_server: Server, new_database: Callable[[Server], str]) -> str:
    name = new_database(own_server)
    own_server.execute("CREATE TABLE things AS SELECT i AS id FROM generate_series(1, 1000) i", dbname=name)
    own_server.execute("CREATE INDEX ON things (id)", dbname=name)
    return name


@pytest.fixture
def snapshot(own_server: Server, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Copy the data directory of the running server: while it is frozen nothing in it moves but what recovery mends."""
    made: list[Path] = []

    def take() -> Path:
        target = Path(temp_root()) / f"pgf-copy-{os.getpid()}-{len(made)}"
        made.append(target)
        subprocess.run(["cp", "-a", "--", str(own_server.data), str(target)], check=True)
        return target

    yield take
    for path in made:
        shutil.rmtree(path)


def checked(server: Server, copy: Path) -> Verified:
    return verify_copy(copy, bin_dir=server.programs)


def test_a_copy_taken_inside_a_freeze_is_good_and_writable_again(own_server, connect_own, database, snapshot):
    pause(connect_own, databases=[database], holder="copier")
    own_server.execute("CHECKPOINT")
    attest.before(connect_own, databases=[database], holder="copier")
    copy = snapshot()
    after = attest.after(connect_own, databases=[database], holder="copier")
    resume(connect_own, databases=[database], holder="copier")

    found = checked(own_server, copy)

    assert found.problems == ()
    assert found.thawed == (database,)
    assert [freeze.token for freeze in found.freezes] == [after.token]
    assert [one.id for one in found.attestations] == [after.id]
    assert not (copy / "postmaster.pid").exists()
    again = checked(own_server, copy)  # the copy was thawed: it is no frozen copy any more, and says so
    assert not again.good
    assert "was thawed before, by thaw_all by postgres" in again.problems[0]


def test_a_copy_taken_under_locks_is_good(own_server, connect_own, database, snapshot):
    own_server.execute("GRANT app TO freezer")
    own_server.execute("ALTER TABLE things OWNER TO app_owner", dbname=database)
    options = {"databases": [database], "holder": "copier", "checkpoint": own_server.version >= 15}
    with frozen(connect_own, lambda name: own_server.connect_factory(dbname=name)(), **options) as hold:
        copy = snapshot()

    found = checked(own_server, copy)

    assert found.problems == ()
    assert [freeze.token for freeze in found.freezes] == [hold.freeze.token]
    assert found.thawed == (database,)


def test_a_copy_of_a_running_database_says_that_it_was_not_frozen(own_server, connect_own, database, snapshot):
    pause(connect_own, databases=[database], holder="copier")
    resume(connect_own, databases=[database], holder="copier")
    own_server.execute("CHECKPOINT")
    own_server.stop("fast")
    copy = snapshot()
    found = checked(own_server, copy)
    assert not found.good
    assert any("not taken inside a freeze" in problem for problem in found.problems)


def test_a_damaged_index_is_found_where_amcheck_is_installed(own_server, connect_own, database, snapshot):
    path = own_server.execute("SELECT pg_relation_filepath('things_id_idx')", dbname=database)[0][0]
    connect = own_server.connect_factory(checkpointer(own_server.version))
    pause(connect, databases=[database], holder="copier", checkpoint=True)
    copy = snapshot()
    with (copy / path).open("r+b") as file:
        file.seek(8192 + 4096)
        file.write(b"\xff" * 2048)
    found = checked(own_server, copy)
    if (own_server.programs / "pg_amcheck").exists():
        assert any("pg_amcheck" in problem for problem in found.problems)
    else:
        assert found.amcheck.startswith("not run: pg_amcheck")


def test_a_directory_that_is_in_use_or_none_at_all_is_refused(own_server, connect_own, database, tmp_path):
    with pytest.raises(FreezeRefused, match="server runs"):
        checked(own_server, own_server.data)
    with pytest.raises(FreezeRefused, match="no PostgreSQL data directory"):
        verify_copy(tmp_path)
    assert own_server.running


def test_a_copy_that_does_not_start_shows_the_end_of_its_log(own_server, connect_own, database, snapshot):
    pause(connect_own, databases=[database], holder="copier")
    copy = snapshot()
    (copy / "global" / "pg_control").write_bytes(b"\0" * 8192)
    with pytest.raises(FreezeError, match=r"does not start.*\n"):
        checked(own_server, copy)
