"""The strategy privileges: the rights to write are revoked, at once, and come back exactly as they were."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Final, LiteralString

import psycopg
import pytest
from psycopg import sql

import pg_freeze as core
from devtools import asking
from devtools.pgserver import SUPERUSER, Server
from devtools.rights import checkpointer, create_application_database, keep_private
from pg_freeze import ConnectTo, DrainTimeout, FreezeRefused, InvalidRequest
from tests.server.clients import MEANINGS, SECONDS, dead_men, wait_until

pytestmark = pytest.mark.every_version

#: Every ACL of the application's objects, in its own words.
ACLS: Final[LiteralString] = """
    SELECT n.nspname || '.' || c.relname, c.relacl::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pgfreeze') AND n.nspname !~ '^pg_toast'
     UNION ALL
    SELECT a.attrelid::regclass || '.' || a.attname, a.attacl::text FROM pg_attribute a WHERE a.attacl IS NOT NULL
       AND a.attrelid >= 16384
     UNION ALL SELECT 'schema ' || nspname, nspacl::text FROM pg_namespace WHERE nspname !~ '^(pg_|pgfreeze)'
     UNION ALL SELECT 'large object ' || oid, lomacl::text FROM pg_largeobject_metadata
     ORDER BY 1"""
WRITES: Final[tuple[LiteralString, ...]] = (
    "INSERT INTO things (name) VALUES ('x')",
    "UPDATE things SET name = 'x'",
    "DELETE FROM things",
    "TRUNCATE things",
    "SELECT nextval('things_id_seq')",
    "SELECT setval('things_id_seq', 100)",
    "CREATE TABLE more (i int)",
    "INSERT INTO parted VALUES (1)",
    "INSERT INTO parted_1 VALUES (1)",
    "INSERT INTO seen (name) VALUES ('x')",
    "SELECT lo_put((SELECT min(oid) FROM pg_largeobject_metadata), 0, 'x')",
    "COPY things (name) FROM PROGRAM 'echo x'",
)


@pytest.fixture
def connect(server: Server) -> core.Connect:
    return server.connect_factory(checkpointer(server.version))


@pytest.fixture
def inside(server: Server) -> Iterator[ConnectTo]:
    """Connects into a database as a role that may act for the owner of the application's tables."""
    server.execute("GRANT app TO freezer")
    yield lambda name: server.connect_factory(checkpointer(server.version), name)()
    server.execute("REVOKE app FROM freezer")


@pytest.fixture
def app(
    server: Server, app_connect: Callable[..., psycopg.Connection[Any]], app_database: str
) -> psycopg.Connection[Any]:
    keep_private(server, app_database)
    conn = app_connect(app_database)
    conn.execute("CREATE TABLE things (id serial PRIMARY KEY, name text)")
    conn.execute("CREATE TABLE parted (i int) PARTITION BY RANGE (i)")
    conn.execute("CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10)")
    conn.execute("CREATE VIEW seen AS SELECT * FROM things")
    conn.execute("SELECT lo_from_bytea(0, 'large')")
    conn.execute("INSERT INTO things (name) VALUES ('there')")
    return conn


@pytest.fixture
def freeze(connect: core.Connect, inside: ConnectTo, app_database: str) -> Callable[..., Any]:
    def frozen(**options: Any) -> Any:
        given = {
            "databases": [app_database],
            "holder": "test",
            "strategy": "privileges",
            "drain_timeout": timedelta(seconds=10),
        }
        return asking.frozen(connect, inside, **{**given, **options})

    return frozen


def refused(conn: psycopg.Connection[Any], statement: LiteralString) -> bool:
    try:
        conn.execute(statement)
    except psycopg.errors.InsufficientPrivilege:
        return True
    return False


def meanings(server: Server, database: str) -> list[Any]:
    return server.execute(MEANINGS, database)


