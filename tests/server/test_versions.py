"""Programs and journals of different versions: what each may do with the other's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest

from devtools.pgserver import Server
from tests.server import newer
from tests.server.clients import settings_of
from tests.server.test_trust import cli

#: What a switch of an older journal, or a program of another version, calls. To change one of these would leave a
#: freeze without a thaw. A new version may add others, and more keys to what these return.
PINNED: Final = """
    dead_man(uuid,bigint,interval) watch(uuid,integer,interval) restore_settings(uuid,text,interval,boolean)
    end_readers(uuid,interval) end_watch(uuid) clear_way(uuid,integer,jsonb) sweep_marks() locked(jsonb) thaws()
    dead_men()
    thaw(text,interval,text,uuid,boolean) thaw_one(uuid,text,interval,boolean,boolean,jsonb) thaw_all() thaw_expired()
    thaw_each(uuid[],text,boolean) check_thawed(jsonb) tell_where_else(text) draw_ticket(text,text,text[],timestamptz)
    open_freezes(text[],boolean) freeze_of(uuid) described(pgfreeze.freezes) revoked_entries(uuid)
"""
#: Every verb that works on a journal, but for those that thaw or look.
REFUSED: Final = [
    ("preflight", "--database", "{}"),
    ("pause", "--database", "{}"),
    ("checkpoint", "--database", "{}", "--holder", "test"),
    ("attest", "--before", "--database", "{}", "--holder", "test"),
    ("attest", "--after", "--database", "{}", "--holder", "test"),
    ("run", "--database", "{}", "--", "true"),
    ("run", "--strategy", "read-only", "--database", "{}", "--", "true"),
    ("history",),
    ("install",),
    ("install", "--grant", "freezer"),
    ("install", "--retain", "90d"),
    ("uninstall",),
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return newer.program(tmp_path)


def test_what_an_older_switch_or_another_program_calls_is_there_as_it_was(server):
    signatures = PINNED.split()
    found = server.execute("SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'pgfreeze'::regnamespace")
    there = {name.replace("timestamp with time zone", "timestamptz") for (name,) in found}
    assert {f"pgfreeze.{signature}" for signature in signatures} - there == set()


def test_an_older_program_only_looks_and_thaws_before_a_newer_journal(own_server: Server, new_database, package):
    name = new_database(own_server)
    before = settings_of(own_server)
    assert newer.run(package, own_server.dsn(), "install")[0] == 0
    code, said = newer.run(package, own_server.dsn(), "pause", "--database", name, "--holder", "test")
    assert code == 0, said

    for words in REFUSED:
        code, said = cli(own_server, *(word.format(name) for word in words))
        assert code == 3, (words, said)
        assert "newer (2.2) than this program" in said, (words, said)
        assert "pg-freeze 0.2.0 has installed it" in said, (words, said)
        assert "that version or a newer one here: pip install ./engine . in a checkout of it" in said, (words, said)
    code, said = cli(own_server, "status", "--json")
    assert code == 0, said
    (told,) = json.loads(said)["freezes"]
    assert (told["databases"], told["state"], told["holder"]) == ([name], "frozen", "test")
    assert (
        cli(own_server, "guard") == (0, "127.0.0.1: nothing has outlived its lease\n")
        or cli(own_server, "guard")[0] == 0
    )
    code, said = cli(own_server, "resume", "--database", name, "--holder", "test")

    assert (code, "thawed" in said) == (0, True), said
    assert settings_of(own_server) == before
    assert own_server.execute("SELECT seen_by FROM pgfreeze.freezes") == [("version 2",)]


def test_the_guard_of_an_older_program_thaws_before_a_newer_journal(own_server: Server, new_database, package):
    name = new_database(own_server)
    newer.run(package, own_server.dsn(), "install")
    words = ("pause", "--database", name, "--no-dead-man", "--lease", "1.2", "--drain-timeout", "1")
    code, said = newer.run(package, own_server.dsn(), *words)
    assert code == 0, said
    own_server.execute("SELECT pg_sleep(1.5)")

    code, said = cli(own_server, "guard", "--json")

    assert code == 0, said
    assert json.loads(said)["thawed"] == 1


def test_a_freeze_by_a_strategy_that_only_a_newer_program_knows_is_shown_and_thawed(
    own_server: Server, new_database, package
):
    name = new_database(own_server)
    for words in (("install",), ("pause", "--database", name, "--holder", "test")):
        code, said = newer.run(package, own_server.dsn(), *words)
        assert code == 0, (words, said)
    own_server.execute(
        "SET session_replication_role = replica; ALTER TABLE pgfreeze.freezes DISABLE TRIGGER check_row;"
        "UPDATE pgfreeze.freezes SET strategy = 'another'; ALTER TABLE pgfreeze.freezes ENABLE ALWAYS TRIGGER check_row"
    )

    code, said = cli(own_server, "status", "--json")
    assert (code, [one["strategy"] for one in json.loads(said)["freezes"]]) == (0, ["another"]), said
    assert cli(own_server, "status")[0] == 0
    code, said = cli(own_server, "resume", "--database", name, "--holder", "test", "--json")

    assert (code, json.loads(said)["thawed"][0]["state"]) == (0, "thawed"), said


def test_a_newer_program_never_upgrades_by_the_way(own_server: Server, new_database, package):
    name = new_database(own_server)
    assert cli(own_server, "install", "--grant", "freezer")[0] == 0
    assert cli(own_server, "pause", "--database", name, "--holder", "test")[0] == 0

    refused = [words for words in REFUSED if words[0] not in {"install", "uninstall"}]
    for words in [*refused, ("install", "--grant", "app")]:
        code, said = newer.run(package, own_server.dsn("postgres", "freezer"), *(word.format(name) for word in words))
        assert code == 3, (words, said)
        assert "'postgres'" in said, (words, said)
        assert "pg-freeze install" in said, (words, said)
    code, said = newer.run(package, own_server.dsn(), "status", "--json")
    assert (code, json.loads(said)["holder"]) == (0, "test"), said
    assert (
        newer.run(package, own_server.dsn("postgres", "freezer"), "resume", "--database", name, "--holder", "test")[0]
        == 0
    )
    assert own_server.execute("SELECT count(*) FROM pg_class WHERE relname = 'notes'") == [(0,)]

    code, said = newer.run(package, own_server.dsn(), "install", "--json")
    assert (code, json.loads(said)["installed"]) == (0, True), said
    code, said = newer.run(package, own_server.dsn("postgres", "freezer"), "pause", "--database", name)
    assert code == 0, said
