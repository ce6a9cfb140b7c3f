"""Where, by whom and when the journal can be installed."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest

import pg_freeze as core
from devtools.asking import pause
from devtools.pgserver import Server
from pg_freeze import FreezeError, FreezeRefused
from pg_freeze.control import control
from pg_freeze.journal.definition import Definition
from pg_freeze.journal.install import install
from tests.server import newer
from tests.server.clients import background, wait_until
from tests.server.test_trust import cli


def test_in_a_database_that_is_frozen_itself_nothing_is_installed(own_server: Server, new_database):
    name = new_database(own_server)
    pause(own_server.control, databases=[name], holder="test")

    code, said = cli(own_server, "install", "--maintenance-database", name)

    assert (code, "is read-only by default, perhaps frozen" in said) == (3, True), said
    core.resume(own_server.control, databases=[name], holder="test")
    assert cli(own_server, "install", "--maintenance-database", name)[0] == 0
    pause(own_server.control, databases=[name], holder="test")
    for words in (("install", "--grant", "freezer"), ("uninstall",)):
        code, said = cli(own_server, *words, "--maintenance-database", name)
        assert (code, "is read-only by default" in said) == (3, True), said


def test_in_a_database_that_is_closed_it_cannot_be_installed(own_server: Server, new_database):
    name = new_database(own_server)
    pause(own_server.control, databases=[name], holder="test", admit="nobody")
    code, said = cli(own_server, "install", "--maintenance-database", name)
    assert (code, "not currently accepting connections" in said) == (1, True), said


def test_a_role_without_rights_is_told_who_has_to_install(own_server: Server):
    code, said = cli(own_server, "install", user="app")
    assert (code, "as a superuser, pg-freeze install --grant app" in said) == (3, True), said
    core.install(own_server.control, grant=["freezer"])
    code, said = cli(own_server, "install", "--grant", "app", user="freezer")
    assert (code, "belongs to 'postgres'" in said) == (3, True), said
    assert cli(own_server, "install", user="freezer")[0] == 0


@pytest.mark.every_version
def test_many_installations_at_once_make_one_journal(own_server: Server, tmp_path):
    second = Definition.read(newer.program(tmp_path), "0.2.0")

    def upgrade() -> bool:
        with control(own_server.control, "install") as conn:
            return install(conn, wanted=second)

    for act in (lambda: core.install(own_server.control), upgrade):
        made: list[bool] = []
        threads = [threading.Thread(target=lambda act=act, made=made: made.append(act())) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(made) == [False] * 5 + [True]


def test_a_pause_that_begins_while_the_journal_is_upgraded_freezes_or_says_why_not(
    own_server: Server, new_database, tmp_path
):
    name = new_database(own_server)
    core.install(own_server.control, grant=["freezer"])
    second = Definition.read(newer.program(tmp_path), "0.2.0")
    connect = own_server.connect_factory()
    frozen: list[int] = []
    stop = threading.Event()

    def go_on() -> str:
        while not stop.is_set():
            try:
                pause(connect, databases=[name], holder="test", drain_timeout=timedelta(seconds=5))
                frozen.append(1)
                core.resume(connect, databases=[name], holder="test")
            except FreezeRefused as error:
                return str(error)
        return "never refused"

    with background(go_on) as pauses:
        try:
            wait_until(lambda: len(frozen) > 1, within=60)
            with control(own_server.control, "install") as conn:
                assert install(conn, wanted=second)
            assert "newer (2.2) than this program" in pauses.result(60)
        finally:
            stop.set()

    assert core.status(connect).freezes == ()
    assert own_server.execute("SELECT count(*) FROM pgfreeze.freezes WHERE state <> 'thawed'") == [(0,)]


def test_a_journal_that_is_left_by_a_program_that_died_while_it_made_it_is_not_there(own_server: Server):
    with own_server.control() as conn:
        conn.execute("CREATE TABLE public.gate ()")
    own_server.execute(
        "CREATE FUNCTION public.hold_up() RETURNS event_trigger LANGUAGE plpgsql AS"
        " $$ BEGIN LOCK TABLE public.gate; END $$;"
        "CREATE EVENT TRIGGER hold_up ON ddl_command_end WHEN TAG IN ('COMMENT') EXECUTE FUNCTION public.hold_up()"
    )
    with own_server.control() as conn, background(lambda: core.install(own_server.control)) as installing:
        conn.execute("BEGIN; LOCK TABLE public.gate")
        waiting = "SELECT pid FROM pg_locks WHERE NOT granted AND relation = 'public.gate'::regclass"
        (pid,) = wait_until(lambda: conn.execute(waiting).fetchone())
        conn.execute("SELECT pg_terminate_backend(%s)", (pid,))
        with pytest.raises(FreezeError):
            installing.result(60)
        conn.execute("ROLLBACK")
    assert own_server.execute("SELECT oid FROM pg_namespace WHERE nspname = 'pgfreeze'") == []
    assert core.install(own_server.control)


def test_a_default_of_the_role_or_the_server_to_be_read_only_does_not_matter(own_server: Server):
    own_server.execute("ALTER ROLE postgres SET default_transaction_read_only = on")
    assert core.install(own_server.connect_factory("postgres"))