def test_open_sessions_cannot_write_from_their_next_statement_on_and_read_on(app, app_connect, app_database, freeze):
    cached = app_connect(app_database)
    for _ in range(7):  # a plan of the server's own by then
        cached.execute("INSERT INTO things (name) VALUES (%s)", ["cached"], prepare=True)
    begun = app_connect(app_database)
    begun.execute("BEGIN")
    begun.execute("SELECT count(*) FROM things")

    with freeze() as hold:
        assert [one for one in WRITES[:-1] if not refused(app, one)] == []
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            cached.execute("INSERT INTO things (name) VALUES (%s)", ["cached"], prepare=True)
        assert refused(begun, WRITES[0]), "a transaction that was open, and had only read"
        assert app.execute("SELECT count(*) FROM things").fetchone() == (8,)
        assert hold.freeze.strategy == "privileges"
        assert hold.freeze.checkpoint_lsn

    assert [one for one in WRITES[:-1] if refused(app, one)] == []
    cached.execute("INSERT INTO things (name) VALUES (%s)", ["cached"], prepare=True)
    assert hold.attestation.level == "quiesced", hold.attestation.reasons


def test_a_transaction_that_has_written_is_waited_for(app, app_connect, app_database, freeze):
    writer = app_connect(app_database)
    writer.execute("BEGIN")
    writer.execute(WRITES[0])
    done: list[float] = []

    def go_on() -> None:
        writer.execute("COMMIT")
        done.append(time.monotonic())

    threading.Timer(1.5, go_on).start()
    with freeze():
        frozen_at = time.monotonic()
        assert done
        assert done[0] <= frozen_at
        assert app.execute("SELECT count(*) FROM things").fetchone() == (2,)
        assert refused(writer, WRITES[0])


@pytest.mark.parametrize("on_drain_timeout", ["abort", "terminate"])
def test_at_the_drain_timeout_it_is_ended_or_everything_is_undone(
    server, app, app_connect, app_database, freeze, on_drain_timeout
):
    before = server.execute(ACLS, app_database)
    writer = app_connect(app_database)
    writer.execute("BEGIN")
    writer.execute(WRITES[0])
    options = {"drain_timeout": timedelta(seconds=1), "on_drain_timeout": on_drain_timeout}
    if on_drain_timeout == "abort":
        with pytest.raises(DrainTimeout, match=str(writer.info.backend_pid)), freeze(**options):
            pass
        writer.execute("COMMIT")
    else:
        with freeze(**options) as hold:
            assert hold.freeze.terminated == {"drain-timeout": 1}
            with pytest.raises(psycopg.OperationalError):
                writer.execute("COMMIT")
    app.execute(WRITES[0])
    if server.version < 15:  # the superuser's thaw
        assert server.execute(ACLS, app_database) == before


def test_a_reader_of_an_old_transaction_is_not_waited_for(app, app_connect, app_database, freeze):
    reader = app_connect(app_database)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM things")
    with freeze() as hold:
        assert hold.freeze.drained_at - hold.freeze.barrier_at < timedelta(seconds=5)
        assert hold.freeze.terminated == {}
    reader.execute("COMMIT")


def grants(server: Server, database: str) -> None:
    """Grant of every kind, as an application may have gathered them over the years."""
    with server.control(database) as conn:
        for name in ("one", "two", "three"):
            conn.execute(sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(sql.Identifier(name)))
        conn.execute("SET SESSION AUTHORIZATION app")
        conn.execute("GRANT INSERT, SELECT ON things TO one WITH GRANT OPTION")
        conn.execute("GRANT UPDATE (name), INSERT (id, name), SELECT (id) ON things TO two WITH GRANT OPTION")
        conn.execute("GRANT UPDATE ON things TO PUBLIC")
        conn.execute("GRANT USAGE ON SEQUENCE things_id_seq TO one WITH GRANT OPTION")
        conn.execute("GRANT ALL ON parted TO three")
        conn.execute("REVOKE TRUNCATE ON parted FROM app")
        conn.execute("SET SESSION AUTHORIZATION one")
        conn.execute("GRANT INSERT ON things TO two WITH GRANT OPTION")
        conn.execute("GRANT USAGE ON SEQUENCE things_id_seq TO PUBLIC")
        conn.execute("SET SESSION AUTHORIZATION two")
        conn.execute("GRANT INSERT ON things TO three")
        conn.execute("GRANT UPDATE (name) ON things TO three, one")
        conn.execute("RESET SESSION AUTHORIZATION")
        conn.execute("GRANT CREATE ON SCHEMA public TO three WITH GRANT OPTION")


