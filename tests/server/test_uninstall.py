"""The journal can be removed, and its history forgotten: never what is open, and nothing that is not its own."""

from __future__ import annotations

import json
import shlex
from datetime import timedelta
from typing import Final, LiteralString

import psycopg
import pytest

import pg_freeze as core
from devtools.asking import frozen, pause
from devtools.pgserver import Server
from pg_freeze import FreezeRefused, InvalidRequest
from tests.server.test_trust import cli

_ROWS: Final[LiteralString] = """
    SELECT (SELECT count(*) FROM pgfreeze.freezes), (SELECT count(*) FROM pgfreeze.frozen_databases),
           (SELECT count(*) FROM pgfreeze.prior_settings), (SELECT count(*) FROM pgfreeze.attestations),
           (SELECT count(*) FROM pgfreeze.blockers), (SELECT count(*) FROM pgfreeze.tickets)"""


@pytest.fixture
def site(own_server: Server, new_database) -> tuple[Server, core.Connect, str]:
    core.install(own_server.control, grant=["freezer"])
    return own_server, own_server.connect_factory(), new_database(own_server)


def schemas(server: Server, database: str = "postgres") -> int:
    return len(server.execute("SELECT oid FROM pg_namespace WHERE nspname = 'pgfreeze'", database))


def frozen_once(connect: core.Connect, name: str, holder: str = "test") -> None:
    pause(connect, databases=[name], holder=holder)
    core.resume(connect, databases=[name], holder=holder)


def age(server: Server, holder: str, days: int) -> None:
    """Make a freeze that is thawed, and all that belongs to it, older than it is."""
    aged = {
        "freezes": "requested_at = requested_at - d, thawed_at = thawed_at - d, lease_until = lease_until - d",
        "attestations": "before_at = before_at - d, after_at = after_at - d",
        "tickets": "drawn_at = drawn_at - d, began_at = began_at - d",
    }
    with server.control() as conn:
        for table, columns in aged.items():
            conn.execute(f"ALTER TABLE pgfreeze.{table} DISABLE TRIGGER USER")
            conn.execute(
                f"UPDATE pgfreeze.{table} t SET {columns} FROM make_interval(days => %s) d WHERE %s = "
                + (
                    "(SELECT f.holder FROM pgfreeze.freezes f WHERE f.token = t.token)"
                    if table == "attestations"
                    else "t.holder"
                ),
                (days, holder),
            )
            conn.execute(f"ALTER TABLE pgfreeze.{table} ENABLE TRIGGER USER")


@pytest.mark.every_version
def test_the_journal_goes_with_all_that_is_its_own_and_comes_again(site):
    server, connect, name = site
    frozen_once(connect, name)

    assert cli(server, "uninstall") == (0, "The journal is removed, with its history.\n")
    assert schemas(server) == 0
    assert cli(server, "uninstall") == (0, "There was no journal.\n")
    assert cli(server, "uninstall", "--json")[1] == '{"uninstalled": false}\n'

    assert core.install(server.control, grant=["freezer"])
    frozen_once(connect, name)


def test_nothing_is_removed_while_anything_is_frozen(site):
    server, connect, name = site
    pause(connect, databases=[name], holder="nightly")

    code, said = cli(server, "uninstall")

    assert code == 3, said
    assert f"{name} by 'nightly' (frozen)" in said
    assert f"pg-freeze resume --force --database {name}" in said
    assert len(core.resume(connect, databases=[name], holder="nightly").thawed) == 1
    assert cli(server, "uninstall")[0] == 0


def test_nothing_is_removed_while_a_database_is_frozen_from_inside(site):
    server, _, name = site
    to = lambda where: server.connect_factory("freezer", where)  # noqa: E731
    pause(to("postgres"), connect_to=lambda where: to(where)(), databases=[name], holder="test", strategy="privileges")

    for database in ("postgres", name):
        code, said = cli(server, "uninstall", database=database, user="freezer" if database == name else None)
        assert (code, name in said) == (3, True), said
    core.resume(to("postgres"), databases=[name], holder="test", connect_to=lambda where: to(where)())

    assert cli(server, "uninstall", database=name, user="freezer")[0] == 0
    assert (schemas(server, name), schemas(server)) == (0, 1)


def test_the_journal_of_another_role_is_left_alone(site):
    server, _, _ = site
    code, said = cli(server, "uninstall", user="freezer")
    assert (code, "which belongs to 'postgres': log in as that role, and there pg-freeze uninstall\n" in said) == (
        3,
        True,
    ), said
    server.execute("CREATE FUNCTION pgfreeze.theirs() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    server.execute("ALTER FUNCTION pgfreeze.theirs() OWNER TO app")
    code, said = cli(server, "uninstall")
    assert (code, "belongs to role 'app'" in said) == (3, True), said
    assert schemas(server) == 1


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("CREATE VIEW public.report AS SELECT * FROM pgfreeze.freezes", "view public.report"),
        ("CREATE VIEW public.report AS SELECT * FROM pgfreeze.sessions", "view public.report"),
        ("CREATE TABLE public.notes (token uuid REFERENCES pgfreeze.freezes)", "public.notes"),
        ("CREATE TABLE public.copies (f pgfreeze.freezes)", "public.copies"),
        ("CREATE TABLE pgfreeze.mine (i int)", "table pgfreeze.mine"),
        ("CREATE VIEW pgfreeze.mine AS SELECT 1 AS i", "view pgfreeze.mine"),
        ("CREATE TABLE public.given (token uuid DEFAULT NULL CHECK (pgfreeze.locked('[]')))", "public.given"),
    ],
)
def test_what_depends_on_the_journal_and_is_not_part_of_it_is_never_dropped(site, statement, named):
    server, connect, name = site
    server.execute(statement)
    before = server.execute("SELECT count(*) FROM pg_class WHERE relnamespace = 'pgfreeze'::regnamespace")

    code, said = cli(server, "uninstall")

    assert (code, named in said) == (3, True), said
    assert server.execute("SELECT count(*) FROM pg_class WHERE relnamespace = 'pgfreeze'::regnamespace") == before
    frozen_once(connect, name)


