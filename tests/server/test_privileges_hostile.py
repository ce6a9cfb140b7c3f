"""The strategy privileges among people who take rights away meanwhile, or would like to have more of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg import sql

import pg_freeze as core
from devtools import asking
from devtools.pgserver import SUPERUSER, Server
from devtools.rights import FREEZER, create_application_database, keep_private
from pg_freeze import FreezeRefused, ThawFailed
from tests.server.clients import MEANINGS, SECONDS, dead_men, wait_until

# Before PostgreSQL 15 the freezing role of the other tests is a superuser, whom no right can be taken away.
pytestmark = pytest.mark.pg("!=15,!=16,!=17")
WRITE = "INSERT INTO things VALUES ('x')"


@dataclass
class Site:
    """A server with a database of the application's, and who freezes it, without a checkpoint."""

    server: Server
    database: str = "app"

    def inside(self, user: str, name: str | None = None) -> core.Control:
        return self.server.connect_factory(user, name or self.database)()

    def outside(self, user: str) -> core.Connect:
        return self.server.connect_factory(user)

    def pause(self, user: str = FREEZER, **options: Any) -> core.Freeze:
        given = {
            "databases": [self.database],
            "holder": "nightly",
            "drain_timeout": SECONDS[1],
            "strategy": "privileges",
        }
        wanted = {**given, "checkpoint": False, **options}
        return asking.pause(self.outside(user), connect_to=partial(self.inside, user), **wanted)

    def frozen(self, user: str = FREEZER, **options: Any) -> Any:
        given = {
            "databases": [self.database],
            "holder": "nightly",
            "drain_timeout": SECONDS[1],
            "strategy": "privileges",
        }
        return asking.frozen(
            self.outside(user), partial(self.inside, user), **{**given, "checkpoint": False, **options}
        )

    def resume(self, user: str = FREEZER, **options: Any) -> core.Resumed:
        given = {"databases": [self.database], "holder": "nightly"}
        return core.resume(self.outside(user), connect_to=partial(self.inside, user), **{**given, **options})

    def status(self, user: str = FREEZER) -> tuple[core.Freeze, ...]:
        return core.status(self.outside(user), connect_to=partial(self.inside, user)).freezes

    def guard(self, user: str = FREEZER) -> tuple[core.Freeze, ...]:
        return core.thaw_expired(self.outside(user), partial(self.inside, user))

    def can_write(self) -> bool:
        with self.inside("app") as conn, suppress(psycopg.errors.InsufficientPrivilege):
            conn.execute(WRITE)
            return True
        return False

    def says(self) -> list[Any]:
        return self.server.execute(MEANINGS, self.database)

    def marks(self) -> list[Any]:
        return self.server.execute("SELECT setconfig FROM pg_db_role_setting WHERE setrole <> 0", self.database)


@pytest.fixture
def site(server_factory: Callable[..., Server]) -> Site:
    server = server_factory()
    create_application_database(server, "app")
    keep_private(server, "app")
    if server.version < 15:
        server.execute("ALTER SCHEMA public OWNER TO app_owner", "app")
    server.execute("GRANT app TO freezer")
    site = Site(server)
    with site.inside("app") as conn:
        conn.execute("CREATE TABLE things (name text)")
    core.install(site.outside(FREEZER))
    core.install(partial(site.inside, FREEZER))
    return site


def test_a_thaw_that_may_give_nothing_back_is_no_thaw_and_is_finished_by_whoever_may(site):
    before = site.says()
    with (
        pytest.raises(ThawFailed, match=r"STILL FROZEN: 'app', in part.* ON TABLE public\.things to app"),
        site.frozen(),
    ):
        site.server.execute("REVOKE app FROM freezer")
    assert not site.can_write()
    assert [freeze.state for freeze in site.status()] == ["thawing"]
    assert site.marks()
    with pytest.raises(ThawFailed, match="STILL FROZEN"):
        site.resume()
    with pytest.raises(FreezeRefused, match="held by"):
        site.pause(holder="another")

    site.server.execute("GRANT app TO freezer")
    wait_until(site.can_write)  # the dead-man switch tries again
    wait_until(lambda: not site.status())
    assert site.says() == before
    assert site.marks() == []