@pytest.fixture
def place(server_factory: Callable[..., Server]) -> Server:
    """A server of one's own: its roles own, and have granted, all sorts of things."""
    server = server_factory()
    create_application_database(server, "app")
    keep_private(server, "app")
    with server.connect_factory("app", "app")() as conn:
        conn.execute("CREATE TABLE things (id serial PRIMARY KEY, name text)")
        conn.execute("CREATE TABLE parted (i int) PARTITION BY RANGE (i)")
        conn.execute("CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10)")
        conn.execute("CREATE VIEW seen AS SELECT * FROM things")
        conn.execute("SELECT lo_from_bytea(0, 'large')")
        conn.execute("CREATE TABLE untouched (i int)")
    for name in ("one", "two", "three"):
        server.create_role(name)
    grants(server, "app")
    return server


def hold_on(server: Server, user: str, **options: Any) -> Any:
    return asking.frozen(
        server.connect_factory(user),
        lambda name: server.connect_factory(user, name)(),
        **{"databases": ["app"], "holder": "test", "strategy": "privileges", "checkpoint": False, **options},
    )


def test_a_superuser_gives_back_every_acl_in_its_own_words(place):
    before = place.execute(ACLS, "app")
    assert any(acl is None for _, acl in before)

    with hold_on(place, SUPERUSER):
        during = dict(place.execute(ACLS, "app"))
        assert during["public.untouched"] is not None
        for name, acl in during.items():
            assert all(
                not set("awdDU" if "seq" not in name else "wU") & set(one.split("=")[1].split("/")[0])
                or one.startswith("postgres=")
                or name.startswith("schema")
                for one in (acl or "{}").strip("{}").split(",")
                if one
            ), (name, acl)

    assert place.execute(ACLS, "app") == before


def test_the_owners_member_gives_back_what_every_acl_says_in_the_name_of_whoever_granted_it(place):
    place.execute("GRANT app, one, two TO freezer")
    if place.version < 15:
        place.execute("ALTER SCHEMA public OWNER TO app_owner", "app")
    with place.connect_factory("freezer", "app")() as conn:
        core.install(lambda: conn)
    before = meanings(place, "app")

    with hold_on(place, "freezer"):
        assert meanings(place, "app") != before
        with place.connect_factory("three", "app")() as three:
            assert refused(three, "INSERT INTO things (id) VALUES (1)")

    assert meanings(place, "app") == before
    with place.connect_factory("three", "app")() as three:
        three.execute("INSERT INTO things (id) VALUES (1)")


@pytest.mark.parametrize("user", [SUPERUSER, "freezer"])
def test_random_grants_come_back_whoever_is_chosen(place, user):
    """Grants of random privileges by random grantors, some of which lean on others; random roles lose theirs.

    Who acts for several grantors has to revoke and grant in the name of the right one.
    """
    if user != SUPERUSER:
        place.execute("GRANT app, one, two, three TO freezer")
        if place.version < 15:
            place.execute("ALTER SCHEMA public OWNER TO app_owner", "app")
    core.install(place.connect_factory(user, "app"))
    look = ACLS if user == SUPERUSER else MEANINGS
    chance = random.Random(7)
    roles = ["app", "one", "two", "three"]
    frozen = 0
    for _ in range(40):
        with place.control("app") as conn:
            for _ in range(6):
                conn.execute(sql.SQL("SET SESSION AUTHORIZATION {}").format(sql.Identifier(chance.choice(roles))))
                what = chance.choice(["INSERT", "UPDATE", "DELETE", "INSERT (id)", "UPDATE (name)", "TRUNCATE"])
                to = chance.choice([*roles[1:], "public"])
                grantable = " WITH GRANT OPTION" if to != "public" and chance.random() < 0.6 else ""
                try:
                    conn.execute(f"GRANT {what} ON things TO {to}{grantable}".encode())
                except (psycopg.errors.InsufficientPrivilege, psycopg.errors.InvalidGrantOperation):
                    continue
        before = place.execute(look, "app")
        chosen = chance.sample([*roles, "public"], chance.randint(1, 5))
        with suppress(FreezeRefused), hold_on(place, user, roles=chosen):  # a way around may be left
            frozen += 1
        assert place.execute(look, "app") == before
    assert frozen > 3


