"""The attestation that verify-copy is given: whole, closed, and of the very record that the copy has open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from devtools.environment import without
from devtools.pgserver import Server
from devtools.rights import checkpointer, create_application_database, create_roles
from pg_freeze import FreezeError, InvalidRequest, attest
from tests.server.copies import TRUSTED, copied, frozen_copies, scratch

DATABASE = "app_1"
PROGRAM = Path(sys.executable).with_name("pg-freeze")


@pytest.fixture(scope="module")
def own(pg_version):
    with Server(pg_version, settings={"autovacuum": "off"}) as server:
        create_roles(server)
        create_application_database(server, DATABASE)
        server.execute("CREATE TABLE things AS SELECT i AS id FROM generate_series(1, 1000) i", dbname=DATABASE)
        yield server


@pytest.fixture(scope="module")
def copies(own):
    with frozen_copies(own, [DATABASE]) as copies:
        yield copies


@pytest.fixture
def altered(copies, tmp_path):
    def write(**changes):
        document = json.loads(copies.attestation.read_text())
        document["attestation"] |= changes
        path = tmp_path / "altered.json"
        path.write_text(json.dumps(document))
        return path

    return write


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"level": None, "certified": False}, "it is still open"),
        ({"certified": False}, "it contradicts itself"),
        ({"violations": [{"what": "1 of Heap/INSERT"}]}, "it contradicts itself"),
        ({"level": "crash-only"}, "it contradicts itself"),
        ({"level": "perfect"}, "is not a valid Level"),
        ({"id": "1"}, "a field has another type"),
        ({"databases": "app_1"}, "a field has another type"),
        ({"violations": ["none"]}, "a field has another type"),
        ({"sizes": {"1": {"name": "app_1", "relations": [[1, 2]]}}}, "is no closed attestation"),
        ({"sizes": ["none"]}, "are no object"),
    ],
)
def test_one_that_is_open_or_makes_no_sense_is_refused(copies, altered, changes, said):
    path = altered(**changes)
    if "sizes" in changes:
        path.write_text(json.dumps(json.loads(path.read_text())["attestation"]))
    with pytest.raises(InvalidRequest, match=said):
        copies.verify(copies.taken, attestation=path)


def test_one_that_is_cut_off_or_no_attestation_at_all_is_refused(copies, tmp_path):
    path = tmp_path / "part.json"
    whole = copies.attestation.read_text()
    for text in (whole[: len(whole) // 2], "", "[]", "null", "{}", '{"attestation": 1}', "[" * 100_000, "\udcff"):
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(InvalidRequest, match="is no closed attestation"):
            copies.verify(copies.taken, attestation=path)
    with pytest.raises(InvalidRequest, match="No such file"):
        copies.verify(copies.taken, attestation=tmp_path / "nowhere")


def test_one_of_another_freeze_or_record_or_altered_says_nothing_of_this_copy(copies, altered):
    number = copies.closed.id
    for changes, said in (
        ({"token": "00000000-0000-0000-0000-000000000000"}, "in which the copy was not taken"),
        ({"id": number + 1, "wal_from": "0/1"}, "wal_from is '0/1', and in the copy "),
        ({"wal_from": "0/1"}, "wal_from is '0/1', and in the copy "),
        ({"before_at": "2020-01-01T00:00:00+00:00"}, "the attestation was altered, or is of another server"),
    ):
        found = copies.verify(copies.clone(), attestation=altered(**changes))
        assert said in found.problems[0]
        assert "the attestation that was given" not in found.looked_at


def test_a_copy_that_was_taken_after_the_second_look_is_not_covered_by_it(copies):
    late = copied(copies.server.data, copies.place / "late")
    assert "taken after the second look of attestation" in copies.verify(late).problems[0]


def test_a_copy_that_a_server_has_run_on_since_is_not_covered_by_it(copies):
    """Not even if its WAL does not go back to the first look any more, so that nothing else shows."""
    used = copies.clone()
    with Server(copies.server.version, data=used, settings={"autovacuum": "off"}) as server:
        with server.control(DATABASE) as session:
            session.execute("BEGIN READ WRITE; UPDATE things SET id = -id; COMMIT")
        for _ in range(3):
            server.execute("SELECT pg_switch_wal()")
            server.execute("CHECKPOINT")
        server.kill()
        again = copied(used, copies.place / "used")
    found = copies.verify(again)
    assert "the copy goes on after the second look of the attestation" in found.problems[0]
    assert "the attestation that was given" not in found.looked_at


def test_after_a_first_verification_a_copy_is_told_to_have_been_started_not_to_have_changed(copies):
    copy = copies.clone()
    with pytest.raises(FreezeError, match="nowhere"):
        copies.verify(copy, maintenance_database="nowhere")
    said = " ".join(copies.verify(copy).problems)
    assert "a row changed" not in said
    # Without pg_waldump it is not known to a record how far the copy's WAL went, and the attestation has to do.
    assert ("Verify a fresh copy" in said) == (copies.server.programs / "pg_waldump").exists()


def test_a_pipe_is_no_attestation(copies, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InvalidRequest, match="it is no file"):
        copies.verify(copies.taken, attestation=pipe)


def test_a_copy_may_be_taken_under_a_second_attestation_of_one_freeze(copies):
    role = checkpointer(copies.server.version)
    connect = copies.server.connect_factory(role)

    def connect_to(name):
        return copies.server.connect_factory(role, dbname=name)()

    options = {"databases": [DATABASE], "holder": "copier", "connect_to": connect_to}
    attest.before(connect, **options)
    second = copied(copies.server.data, copies.place / "second")
    attest.after(connect, **options).write(copies.place / "second.json")
    assert copies.verify(second, attestation=copies.place / "second.json").problems == ()


def test_a_copy_of_a_first_try_is_covered_by_the_record_of_the_second(copies, altered):
    """It has only the first record: all records of a freeze count from its first look."""
    assert copies.verify(copies.clone(), attestation=altered(id=copies.closed.id + 1)).problems == ()


@pytest.mark.every_version
@pytest.mark.parametrize("strategy", ["lock", "read-only"])
def test_what_run_writes_is_what_verify_copy_takes(pg_version, strategy):
    with Server(pg_version) as server, scratch() as place:
        create_roles(server)
        create_application_database(server, DATABASE)
        server.execute("GRANT app TO freezer")
        file, copy = place / "attestation.json", place / "copy"
        environment = without("PG", "AIRFLOW")
        environment["PG_FREEZE_DSN"] = server.dsn("postgres", checkpointer(server.version))

        def cli(*words):
            done = subprocess.run(
                [PROGRAM, *words], env=environment, capture_output=True, text=True, check=False, timeout=120
            )
            return done.returncode, done.stdout + done.stderr

        kind = ("--strategy", strategy, "--attestation", file)
        code, said = cli("run", "--database", DATABASE, *kind, "--", "cp", "-a", server.data, copy)
        assert code == 0, said

        trust = ["--trust-copy"] if TRUSTED else []
        given = ("--data-dir", copy, "--bin-dir", server.programs, "--attestation", file, *trust)
        code, said = cli("verify-copy", *given)
        assert code == 0, said
        assert "Starting PostgreSQL on" in said
        assert "Looked at: the attestation that was given" in said
        assert "were recorded while it was frozen" not in said
        assert "Changed in the copy: " in said