def test_what_a_lease_could_not_give_back_at_its_end_is_given_back_by_a_superuser(site):
    before = site.says()
    site.pause(lease=SECONDS[2])
    site.server.execute("REVOKE app FROM freezer")
    wait_until(lambda: [one.state for one in site.status()] == ["thawing"])
    assert not site.can_write()

    with pytest.raises(FreezeRefused, match="log in as"):
        site.resume(SUPERUSER, holder="a DBA", force=True)
    site.server.execute("CALL pgfreeze.thaw('app')", "app")  # having looked
    assert site.can_write()
    assert site.says() == before
    wait_until(lambda: not dead_men(site.server, "app"))
    assert site.marks() == []


@pytest.fixture
def monitor(site: Site) -> str:
    """A role that may use the journals, and nothing else."""
    site.server.create_role("monitor")
    site.server.execute("GRANT pg_read_all_stats, pg_signal_backend TO monitor")
    # Who may act for monitor anyway can do nothing more to it by code that it runs.
    site.server.execute("GRANT monitor TO freezer")
    for connect in (site.outside(FREEZER), partial(site.inside, FREEZER)):
        core.install(connect, grant=["monitor"])
    return "monitor"


def test_a_role_with_the_journals_rights_only_cannot_leave_a_database_frozen_with_nobody_to_thaw_it(site, monitor):
    before = site.says()
    site.pause()
    with pytest.raises(ThawFailed, match="'monitor' may not give back"):
        site.resume(monitor, holder="somebody", force=True)
    wait_until(site.can_write)  # the dead-man switch is the freezer's
    wait_until(lambda: not site.status())
    assert site.says() == before


def test_nor_can_its_guard_after_a_crash(site, monitor):
    before = site.says()
    site.pause(lease=SECONDS[2])
    site.server.restart()
    with pytest.raises(ThawFailed, match="'monitor' may not give back"):
        wait_until(lambda: site.guard(monitor))

    (done,) = site.guard()
    assert (done.state, done.thawed_by) == ("thawed", "lease ended")
    assert site.says() == before
    assert site.marks() == []


def test_nobody_but_the_journals_owner_can_have_a_superuser_grant_him_something(site, monitor):
    site.pause()
    with (
        site.inside(monitor) as conn,
        pytest.raises(psycopg.errors.InsufficientPrivilege, match="only the owner of the journal"),
    ):
        conn.execute("UPDATE pgfreeze.revoked SET entries = '[]'")
    site.resume()
    with pytest.raises(FreezeRefused, match="the journal in 'app' is another role's: freeze as its owner"):
        site.pause(monitor)


@pytest.fixture
def evil(site: Site) -> Iterator[str]:
    """A role that owns a database, and has put a journal of its own there that would make it a superuser."""
    site.server.create_role("evil")
    site.server.create_database("a_trap", "evil")
    with site.inside("evil", "a_trap") as conn:
        conn.execute("CREATE SCHEMA pgfreeze")
        for name, arguments in (("locked", "s jsonb"), ("dead_men", ""), ("thaw_expired", "")):
            conn.execute(
                sql.SQL("CREATE FUNCTION pgfreeze.{}({}) RETURNS boolean LANGUAGE plpgsql AS {}").format(
                    sql.Identifier(name),
                    sql.SQL(arguments),
                    "BEGIN ALTER ROLE evil SUPERUSER; RETURN true; END",
                )
            )
        conn.execute("CREATE VIEW pgfreeze.freezes AS SELECT pgfreeze.locked(NULL) AS state")
        conn.execute("CREATE VIEW pgfreeze.tickets AS SELECT pgfreeze.locked(NULL) AS ticket")
        conn.execute("GRANT ALL ON SCHEMA pgfreeze TO PUBLIC")
        conn.execute("GRANT ALL ON ALL TABLES IN SCHEMA pgfreeze TO PUBLIC")
        conn.execute("ALTER ROLE evil IN DATABASE a_trap SET application_name = 'pg-freeze inside x'")
    yield "evil"
    assert site.server.execute("SELECT rolsuper FROM pg_roles WHERE rolname = 'evil'") == [(False,)]


def test_a_strangers_journal_is_not_run_and_keeps_nobody_from_his_own(site, evil):
    user = FREEZER
    freeze = site.pause(lease=SECONDS[2])
    site.server.restart()

    assert [one.token for one in site.status(user)] == [freeze.token]
    assert [one.token for one in wait_until(lambda: site.guard(user))] == [freeze.token]
    assert (
        core.resume(
            site.outside(user), databases=["a_trap"], holder="x", force=True, connect_to=partial(site.inside, user)
        ).thawed
        == ()
    )
    with (
        pytest.raises(FreezeRefused, match="belongs to role 'evil', whose code would run"),
        site.frozen(user, databases=["a_trap"]),
    ):
        pass