def test_only_the_chosen_roles_are_stopped(server, app, app_connect, app_database, freeze):
    server.create_role("batch")
    server.execute("GRANT INSERT ON things TO batch; GRANT USAGE ON SEQUENCE things_id_seq TO batch", app_database)
    batch = app_connect(app_database, user="batch")
    try:
        with freeze(roles=["app"]) as hold:
            assert refused(app, WRITES[0])
            batch.execute(WRITES[0])
        assert hold.attestation.level == "crash-only", "others could write"
        assert hold.freeze.roles == ("app",)
    finally:
        batch.close()
        server.execute("DROP OWNED BY batch", app_database)
        server.execute("DROP ROLE batch")


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["nobody at all"], "there is no role 'nobody at all'"),
        (["postgres"], "no privilege stops a superuser: 'postgres'"),
    ],
)
def test_a_role_that_cannot_be_stopped_is_refused(server, app, app_database, freeze, roles, said):
    with pytest.raises(FreezeRefused, match=said), freeze(roles=roles):
        pass
    app.execute(WRITES[0])
    wait_until(lambda: not dead_men(server, app_database))


def test_a_way_around_is_found_before_anything_is_changed(server, app, app_database, freeze):
    app.execute("GRANT INSERT ON things TO PUBLIC")
    with (
        pytest.raises(FreezeRefused, match=r"INSERT ON TABLE public\.things, granted to PUBLIC"),
        freeze(roles=["app"]),
    ):
        pass
    with freeze(roles=["app", "public"]):
        assert refused(app, WRITES[0])
    server.execute("GRANT pg_write_all_data TO app")
    try:
        with pytest.raises(FreezeRefused, match=r"REVOKE pg_write_all_data FROM .*app"), freeze():
            pass
    finally:
        server.execute("REVOKE pg_write_all_data FROM app")
    app.execute(WRITES[0])


@pytest.mark.pg(">=15")
def test_without_the_right_to_revoke_it_says_what_to_grant(server, app, app_database, freeze):
    server.execute("REVOKE app FROM freezer")
    try:
        with pytest.raises(FreezeRefused, match=r"role freezer may not revoke .* GRANT app TO freezer;"), freeze():
            pass
    finally:
        server.execute("GRANT app TO freezer")
    app.execute(WRITES[0])


def test_several_databases_or_roles_without_the_strategy_make_no_sense(connect, inside, app_database):
    with (
        pytest.raises(InvalidRequest, match="one database"),
        asking.frozen(connect, inside, databases=[app_database, "postgres"], holder="x", strategy="privileges"),
    ):
        pass
    with (
        pytest.raises(InvalidRequest, match="only be chosen for the strategy privileges"),
        asking.frozen(connect, inside, databases=[app_database], holder="x", roles=["app"]),
    ):
        pass


@pytest.fixture
def left_behind(inside: ConnectTo, app_database: str) -> Callable[..., core.Freeze]:
    """Freeze as a process does that is gone a moment later: nobody will resume."""

    def begin(**options: Any) -> core.Freeze:
        given = {"databases": [app_database], "holder": "gone", "drain_timeout": SECONDS[1], "strategy": "privileges"}
        return asking.pause(partial(inside, "postgres"), connect_to=inside, **{**given, **options})

    return begin


def test_the_server_gives_everything_back_when_the_lease_ends(server, app, app_database, left_behind):
    before = server.execute(ACLS, app_database)
    freeze = left_behind(lease=SECONDS[2])
    assert refused(app, WRITES[0])

    wait_until(lambda: not refused(app, WRITES[0]), within=30)
    (done,) = core.history(server.connect_factory(checkpointer(server.version), app_database), limit=1)
    assert (done.token, done.thawed_by) == (freeze.token, "lease ended")
    if server.version < 15:
        assert server.execute(ACLS, app_database) == before
    wait_until(lambda: not dead_men(server, app_database))


