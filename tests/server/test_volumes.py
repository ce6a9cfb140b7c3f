"""Snapshots of volumes: of a real btrfs, and what is said where a program, a right or a volume is missing."""

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from airflow_pg_freeze.snapshots import SnapshotFailed, SnapshotRefused
from devtools import volumes
from devtools.asking import pause
from devtools.pgserver import Server
from devtools.rights import checkpointer, create_application_database, create_roles
from pg_freeze import resume
from pg_freeze.volumes import Naming, Volume, VolumeSnapshot, delete_snapshots, snapshot_volumes
from pg_freeze.volumes.commands import Commands


@pytest.fixture
def mounted() -> Iterator[Path]:
    with volumes.btrfs("data", "files") as mounted:
        yield mounted


def commands(seconds: float = 60) -> Commands:
    return Commands(time.monotonic() + seconds)


def both(mounted: Path) -> list[Volume]:
    return [Volume.parse(f"btrfs:{mounted}/data"), Volume.parse(f"btrfs:{mounted}/files")]


@pytest.mark.needs("volumes")
def test_a_server_on_a_snapshot_has_what_was_there_at_the_freeze_and_works_after_thaw_all(mounted, pg_version):
    with Server(pg_version, data=mounted / "data" / "cluster") as server:
        create_roles(server)
        create_application_database(server, "app")
        with psycopg.connect(server.dsn("app", "app"), autocommit=True) as client:
            client.execute("CREATE TABLE photos (id int PRIMARY KEY)")
            for number in range(100):
                (mounted / "files" / str(number)).touch()
                client.execute("INSERT INTO photos VALUES (%s)", (number,))
        frozen = pause(
            server.connect_factory(checkpointer(server.version)), databases=["app"], holder="test", checkpoint=True
        )
        made = snapshot_volumes(both(mounted), Naming(frozen.token), commands())
        resume(server.connect_factory(), databases=["app"], holder="test")
        with psycopg.connect(server.dsn("app", "app"), autocommit=True) as client:
            client.execute("INSERT INTO photos SELECT generate_series(100, 200)")

    data, files = (Path(snapshot.name) for snapshot in made)
    copy = volumes.writable(data, "copy")
    with Server(pg_version, data=copy / "cluster") as restored:
        # It wakes up frozen: its catalog and its journal are those of the freeze.
        with (
            psycopg.connect(restored.dsn("app", "app"), autocommit=True) as client,
            pytest.raises(psycopg.errors.ReadOnlySqlTransaction),
        ):
            client.execute("INSERT INTO photos VALUES (1000)")
        restored.execute("CALL pgfreeze.thaw_all()")
        with psycopg.connect(restored.dsn("app", "app"), autocommit=True) as client:
            rows = {str(row[0]) for row in client.execute("SELECT id FROM photos")}
            client.execute("INSERT INTO photos VALUES (1000)")

    assert rows == {path.name for path in files.iterdir()} == {str(number) for number in range(100)}


@pytest.mark.needs("volumes")
def test_a_repetition_adopts_the_snapshots_that_are_there_and_makes_what_is_missing(mounted):
    naming = Naming(uuid4())
    data, files = both(mounted)

    first = snapshot_volumes([data], naming, commands())
    second = snapshot_volumes([data, files], naming, commands())

    assert [snapshot.adopted for snapshot in (*first, *second)] == [False, True, False]
    assert first[0].name == second[0].name
    assert not list(Path(first[0].name).iterdir()), "a snapshot within the snapshot"


@pytest.mark.needs("volumes")
def test_a_snapshot_cannot_be_written_to(mounted):
    (snapshot,) = snapshot_volumes(both(mounted)[:1], Naming(uuid4()), commands())

    with pytest.raises(OSError, match="Read-only"):
        (Path(snapshot.name) / "new").touch()


@pytest.mark.needs("volumes")
def test_a_snapshot_of_another_volume_is_never_adopted(mounted):
    naming = Naming(uuid4())
    data, files = both(mounted)
    taken = Path(f"{data.source}@{naming.name}")
    subprocess.run(["btrfs", "subvolume", "snapshot", "-r", files.source, taken], check=True, capture_output=True)

    with pytest.raises(SnapshotRefused, match="is no read-only snapshot of"):
        snapshot_volumes([data], naming, commands())

    assert taken.exists()