def test_a_freeze_that_revokes_nothing_leaves_no_mark(site):
    site.server.create_role("lonely")
    for _ in range(2):
        with site.frozen(roles=["lonely"]):
            assert site.marks()
        assert site.marks() == []
    assert asking.pause(
        site.outside(FREEZER), databases=["app"], holder="x", admit="readers", drain_timeout=SECONDS[1]
    ).holds
    site.resume(holder="x")


def test_a_mark_that_was_left_behind_is_taken_away_by_the_next_freeze(site):
    site.server.execute(
        "ALTER ROLE freezer IN DATABASE app SET application_name ="
        " 'pg-freeze inside 11111111-1111-1111-1111-111111111111 pg-freeze inside 22222222-2222-2222-2222-222222222222'"
    )
    with site.frozen():
        pass
    assert site.marks() == []


def test_psql_in_another_database_says_where_to_go(site):
    site.pause()
    for call in ("thaw_all()", "thaw('app')", "thaw_expired()"):
        said: list[str] = []
        with site.server.control() as conn:
            conn.add_notice_handler(lambda notice: said.append(notice.message_primary))  # noqa: B023
            conn.execute(f"CALL pgfreeze.{call}".encode())
        assert "connect to it, and there CALL pgfreeze.thaw('app')" in said[-1]
    assert not site.can_write()
    site.resume()


def test_an_idle_transaction_that_has_granted_does_not_hold_up_a_thaw_that_was_asked_for(site):
    site.pause()
    with site.inside("app") as idle:
        idle.execute("BEGIN")
        idle.execute("GRANT SELECT ON things TO PUBLIC")
        assert site.resume().thawed
        with pytest.raises(psycopg.OperationalError):
            idle.execute("COMMIT")
    assert site.can_write()


@pytest.mark.parametrize(
    "what",
    [
        "a superuser who comes and goes",
        "a function of a superuser's",
        "the owner, who grants it himself and revokes it again",
        "a large object",
        "a materialized view",
    ],
)
def test_without_the_wal_nothing_is_certified_that_could_not_be_seen(site, what):
    with site.server.control("app") as boss:
        boss.execute(
            "CREATE FUNCTION own() RETURNS void LANGUAGE sql SECURITY DEFINER AS $$INSERT INTO things VALUES ('x')$$"
        )
    with ExitStack() as stack:
        app = stack.enter_context(site.inside("app"))
        app.execute("CREATE MATERIALIZED VIEW m AS SELECT * FROM things")
        hold = stack.enter_context(site.frozen())
        if what == "a superuser who comes and goes":
            site.server.execute(WRITE, "app")
        elif what == "a function of a superuser's":
            app.execute("SELECT own()")
        elif what == "a large object":
            app.execute("SELECT lo_create(0)")
        elif what == "a materialized view":
            with suppress(psycopg.errors.InsufficientPrivilege):
                app.execute("REFRESH MATERIALIZED VIEW m")
        else:
            app.execute("GRANT INSERT ON things TO app")
            app.execute(WRITE)
            app.execute("REVOKE INSERT ON things FROM app")
    refreshed = what == "a materialized view" and site.server.version >= 17
    assert hold.attestation.level == ("quiesced" if refreshed else "crash-only"), hold.attestation.reasons


def test_locks_and_privileges_at_once_are_refused_in_either_order(site):
    site.server.execute(
        "GRANT pg_write_all_data TO freezer"
        if site.server.version < 17
        else "GRANT pg_maintain, pg_read_all_data TO freezer"
    )
    given = {"databases": ["app"], "drain_timeout": SECONDS[2], "checkpoint": False}
    locked = partial(asking.frozen, site.outside(FREEZER), partial(site.inside, FREEZER), strategy="lock", **given)
    with locked(holder="locker"), pytest.raises(FreezeRefused, match="has frozen it by locks"), site.frozen():
        pass
    with (
        site.frozen(),
        pytest.raises(FreezeRefused, match="frozen by the strategy privileges"),
        locked(holder="locker"),
    ):
        pass
    assert site.can_write()