@pytest.mark.every_version
def test_old_history_goes_and_what_is_open_or_newer_stays(site, new_database):
    server, connect, name = site
    to = lambda where: server.connect_factory("postgres", where)()  # noqa: E731
    for holder in ("old", "new"):
        with frozen(server.control, to, databases=[name], holder=holder, strategy="read-only"):
            pass
    pause(connect, databases=[other := new_database(server)], holder="open")
    for holder, days in (("old", 91), ("new", 89), ("open", 0)):
        age(server, holder, days)
    server.execute(
        "INSERT INTO pgfreeze.blockers (token, pid, backend_start, ended)"
        " SELECT token, 1, clock_timestamp(), true FROM pgfreeze.freezes"
    )
    assert server.execute(_ROWS)[0][:5] == (3, 3, 3, 2, 3)

    code, said = cli(server, "install", "--retain", "90d")

    assert (code, "Forgot 1 freeze(s) that were thawed more than 90 d ago" in said) == (0, True), said
    assert server.execute(_ROWS)[0][:5] == (2, 2, 2, 1, 2)
    assert [one.holder for one in core.history(connect)] == ["open", "new"]
    assert server.execute("SELECT DISTINCT holder FROM pgfreeze.tickets ORDER BY 1") == [("new",), ("open",)]
    assert len(core.resume(connect, databases=[other], holder="open").thawed) == 1


def test_a_freeze_that_was_attested_since_is_kept_and_so_are_the_tickets_of_a_month(site):
    server, connect, name = site
    frozen_once(connect, name)
    with frozen(server.control, server.control, databases=[name], holder="test", strategy="read-only"):
        pass
    with server.control() as conn:
        conn.execute("ALTER TABLE pgfreeze.freezes DISABLE TRIGGER USER")
        conn.execute(
            "UPDATE pgfreeze.freezes SET requested_at = requested_at - '1 y'::interval, thawed_at = thawed_at - "
            "'1 y'::interval, lease_until = lease_until - '1 y'::interval"
        )
        conn.execute("ALTER TABLE pgfreeze.freezes ENABLE TRIGGER USER")

    assert core.forget(server.control, age=timedelta(days=90)) == core.Forgotten(1, attested=1)
    assert server.execute("SELECT count(*) FROM pgfreeze.attestations") == [(1,)]
    assert len(core.history(connect)) == 1
    # A late attempt must still find the resume.
    assert server.execute("SELECT act FROM pgfreeze.tickets ORDER BY ticket") == [("pause",), ("resume",), ("pause",)]


def test_what_was_thawed_long_ago_is_forgotten_once_its_lease_is_over(site):
    server, connect, name = site
    for holder, lease in (("short", timedelta(seconds=2)), ("long", timedelta(hours=1))):
        pause(connect, databases=[name], holder=holder, lease=lease, drain_timeout=timedelta(seconds=1))
        core.resume(connect, databases=[name], holder=holder)
    server.execute("SELECT pg_sleep(2.1)")

    # The first was thawed less than 3 s before its lease was over, and longer ago than this.
    code, said = cli(server, "install", "--retain", "1s")

    assert (code, "Forgot 1 freeze(s) that were thawed more than 1.0 s ago; kept 1, because their lease" in said) == (
        0,
        True,
    ), said
    assert [one.holder for one in core.history(connect)] == ["long"]
    code, said = cli(server, "install", "--retain", "1s", "--json")
    assert json.loads(said) == {"installed": False, "granted": [], "forgotten": 0, "kept": {"leased": 1}}


@pytest.mark.parametrize(
    "words", [("install", "--retain", "90d"), ("install", "--grant", "o'brien", "--retain", "1d12h"), ("uninstall",)]
)
def test_who_is_not_the_owner_is_told_to_type_the_same_as_the_owner(site, words):
    server, connect, name = site
    frozen_once(connect, name)
    code, said = cli(server, *words, user="freezer")
    assert (code, said.rpartition(" and there ")[2]) == (3, f"pg-freeze {shlex.join(words)}\n"), said


def test_only_the_owner_forgets_and_never_the_future(site):
    server, connect, name = site
    frozen_once(connect, name)
    with pytest.raises(FreezeRefused, match="belongs to 'postgres'"):
        core.forget(connect, age=timedelta(days=90))
    with connect() as conn, pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("SELECT pgfreeze.forget('1 day')")
    for days in (0, -1):
        with pytest.raises(InvalidRequest):
            core.forget(server.control, age=timedelta(days=days))
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            server.execute(f"SELECT pgfreeze.forget('{days} days')")
    assert cli(server, "install", "--retain", "0d")[0] == 2
    code, said = cli(server, "install", "--retain", "90")
    assert (code, "90d" in said) == (2, True), said
    assert len(core.history(connect)) == 1


def test_where_there_is_no_journal_nothing_is_forgotten(own_server):
    assert core.forget(own_server.control, age=timedelta(days=90)) == core.Forgotten()
    assert schemas(own_server) == 0