@pytest.mark.needs("volumes")
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_in_the_way_is_left_alone(mounted, kind):
    naming = Naming(uuid4())
    data, _ = both(mounted)
    taken = Path(f"{data.source}@{naming.name}")
    taken.mkdir() if kind == "directory" else taken.touch()

    with pytest.raises(SnapshotFailed, match="in the way"):
        snapshot_volumes([data], naming, commands(), delete_partial=True)

    assert taken.exists()


@pytest.mark.needs("volumes")
@pytest.mark.parametrize("delete_partial", [True, False])
def test_a_set_that_does_not_become_complete_is_deleted_if_so_asked_and_named_if_not(mounted, delete_partial):
    naming = Naming(uuid4())
    data, _ = both(mounted)
    nowhere = Volume.parse(f"btrfs:{mounted}/nowhere")

    with pytest.raises(SnapshotFailed) as failed:
        snapshot_volumes([data, nowhere], naming, commands(), delete_partial=delete_partial)

    target = f"{data.source}@{naming.name}"
    assert Path(target).exists() is not delete_partial
    assert failed.value.left == (() if delete_partial else (target,))
    assert delete_partial or target in str(failed.value)


@pytest.mark.needs("volumes")
def test_snapshots_can_be_put_elsewhere_and_deleted(mounted):
    (mounted / "snapshots").mkdir()
    made = snapshot_volumes(both(mounted), Naming(uuid4(), directory=str(mounted / "snapshots")), commands())
    assert len(list((mounted / "snapshots").iterdir())) == 2

    assert delete_snapshots(made, commands()) == ()

    assert list((mounted / "snapshots").iterdir()) == []


@pytest.mark.needs("volumes")
def test_a_directory_that_is_no_subvolume_is_refused_by_btrfs_and_the_error_says_so(mounted):
    (mounted / "plain").mkdir()

    with pytest.raises(SnapshotFailed, match=r"(?i)not a (btrfs )?subvolume"):
        snapshot_volumes([Volume.parse(f"btrfs:{mounted}/plain")], Naming(uuid4()), commands())


@pytest.mark.needs("volumes")
def test_what_lies_below_as_a_subvolume_of_its_own_is_named_and_nothing_is_snapshotted_without_it(mounted):
    data, _ = both(mounted)
    below = [mounted / "data" / "pg_wal", mounted / "data" / "a" / "b\u202ec"]
    below[1].parent.mkdir()
    for one in below:
        subprocess.run(["btrfs", "subvolume", "create", one], check=True, capture_output=True)
        (one / "file").touch()

    for given in ([data], [data, Volume.parse(f"btrfs:{below[0]}")]):
        with pytest.raises(SnapshotRefused, match=r"would lack .*data/a/b\\u202ec") as refused:
            snapshot_volumes(given, Naming(uuid4()), commands())
        assert ("data/pg_wal," in str(refused.value)) == (len(given) == 1)
        assert refused.value.left == ()

    whole = [data, *(Volume.parse(f"btrfs:{one}") for one in below)]
    (mounted / "data" / "snapshots").mkdir()
    for _ in range(2):  # those of the first time lie below the volume, too
        made = snapshot_volumes(whole, Naming(uuid4(), directory=str(mounted / "data" / "snapshots")), commands())
        assert [(Path(one.name) / "file").exists() for one in made] == [False, True, True]