def test_settings_and_privileges_that_come_at_once_do_not_both_stand(site):
    """Each begins without seeing the other: a transaction of the application's holds up the one that began first."""
    with site.inside("app") as granting:
        granting.execute("BEGIN")
        granting.execute("GRANT SELECT ON things TO PUBLIC")
        stood: list[core.Freeze] = []
        failed: list[core.FreezeError] = []

        def begin(pause: Callable[[], core.Freeze]) -> None:
            try:
                stood.append(pause())
            except core.FreezeError as error:
                failed.append(error)

        settings = {"databases": ["app"], "holder": "settings", "admit": "nobody", "checkpoint": False}
        both = [
            threading.Thread(target=begin, args=(site.pause,)),
            threading.Thread(
                target=begin,
                args=(partial(asking.pause, site.outside(FREEZER), drain_timeout=SECONDS[3], **settings),),
            ),
        ]
        both[0].start()
        wait_until(
            lambda: site.server.execute(
                "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = 'app'"
            )
        )
        both[1].start()
        wait_until(
            lambda: site.server.execute(
                "SELECT 1 FROM pg_db_role_setting WHERE setrole = 0 AND setconfig::text LIKE '%read_only=on%'"
            )
        )
        with suppress(psycopg.OperationalError):  # it may have been ended
            granting.execute("ROLLBACK")
        for thread in both:
            thread.join(60)
    assert len(stood) <= 1, stood
    assert failed
    site.resume()
    site.resume(holder="settings")
    wait_until(site.can_write, within=30)


def test_a_refusal_names_the_grantor_on_whom_the_others_rest(site):
    site.server.create_role("reporting")
    site.server.create_role("owner2", "NOLOGIN")
    site.server.execute("ALTER TABLE things OWNER TO owner2; GRANT INSERT ON things TO app WITH GRANT OPTION", "app")
    site.server.execute("REVOKE app FROM freezer; GRANT owner2 TO freezer")
    with site.inside("app") as conn:
        conn.execute("GRANT INSERT ON things TO reporting")
    with (
        pytest.raises(FreezeRefused, match="from reporting, which app has granted: GRANT app TO freezer;"),
        site.frozen(),
    ):
        pass
    site.server.execute("GRANT app TO freezer")
    with site.frozen():
        assert not site.can_write()
    assert site.can_write()


def test_odd_names_in_a_refusal_can_be_typed(site):
    odd = 'we; rd" %s ünïcode'
    create_application_database(site.server, odd)
    site.server.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(sql.Identifier(odd)))
    site.server.execute("REVOKE app_owner FROM freezer")
    with pytest.raises(FreezeRefused) as refused, site.frozen(databases=[odd]):
        pass
    site.server.execute(str(refused.value).partition("→ ")[2].encode().decode())
    with site.inside(FREEZER, odd) as conn:
        assert conn.info.dbname == odd


@pytest.mark.every_version
@pytest.mark.parametrize("renamed", ["table", "schema"])
def test_names_that_are_exchanged_while_a_thaw_waits_give_nobody_what_he_had_not(site, renamed):
    site.server.execute("CREATE ROLE clerk")
    site.server.execute("GRANT CREATE ON DATABASE app TO app")
    with site.inside("app") as conn:
        for place in ("one", "other"):
            conn.execute(f"CREATE SCHEMA {place}; CREATE TABLE {place}.things (name text)")
        conn.execute("GRANT INSERT ON things TO clerk; GRANT UPDATE (name) ON one.things TO clerk")
        ((one, other),) = conn.execute("SELECT 'one.things'::regclass::oid, 'other.things'::regclass::oid")
    site.server.execute("REVOKE CREATE ON DATABASE app FROM app")
    site.pause(roles=["clerk"])
    site.server.execute("GRANT CREATE ON DATABASE app TO app")
    with site.inside("app") as holder, site.inside("app") as owner, ExitStack() as stack:
        owner.execute("CREATE SCHEMA third")
        holder.execute("BEGIN; GRANT SELECT ON public.things TO clerk")
        thread = threading.Thread(target=site.resume)
        thread.start()
        stack.callback(thread.join)
        blocked = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND pg_blocking_pids(pid) <> '{}'"
        wait_until(lambda: len(site.server.execute(blocked, site.database)) > 0)
        for old, new in (("one", "third"), ("other", "one"), ("third", "other")):
            if renamed == "table":
                owner.execute(f"ALTER TABLE {old}.things SET SCHEMA {new}")
            else:
                owner.execute(f"DROP SCHEMA IF EXISTS {new}; ALTER SCHEMA {old} RENAME TO {new}")
        with suppress(psycopg.OperationalError):  # ended, if all that took two seconds
            holder.execute("ROLLBACK")

    may = "SELECT has_column_privilege('clerk', %s::oid, 'name', 'UPDATE')"
    with site.inside("app") as conn:
        assert [conn.execute(may, (oid,)).fetchone() for oid in (one, other)] == [(True,), (False,)]
    assert site.status() == ()