def test_it_is_seen_and_ended_from_the_maintenance_database(server, connect, inside, app, app_database, left_behind):
    freeze = left_behind()
    (seen,) = core.status(connect, databases=[app_database], connect_to=inside).freezes
    assert seen.token == freeze.token
    assert seen in core.status(connect, connect_to=inside).freezes
    with pytest.raises(FreezeRefused, match="frozen by the strategy privileges"):
        asking.pause(connect, databases=[app_database], holder="other")
    other = core.resume(connect, databases=[app_database], holder="other", connect_to=inside)
    assert [one.token for one in other.others] == [freeze.token]
    assert refused(app, WRITES[0])

    done = core.resume(connect, databases=[app_database], holder="gone", connect_to=inside)
    assert [one.token for one in done.thawed] == [freeze.token]
    app.execute(WRITES[0])


@pytest.fixture
def restarted(server_factory: Callable[..., Server]) -> tuple[Server, ConnectTo, core.Freeze]:
    """A server that was restarted while a database was frozen from inside: no switch watches it any more."""
    server = server_factory()
    create_application_database(server, "app")
    keep_private(server, "app")
    with server.connect_factory("app", "app")() as conn:
        conn.execute("CREATE TABLE things (name text)")
    server.execute("GRANT app TO freezer")

    def inside(name: str) -> psycopg.Connection[Any]:
        return server.connect_factory(checkpointer(server.version), name)()

    given: dict[str, Any] = {
        "databases": ["app"],
        "holder": "gone",
        "strategy": "privileges",
        "drain_timeout": SECONDS[1],
        "lease": SECONDS[5],
    }
    freeze = asking.pause(partial(inside, "postgres"), connect_to=inside, **given)
    server.restart()
    return server, inside, freeze


def test_after_a_restart_of_the_server_it_is_still_seen_and_ended(restarted):
    server, inside, freeze = restarted
    outside = partial(inside, "postgres")

    (seen,) = core.status(outside, connect_to=inside).freezes
    assert (seen.token, seen.dead_man_pid) == (freeze.token, None)
    with pytest.raises(FreezeRefused, match="frozen by the strategy privileges"):
        asking.pause(outside, databases=["app"], holder="other")
    (done,) = core.resume(outside, databases=["app"], holder="gone", connect_to=inside).thawed
    assert done.token == freeze.token
    assert core.status(outside, connect_to=inside).freezes == ()
    with server.connect_factory("app", "app")() as conn:
        conn.execute(WRITES[0])


def test_after_a_restart_of_the_server_the_guard_thaws_it_when_the_lease_ends(restarted):
    server, inside, freeze = restarted
    outside = partial(inside, "postgres")
    assert core.thaw_expired(outside, inside) == ()

    (done,) = wait_until(lambda: core.thaw_expired(outside, inside))
    assert (done.token, done.thawed_by) == (freeze.token, "lease ended")
    with server.connect_factory("app", "app")() as conn:
        conn.execute(WRITES[0])


def test_a_database_that_we_cannot_enter_only_matters_if_it_is_frozen_from_inside(restarted):
    server, inside, _ = restarted
    create_application_database(server, "other")
    outside = partial(inside, "postgres")
    user = checkpointer(server.version)
    rules = server.data / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(f"host app,other {user} all reject\n" + before)
    server.execute("SELECT pg_reload_conf()")
    wait_until(lambda: not can_connect(inside, "other"))

    assert core.resume(outside, databases=["other"], holder="x", connect_to=inside).thawed == ()
    for act in (
        lambda: core.status(outside, connect_to=inside),
        lambda: core.thaw_expired(outside, inside),
        lambda: core.resume(outside, databases=["app"], holder="gone", connect_to=inside),
    ):
        with pytest.raises((core.ServerLost, core.ThawFailed), match="inside 'app'"):
            act()
    rules.write_text(before)
    server.execute("SELECT pg_reload_conf()")
    wait_until(lambda: can_connect(inside, "app"))
    assert core.resume(outside, databases=["app"], holder="gone", connect_to=inside).thawed


