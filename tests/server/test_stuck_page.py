"""Every command of docs/stuck.md is run here, in the situation that the page describes."""

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

import pg_freeze as core
from devtools import asking
from devtools.binaries import CHECKOUT
from devtools.pgserver import Server, client
from devtools.rights import create_application_database, create_roles
from tests.server.clients import alter, is_alive, settings_of, wait_until

# What the page says does not depend on the version; the oldest and the newest are enough.
pytestmark = pytest.mark.pg("!=15,!=16,!=17")
_numbers = itertools.count(1)


class Block(NamedTuple):
    """A fenced block of the page."""

    section: str
    language: str
    text: str


def page() -> list[Block]:
    blocks, section = [], "now"
    for heading, language, text in re.findall(
        r"^## ([^\n]+)$|^```(\w+)\n(.*?)^```$", (CHECKOUT / "docs/stuck.md").read_text(), re.MULTILINE | re.DOTALL
    ):
        section = heading or section
        if language:
            blocks.append(Block(section, language, text))
    return blocks


PAGE = page()


def commands(section: str) -> list[Block]:
    found = [block for block in PAGE if block.section == section]
    assert found, section
    return found


@dataclass
class Site:
    """A server with the database of the page, which has prior settings of its own; *reader* connected while frozen."""

    server: Server
    prior: tuple[Any, ...]
    reader: psycopg.Connection[Any] | None = None

    def begin(self, block: Block, database: str = "postgres") -> subprocess.Popen[str]:
        """Start what the page says: SQL in psql in *database*, as a superuser, the rest in a shell."""
        psql = client("psql", self.server.version)
        command = ["bash", "-euc", block.text]
        if block.language == "sql":
            command = [str(psql), "-X", "-d", database, "-v", "ON_ERROR_STOP=1", "-f", "-"]
        programs = [str(psql.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
        where = {"PGHOST": str(self.server.socket_dir), "PGPORT": str(self.server.port), "PGUSER": "postgres"}
        process = subprocess.Popen(
            command,
            env={**os.environ, **where, "PATH": os.pathsep.join(programs)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdin is not None
        process.stdin.write(block.text if block.language == "sql" else "")
        process.stdin.close()
        process.stdin = None
        return process

    def end(self, process: subprocess.Popen[str]) -> str:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
        return said

    def type(self, block: Block) -> str:
        return self.end(self.begin(block))

    def freeze(self, holder: str = "nightly/2026-01-01", lease: float = 900, **options: Any) -> core.Freeze:
        freeze = asking.pause(
            self.server.connect_factory(),
            databases=["gitlabhq"],
            holder=holder,
            lease=timedelta(seconds=lease),
            drain_timeout=timedelta(seconds=min(lease / 2, 20)),
            **options,
        )
        if freeze.admit is not core.Admit.NOBODY:
            self.reader = self.server.connect_factory("app", "gitlabhq")()
        return freeze

    def works_as_before(self) -> bool:
        """The settings are those from before, and nobody is left who cannot write."""
        with self.server.connect_factory("app", "gitlabhq")() as conn:
            conn.execute("INSERT INTO t VALUES (1)")
        assert settings_of(self.server) == self.prior
        return self.reader is None or not is_alive(self.reader)


@pytest.fixture(scope="module")
def page_server(pg_version) -> Iterator[Server]:
    with Server(pg_version, hba=["local replication postgres trust"]) as server:
        create_roles(server)
        yield server


@pytest.fixture
def site(page_server) -> Iterator[Site]:
    server = page_server
    create_application_database(server, "gitlabhq")
    with server.connect_factory("app", "gitlabhq")() as conn:
        conn.execute("CREATE TABLE t (i int)")
    alter(server, "ALTER DATABASE {} SET work_mem = '5MB'", "gitlabhq")
    alter(server, "ALTER ROLE freezer IN DATABASE {} SET default_transaction_read_only = off", "gitlabhq")
    core.install(server.control, grant=["freezer"])
    try:
        yield Site(server, settings_of(server))
    finally:
        with server.control() as conn:
            conn.execute("SET default_transaction_read_only = off")
            conn.execute("ALTER ROLE postgres RESET ALL")
            conn.execute("ALTER ROLE app RESET ALL")
        server.execute("DROP SCHEMA IF EXISTS pgfreeze CASCADE")
        server.drop_database("gitlabhq")


@pytest.mark.parametrize("admit", core.Admit)
@pytest.mark.parametrize("block", commands("now"), ids=lambda block: block.text.strip().splitlines()[0])
def test_what_to_type_right_now_thaws_at_once(site, block, admit):
    site.freeze(admit=admit)

    site.type(block)

    assert site.works_as_before()


@pytest.mark.parametrize("block", commands("now"), ids=lambda block: block.text.strip().splitlines()[0])
def test_it_does_nothing_where_nothing_is_frozen(site, block):
    site.type(block)

    assert site.works_as_before()


def test_who_did_this_is_shown_by_either_command(site):
    status, query, *_ = commands("Who did this, and until when")
    site.freeze()

    for shown in (site.type(status), site.type(query)):
        assert "nightly/2026-01-01" in shown
        assert "gitlabhq" in shown


@pytest.mark.parametrize("which", [2, 3])
def test_what_is_overdue_is_thawed_and_nothing_else(site, which):
    create_application_database(site.server, "other")
    section = commands("Who did this, and until when")
    assert len(section) == 4
    freeze = site.freeze(lease=2)
    site.server.execute(f"SELECT pg_terminate_backend({freeze.dead_man_pid})")
    asking.pause(site.server.connect_factory(), databases=["other"], holder="somebody else")
    wait_until(lambda: site.server.execute("SELECT true FROM pgfreeze.freezes WHERE lease_until < now()"))
    assert "| t" in site.type(section[1])

    site.type(section[which])

    assert [one.holder for one in core.status(site.server.connect_factory()).freezes] == ["somebody else"]
    core.resume(site.server.connect_factory(), databases=["other"], holder="somebody else")
    site.server.drop_database("other")
    assert site.works_as_before()


def test_a_thaw_that_hangs_is_let_go_on(site):
    show, end = commands("The thaw hangs")
    site.freeze()
    forgotten = site.server.control()
    forgotten.execute("BEGIN")
    forgotten.execute("UPDATE pgfreeze.freezes SET holder = holder")
    thaw = site.begin(commands("now")[0])
    time.sleep(1)
    assert thaw.poll() is None
    assert str(forgotten.info.backend_pid) in site.type(show)
    assert thaw.poll() is None

    site.type(end)

    site.end(thaw)
    assert not is_alive(forgotten)
    assert site.works_as_before()


def test_what_was_left_over_is_restored_by_a_superuser(site):
    (thaw,) = commands("It says `still frozen`, or `left over`")
    site.freeze()
    alter(site.server, "ALTER DATABASE {} OWNER TO postgres", "gitlabhq")
    with pytest.raises(core.ThawFailed, match="gitlabhq"):
        core.resume(site.server.connect_factory(), databases=["gitlabhq"], holder="nightly/2026-01-01")

    site.type(thaw)

    alter(site.server, "ALTER DATABASE {} OWNER TO app_owner", "gitlabhq")
    assert site.works_as_before()


def test_a_superusers_session_that_stayed_read_only_is_ended_and_other_settings_are_shown(site):
    end, show = commands("It is thawed, and somebody still cannot write")
    site.freeze()
    held_on = site.server.control("gitlabhq")
    core.resume(site.server.connect_factory(), databases=["gitlabhq"], holder="nightly/2026-01-01")
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        held_on.execute("INSERT INTO t VALUES (1)")

    site.type(end)

    wait_until(lambda: not is_alive(held_on))
    assert site.works_as_before()
    site.server.execute("ALTER ROLE app SET default_transaction_read_only = on")
    shown = site.type(show)
    assert re.search(r"\(every database\) +\| app +\| default_transaction_read_only=on", shown)


@pytest.mark.parametrize("thaw", commands("A server that was restored from a snapshot"), ids=["psql", "pg-freeze"])
def test_a_server_restored_from_a_snapshot_wakes_up_frozen_and_is_thawed(site, thaw):
    site.freeze()
    with copy_of(site.server) as copy:
        restored = Site(copy, site.prior)
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            restored.works_as_before()

        restored.type(thaw)

        assert restored.works_as_before()
    assert core.status(site.server.connect_factory()).freezes


@contextmanager
def copy_of(server: Server) -> Iterator[Server]:
    where = server.directory / f"copy_{next(_numbers)}"
    basebackup = [str(client("pg_basebackup", server.version)), "-D", str(where), "--checkpoint=fast", "--no-sync"]
    address = ["-h", str(server.socket_dir), "-p", str(server.port), "-U", "postgres"]
    subprocess.run([*basebackup, *address], check=True, timeout=100)
    owner = server.data.stat()
    subprocess.run(["chown", "-R", f"{owner.st_uid}:{owner.st_gid}", str(where)], check=True)
    with Server(server.version, data=where) as copy:
        yield copy


@pytest.mark.parametrize("admit", core.Admit)
@pytest.mark.parametrize("draining", [False, True], ids=["frozen", "closed"])
def test_without_the_journal_the_database_is_opened_by_hand(site, admit, draining):
    look, *steps = commands("The journal is gone")
    site.freeze(admit=admit)
    site.server.execute("DROP SCHEMA pgfreeze CASCADE")
    if draining:
        site.server.execute("ALTER DATABASE gitlabhq ALLOW_CONNECTIONS false")
    # The role that psql runs as may be read-only by default, too.
    site.server.execute("ALTER ROLE postgres SET default_transaction_read_only = on")
    assert "gitlabhq" in site.type(look)

    # One after the other in one psql, as a person would.
    site.type(Block("", "sql", "\n".join(step.text for step in steps)))

    with site.server.connect_factory("app", "gitlabhq")() as conn:
        conn.execute("INSERT INTO t VALUES (1)")
    assert site.reader is None or not is_alive(site.reader)
    assert "gitlabhq" not in site.type(look).replace("work_mem", "")


def test_the_mark_of_a_freeze_by_privileges_whose_journal_is_gone_is_taken_away(site):
    (sweep,) = commands("Privileges are revoked, and the journal is gone")
    asking.pause(
        site.server.connect_factory(),
        connect_to=lambda name: site.server.connect_factory("postgres", name)(),
        databases=["gitlabhq"],
        holder="nightly/2026-01-01",
        strategy="privileges",
    )
    site.server.execute("DROP SCHEMA pgfreeze CASCADE", "gitlabhq")
    with pytest.raises(core.FreezeRefused, match="frozen by the strategy privileges"):
        site.freeze()

    site.type(sweep)

    site.server.execute("GRANT INSERT ON t TO app; GRANT CREATE ON SCHEMA public TO app", "gitlabhq")
    assert site.works_as_before()
    site.freeze()


def test_the_query_for_the_owner_names_whoever_could_change_what_a_superuser_runs(site):
    (query,) = commands("Whose code is that")
    assert "(0 rows)" in site.type(query)

    for what in ("FUNCTION pgfreeze.inside(text[])", "TABLE pgfreeze.freezes", "SCHEMA pgfreeze"):
        for owner in ("freezer", "pg_database_owner"):
            site.server.execute(f"ALTER {what} OWNER TO {owner}")
            assert owner in site.type(query), what
        site.server.execute(f"ALTER {what} OWNER TO postgres")
    for how in (
        "ALTER TABLE pgfreeze.freezes ADD CONSTRAINT c CHECK (public.f() = 1)",
        "CREATE TRIGGER t BEFORE UPDATE ON pgfreeze.freezes EXECUTE FUNCTION public.g()",
    ):
        site.server.execute("CREATE FUNCTION public.f() RETURNS int LANGUAGE sql AS 'SELECT 1'")
        site.server.execute("CREATE FUNCTION public.g() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
        site.server.execute("ALTER FUNCTION public.f() OWNER TO freezer; ALTER FUNCTION public.g() OWNER TO freezer")
        site.server.execute(how)
        assert "freezer" in site.type(query), how
        site.server.execute("DROP FUNCTION public.f() CASCADE; DROP FUNCTION public.g() CASCADE")
    assert "(0 rows)" in site.type(query)


# What the owner of a database can put before pg_catalog: each name of a relation that a page uses, and operators.
_PLANTED = """
    CREATE SCHEMA evil;
    CREATE TABLE evil.came (who name);
    GRANT USAGE ON SCHEMA evil TO PUBLIC;
    GRANT INSERT ON evil.came TO PUBLIC;
    CREATE FUNCTION evil.trap() RETURNS boolean LANGUAGE plpgsql COST 0.0001 AS
        'BEGIN INSERT INTO evil.came VALUES (session_user); RETURN true; END';
    CREATE FUNCTION evil.same(oid, oid) RETURNS boolean LANGUAGE sql AS 'SELECT evil.trap()';
    CREATE FUNCTION evil.same(name, name) RETURNS boolean LANGUAGE sql AS 'SELECT evil.trap()';
    CREATE OPERATOR evil.= (LEFTARG = oid, RIGHTARG = oid, FUNCTION = evil.same);
    CREATE OPERATOR evil.= (LEFTARG = name, RIGHTARG = name, FUNCTION = evil.same);
    ALTER DATABASE gitlabhq SET search_path = evil, pg_catalog, public"""


def test_no_query_of_any_page_runs_what_the_owner_of_a_database_has_put_there(own_server):
    create_application_database(own_server, "gitlabhq")
    core.install(own_server.connect_factory("postgres", "gitlabhq"))
    pages = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
    blocks = [
        Block(file.name, "sql", text)
        for file in pages
        for text in re.findall(r"^```sql[^\n]*\n(.*?)^```$", file.read_text(), re.MULTILINE | re.DOTALL)
    ]
    own_server.execute(_PLANTED, "gitlabhq")
    names = {name for block in blocks for name in re.findall(r"\bpg_[a-z_]+", block.text)}
    relations = own_server.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind IN ('r', 'v')"
    )
    for name in names & {name for (name,) in relations}:
        own_server.execute(
            f"CREATE VIEW evil.{name} AS SELECT * FROM pg_catalog.{name} WHERE evil.trap()".encode(), "gitlabhq"
        )
    site = Site(own_server, ())

    said = [site.begin(block, "gitlabhq").communicate(timeout=60)[0] for block in blocks]

    assert len(blocks) > 20
    assert own_server.execute("SELECT * FROM evil.came", "gitlabhq") == [], said


def test_every_command_of_the_page_belongs_to_a_section_that_is_tested():
    tested = {
        "now": 4,
        "Whose code is that": 1,
        "Who did this, and until when": 4,
        "The thaw hangs": 2,
        "It says `still frozen`, or `left over`": 1,
        "The journal is gone": 4,
    }
    tested |= {"It is thawed, and somebody still cannot write": 2, "A server that was restored from a snapshot": 2}
    tested |= {"Privileges are revoked, and the journal is gone": 1}
    found = {block.section: 0 for block in PAGE}
    for block in PAGE:
        assert block.language in ("sql", "sh"), block
        found[block.section] += 1
    assert found == tested