@pytest.fixture
def mallory(site) -> Site:
    """A role that owns one schema of the database, with a table; and a freeze that revokes hers and everybody's."""
    site.server.create_role("mallory")
    site.server.execute("GRANT CREATE, CONNECT ON DATABASE app TO mallory; GRANT mallory TO freezer")
    with site.inside("mallory") as conn:
        conn.execute("CREATE SCHEMA hers; CREATE TABLE hers.t (); GRANT INSERT ON hers.t TO app")
    return site


def test_an_owner_who_renames_his_table_all_the_time_keeps_nothing_frozen(mallory):
    site = mallory
    site.pause(lease=SECONDS[4])
    stop = threading.Event()

    def rename() -> None:
        with site.inside("mallory") as conn:
            conn.execute("GRANT CREATE ON SCHEMA hers TO mallory")
            while not stop.is_set():
                conn.execute("ALTER TABLE hers.t RENAME TO u; ALTER TABLE hers.u RENAME TO t")
                conn.execute("ALTER TABLE hers.t RENAME TO v")
                conn.execute("ALTER TABLE hers.v RENAME TO t")

    thread = threading.Thread(target=rename)
    thread.start()
    try:
        wait_until(site.can_write)
        wait_until(lambda: site.status() == ())
    finally:
        stop.set()
        thread.join()


# How many entries fill an ACL depends on the version.
@pytest.mark.pg("==18")
def test_an_object_whose_acl_is_full_keeps_no_other_closed_and_is_named(mallory):
    site = mallory
    site.pause()
    site.server.execute("DO $$BEGIN FOR i IN 1..2500 LOOP EXECUTE 'CREATE ROLE r' || i; END LOOP; END$$")
    with site.inside("mallory") as conn:
        conn.execute(
            "DO $$BEGIN FOR i IN 1..2500 LOOP BEGIN EXECUTE 'GRANT SELECT, REFERENCES, TRIGGER ON hers.t TO r' || i; "
            "EXCEPTION WHEN program_limit_exceeded THEN EXIT; END; END LOOP; END$$"
        )

    site.server.execute("UPDATE pgfreeze.freezes SET lease_until = clock_timestamp()", "app")

    wait_until(site.can_write)  # into the application's own table

    def named() -> bool:
        return any("hers.t" in one["why"] for freeze in site.status() for one in freeze.left_over)

    wait_until(named)
    site.server.execute("DROP TABLE hers.t", "app")
    wait_until(lambda: site.status() == ())


POSING = """
    SELECT application_name FROM pg_stat_activity
     WHERE usename = 'writer' AND state = 'active' AND query LIKE 'CALL pgfreeze.dead_man(%'"""


def test_who_only_writes_to_every_table_is_no_dead_man_switch(site):
    freeze = site.pause()
    site.server.create_role("writer")
    site.server.execute("GRANT pg_write_all_data, pg_read_all_data TO writer; GRANT CONNECT ON DATABASE app TO writer")
    (switch,) = dead_men(site.server)
    site.server.execute(f"SELECT pg_terminate_backend({switch})")
    name = f"pg-freeze dead-man {freeze.token}"
    poser = psycopg.pq.PGconn.connect(site.server.dsn("app", "writer", application_name=name).encode())
    try:
        # It fails, but as long as nothing more is sent the session looks as if it were at work on this.
        poser.enter_pipeline_mode()
        poser.send_prepare(b"", b"CALL pgfreeze.dead_man(1, 2)")
        poser.send_flush_request()
        poser.flush()
        wait_until(lambda: [(name,)] == site.server.execute(POSING))
        assert [one.dead_man_pid for one in site.status()] == [None]
    finally:
        poser.finish()
    site.resume()