def can_connect(inside: ConnectTo, name: str) -> bool:
    try:
        inside(name).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.mark.parametrize("name", ["", "of 'my' own"])
def test_the_mark_leaves_the_roles_own_name_as_it_was(server, connect, inside, app, app_database, freeze, name):
    mine = sql.SQL("ALTER ROLE {} IN DATABASE {} SET application_name = {}").format(
        sql.Identifier(checkpointer(server.version)), sql.Identifier(app_database), name
    )
    server.execute(mine)
    look = sql.SQL("SELECT setrole, setconfig FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase")
    look += sql.SQL(" WHERE datname = {}").format(app_database)
    before = server.execute(look)

    with freeze() as hold:
        assert server.execute(look) == [
            (before[0][0], [f"application_name=pg-freeze inside {hold.freeze.token} {name}"])
        ]

    assert server.execute(look) == before


def test_a_mark_that_somebody_sets_for_himself_stops_nobody(server, connect, inside, app, app_database):
    app.execute(
        sql.SQL("ALTER ROLE app IN DATABASE {} SET application_name = 'pg-freeze inside x'").format(
            sql.Identifier(app_database)
        )
    )
    assert core.status(connect, databases=[app_database], connect_to=inside).freezes == ()
    core.thaw_expired(connect, inside)
    asking.pause(connect, databases=[app_database], holder="x", admit="readers", drain_timeout=SECONDS[1])
    core.resume(connect, databases=[app_database], holder="x", connect_to=inside)


def test_psql_alone_thaws_it(server, app, app_database, left_behind):
    left_behind()
    assert refused(app, WRITES[0])
    server.execute(sql.SQL("CALL pgfreeze.thaw({})").format(sql.Literal(app_database)), app_database)
    app.execute(WRITES[0])


def test_the_same_holder_goes_on_with_what_an_earlier_attempt_left(app, app_database, left_behind):
    first = left_behind()
    again = left_behind()
    assert again.token == first.token
    assert again.lease_until > first.lease_until
    with pytest.raises(FreezeRefused, match="held by 'gone'"):
        left_behind(holder="somebody")
    assert refused(app, WRITES[0])


def test_a_database_that_is_frozen_already_is_not_frozen_from_inside(connect, app, app_database, freeze):
    asking.pause(connect, databases=[app_database], holder="first", admit="readers", drain_timeout=SECONDS[1])
    try:
        with pytest.raises(FreezeRefused, match="read-only by default"), freeze():
            pass
    finally:
        core.resume(connect, databases=[app_database], holder="first")


def test_a_freeze_from_inside_that_comes_between_the_look_and_the_freeze_is_not_frozen_over(
    connect, inside, app, app_database, left_behind
):
    calls: list[int] = []

    def late() -> core.Control:
        calls.append(1)
        if len(calls) == 2:  # the dead-man switch's, after preflight
            left_behind()
        return connect()

    with pytest.raises(FreezeRefused, match="privileges are revoked, from inside"):
        asking.pause(late, databases=[app_database], holder="other", drain_timeout=SECONDS[1])
    (freeze,) = core.status(connect, databases=[app_database], connect_to=inside).freezes
    assert freeze.strategy == "privileges"
    assert core.resume(connect, databases=[app_database], holder="gone", connect_to=inside).thawed
    app.execute(WRITES[0])