def test_the_children_of_a_zfs_dataset_are_left_out_by_a_snapshot_of_it(tmp_path):
    """There is no ZFS here: a program that answers as ``zfs list`` does."""
    (tmp_path / "zfs").write_text(
        "#!/bin/sh\ncase \"$*\" in *'-t snapshot'*) exit 1 ;; *'-r -t filesystem,volume'*) "
        'echo tank/data; echo tank/data/wal ;; *) touch "$0.ran" ;; esac\n'
    )
    (tmp_path / "zfs").chmod(0o755)
    there = Commands(time.monotonic() + 60, also_in=(str(tmp_path),))
    with pytest.raises(SnapshotRefused, match=r"would lack .* tank/data/wal"):
        snapshot_volumes([Volume.parse("zfs:tank/data")], Naming(uuid4()), there)
    assert not (tmp_path / "zfs.ran").exists()
    snapshot_volumes([Volume.parse("zfs:tank/data"), Volume.parse("zfs:tank/data/wal")], Naming(uuid4()), there)


@pytest.mark.needs("volumes")
def test_a_volume_with_a_strange_name_is_snapshotted_under_it(mounted):
    strange = mounted / "-a b;'$(true)ünïcode"
    subprocess.run(["btrfs", "subvolume", "create", strange], check=True, capture_output=True)

    (snapshot,) = snapshot_volumes([Volume.parse(f"btrfs:{strange}")], Naming(uuid4()), commands())

    assert Path(snapshot.name).is_dir()


@pytest.mark.needs("volumes")
def test_without_the_rights_the_error_says_whose_they_are(mounted, tmp_path):
    script = f"""
import os, time, uuid
from pg_freeze.volumes.commands import Commands
from pg_freeze.volumes.errors import SnapshotRefused
from pg_freeze.volumes import *
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    snapshot_volumes([Volume.parse("btrfs:{mounted}/data")], Naming(uuid.uuid4()), Commands(time.monotonic() + 30))
except SnapshotRefused as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)

    assert "runs as user 65534" in done.stdout
    assert "sudo=True" in done.stdout


@pytest.mark.parametrize(
    ("volume", "program", "package"), [("zfs:tank/data", "zfs", "zfsutils-linux"), ("lvm:vg0/data", "lvs", "lvm2")]
)
def test_a_missing_program_is_named_with_what_to_install(volume, program, package, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    nowhere = Commands(time.monotonic() + 60, also_in=())

    with pytest.raises(SnapshotRefused, match=f"there is no `{program}`.*apt-get install {package}"):
        snapshot_volumes([Volume.parse(volume)], Naming(uuid4()), nowhere)


@pytest.mark.parametrize(
    "given",
    ["", "data", "btrfs:data", "ext4:/srv", "lvm:data", "lvm:a/b/c", "zfs:", "zfs:tank@old", "zfs:-r", "lvm:-f/x"],
)
def test_what_names_no_volume_is_refused(given):
    with pytest.raises(SnapshotRefused, match="such as btrfs:/srv/data"):
        Volume.parse(given)


@pytest.mark.parametrize(
    ("given", "naming"),
    [
        ([], Naming(uuid4())),
        (["btrfs:/a/data", "btrfs:/b/data"], Naming(uuid4(), directory="/snapshots")),
        (["btrfs:/a/data"], Naming(uuid4(), directory="snapshots")),
        (["btrfs:/a/data"], Naming(uuid4(), prefix="../up")),
        (["btrfs:/a/data"], Naming(uuid4(), prefix="-r")),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_anything_runs(given, naming):
    with pytest.raises(SnapshotRefused):
        snapshot_volumes([Volume.parse(volume) for volume in given], naming, Commands(0.0))


def test_a_program_that_hangs_is_ended_when_the_time_is_up():
    began = time.monotonic()

    with pytest.raises(SnapshotFailed, match="did not end within"):
        commands(0.5).run("sleep", "600")

    assert time.monotonic() - began < timedelta(seconds=10).total_seconds()


def test_nothing_is_run_once_the_time_is_up(tmp_path):
    with pytest.raises(SnapshotFailed, match="no time is left"):
        commands(-1).run("touch", str(tmp_path / "ran"))

    assert list(tmp_path.iterdir()) == []


def test_no_shell_reads_what_a_volume_is_called(tmp_path):
    snapshot = VolumeSnapshot(Volume.parse(f"btrfs:/;touch {tmp_path}/ran"), f"/$(touch {tmp_path}/ran)", adopted=False)

    delete_snapshots([snapshot], commands())

    assert list(tmp_path.iterdir()) == []