def test_what_others_change_meanwhile_stays_as_they_left_it(server, app, app_database, left_behind, inside):
    server.create_role("newcomer")
    app.execute("CREATE TABLE dropped (i int); CREATE TABLE renamed (i int); CREATE TABLE sold (i int)")
    left_behind()
    try:
        app.execute("GRANT SELECT ON things TO newcomer")
        app.execute("DROP TABLE dropped")
        server.execute('ALTER TABLE renamed RENAME TO "we; rd"" %s ünïcode"', app_database)
        server.execute("ALTER TABLE sold OWNER TO newcomer", app_database)
        if server.version < 15:
            core.resume(partial(inside, app_database), databases=[app_database], holder="gone")
        else:
            # freezer is no member of the new owner: that keeps back nothing but its table.
            with pytest.raises(
                core.ThawFailed, match=r"may not give back .* ON TABLE public\.sold to newcomer"
            ) as failed:
                core.resume(partial(inside, app_database), databases=[app_database], holder="gone")
            with server.control(app_database) as boss:
                boss.execute(str(failed.value).partition(f"connected to {app_database!r}: ")[2].encode())
        server.execute("SET ROLE newcomer; SELECT FROM things; INSERT INTO sold VALUES (1)", app_database)
        app.execute('INSERT INTO "we; rd"" %s ünïcode" VALUES (1)'.encode())
        app.execute(WRITES[0])
    finally:
        server.execute("DROP OWNED BY newcomer", app_database)
        server.execute("DROP ROLE newcomer")


def test_odd_names_come_back_too(place):
    odd = 'we; rd" %s ünïcode'
    place.create_role(odd)
    create_application_database(place, odd)
    keep_private(place, odd)
    with place.control(odd) as conn:
        name = sql.Identifier(odd)
        conn.execute(sql.SQL("CREATE SCHEMA {0} AUTHORIZATION {0}").format(name))
        conn.execute(sql.SQL("SET ROLE {0}; CREATE TABLE {0}.{0} ({0} int)").format(name))
        conn.execute(sql.SQL("GRANT UPDATE ({0}) ON {0}.{0} TO app WITH GRANT OPTION").format(name))
    before = place.execute(ACLS, odd)
    with hold_on(place, SUPERUSER, databases=[odd], roles=[odd, "app"]), place.connect_factory(odd, odd)() as conn:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute(sql.SQL("INSERT INTO {0}.{0} VALUES (1)").format(name))
    assert place.execute(ACLS, odd) == before


def test_an_attestation_tells_of_a_privilege_that_was_granted_back_and_of_who_cannot_be_stopped(
    server, app, app_database, freeze, super_connect
):
    with freeze() as hold:
        app.execute("GRANT INSERT ON things TO app")
    assert hold.attestation.level == "crash-only"
    assert "granted again: INSERT ON TABLE public.things to app" in hold.attestation.reasons
    boss = super_connect(app_database)
    with freeze() as hold:
        boss.execute(WRITES[0])
    assert hold.attestation.level == "crash-only"
    assert "1 transaction id(s) were given out meanwhile" in hold.attestation.reasons


@pytest.mark.pg(">=15,!=16,!=17")
def test_where_the_wal_can_be_read_it_tells_of_every_write_and_of_none_of_our_own(
    server, app, app_database, freeze, super_connect
):
    server.execute("CREATE EXTENSION pg_walinspect SCHEMA pg_catalog", app_database)
    server.execute("GRANT pg_read_server_files, pg_monitor TO freezer")
    try:
        with freeze() as hold:
            pass
        assert (hold.attestation.method, hold.attestation.level) == ("wal", "quiesced"), hold.attestation.reasons
        boss = super_connect(app_database)
        with freeze() as hold:
            boss.execute(WRITES[0])
        assert {one.code for one in hold.attestation.violations} == {"row-change"}
    finally:
        server.execute("REVOKE pg_read_server_files, pg_monitor FROM freezer")


def test_an_idle_transaction_that_alters_a_table_cannot_keep_the_privileges_from_coming_back(
    server, app, app_connect, app_database, left_behind
):
    left_behind(lease=SECONDS[2])
    idle = app_connect(app_database)
    idle.execute("BEGIN")
    idle.execute("ALTER TABLE things SET (fillfactor = 50)")
    other = app_connect(app_database)
    other.execute("SET lock_timeout = '1s'")
    # What nobody holds comes back at once; the rest once whoever holds it has been in the way for two seconds.
    wait_until(lambda: not refused(other, "INSERT INTO parted VALUES (1)"), within=60)
    wait_until(lambda: not refused(other, WRITES[0]), within=60)
    with pytest.raises(psycopg.OperationalError):
        idle.execute("COMMIT")
