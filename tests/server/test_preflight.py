"""Preflight: each finding, and that the remedy it prints is one."""

import re

import psycopg
import pytest
from psycopg import sql

from devtools.asking import frozen, pause, preflight
from pg_freeze import FreezeError, FreezeRefused, InvalidRequest, Severity, checkpoint, history, install, resume, status
from tests.server.clients import SECONDS, alter, dead_men, is_read_only, ms, settings_of, wait_until

pytestmark = pytest.mark.every_version


@pytest.fixture
def site(own_server, connect_to, new_database):
    return own_server, connect_to(own_server), new_database(own_server)


def finding(connect, code, *databases, **options):
    """Return the one finding with this code, or None."""
    found = preflight(connect, databases=databases, holder="test", **options).findings
    matching = [one for one in found if one.code == code]
    assert len(matching) <= 1
    return matching[0] if matching else None


def apply_remedy(server, remedy, dbname="postgres"):
    """Run the first statement of a remedy, as a superuser would from the printed text."""
    statement = re.match(r"[A-Z][^;]*;", remedy)
    assert statement is not None, remedy
    with server.control(dbname) as conn:
        conn.execute(statement[0].encode())


def test_a_site_with_least_rights_has_no_refusal(connect, app_database, pg_version):
    found = preflight(connect, databases=[app_database], holder="test")

    assert found.refusals == ()
    assert {warning.code for warning in found.warnings} == {
        "client-override",
        *(["no-checkpoint"] if pg_version == 14 else []),
    }
    assert found.as_dict()["ok"] is True


REVOCATIONS = [
    ("no-stats", "REVOKE pg_read_all_stats FROM freezer", {}),
    ("no-signal", "REVOKE pg_signal_backend FROM freezer", {}),
    ("not-owner", "REVOKE app_owner FROM freezer", {}),
    ("no-journal", "REVOKE CREATE ON DATABASE postgres FROM freezer", {}),
    ("no-switch-wal", "REVOKE EXECUTE ON FUNCTION pg_switch_wal() FROM freezer", {"switch_wal": True}),
    pytest.param(
        "no-checkpoint", "REVOKE pg_checkpoint FROM freezer", {"checkpoint": True}, marks=pytest.mark.pg(">=15")
    ),
]


@pytest.mark.parametrize(("code", "revoke", "options"), REVOCATIONS)
def test_a_missing_right_is_refused_before_anything_changes_and_its_remedy_cures_it(site, code, revoke, options):
    server, connect, database = site
    if code != "no-switch-wal":
        assert finding(connect, code, database, **options) is None
    server.execute(sql.SQL(revoke))
    before = settings_of(server)

    found = finding(connect, code, database, **options)

    assert found.severity is Severity.REFUSE
    with pytest.raises(FreezeRefused) as refused:
        pause(connect, databases=[database], holder="test", **options)
    assert found in refused.value.findings
    assert found.remedy in str(refused.value)
    assert settings_of(server) == before
    assert dead_men(server) == []
    apply_remedy(server, found.remedy)
    assert finding(connect, code, database, **options) is None


@pytest.mark.parametrize(("code", "revoke", "options"), REVOCATIONS[:3])
def test_a_remedy_quotes_a_role_with_a_strange_name(own_server, new_database, code, revoke, options):
    own_server.create_role('We"ird; 100%')
    database = new_database(own_server)
    connect = own_server.connect_factory('We"ird; 100%')

    # The statement itself holds the semicolon of the name.
    remedy = finding(connect, code, database).remedy
    assert remedy.endswith('TO "We""ird; 100%";')
    own_server.execute(sql.SQL("{}").format(sql.SQL(remedy)))

    assert finding(connect, code, database) is None


def test_all_that_is_wrong_is_said_at_once(site):
    server, connect, database = site
    server.execute("REVOKE pg_read_all_stats, pg_signal_backend, app_owner FROM freezer")

    codes = {
        one.code for one in preflight(connect, databases=[database, "missing", "postgres"], holder="test").refusals
    }

    assert codes == {"no-stats", "no-signal", "not-owner", "unknown-database", "maintenance-database"}


@pytest.mark.parametrize("where", ["ALTER ROLE batch SET", "ALTER ROLE batch IN DATABASE {} SET"])
def test_a_role_that_overrides_the_freeze_and_may_not_be_changed_is_warned_of_with_a_remedy(site, where):
    server, connect, database = site
    server.create_role("batch")
    server.execute(sql.SQL(where + " default_transaction_read_only = off").format(sql.Identifier(database)))

    found = finding(connect, "role-override", database)

    assert found.severity is Severity.WARN
    assert "batch" in found.message
    for statement in re.findall(r"ALTER ROLE batch [^;]*;", found.remedy):
        server.execute(sql.SQL(statement))
    assert finding(connect, "role-override", database) is None


@pytest.mark.pg(">=16")
def test_a_role_that_overrides_the_freeze_may_be_changed_after_the_other_remedy(site, app_connect):
    server, connect, database = site
    server.create_role("batch")
    server.execute("ALTER ROLE batch SET default_transaction_read_only = off")
    remedy = finding(connect, "role-override", database).remedy

    for statement in re.findall(r"(?:ALTER ROLE freezer|GRANT)[^;]*;", remedy):
        server.execute(sql.SQL(statement))

    assert finding(connect, "role-override", database) is None
    pause(connect, databases=[database], holder="test")
    assert is_read_only(app_connect(database, user="batch", server=server))


def test_a_superusers_override_is_refused(site):
    server, connect, database = site
    server.execute("ALTER ROLE postgres SET default_transaction_read_only = off")

    found = finding(connect, "role-override", database)

    assert found.severity is Severity.REFUSE
    apply_remedy(server, found.remedy)
    assert finding(connect, "role-override", database) is None


@pytest.mark.pg("==14")
def test_before_15_a_final_checkpoint_is_refused_to_all_but_superusers(server, connect, app_database):
    with pytest.raises(FreezeRefused, match="only superusers may"):
        pause(connect, databases=[app_database], holder="test", checkpoint=True)

    pause(connect, databases=[app_database], holder="test")
    with pytest.raises(FreezeRefused, match="may not CHECKPOINT"):
        checkpoint(connect, databases=[app_database], holder="test")
    done = checkpoint(connect, databases=[app_database], holder="test", required=False)
    assert done.checkpoint_lsn is not None
    superuser = server.connect_factory("postgres")
    assert checkpoint(superuser, databases=[app_database], holder="test").checkpoint_at > done.checkpoint_at


@pytest.mark.pg(">=15")
def test_a_checkpoint_needs_a_freeze_of_the_same_holder(connect, app_database):
    with pytest.raises(FreezeError, match="not frozen by 'test'"):
        checkpoint(connect, databases=[app_database], holder="test")
    pause(connect, databases=[app_database], holder="other")
    with pytest.raises(FreezeError, match="frozen by: 'other'"):
        checkpoint(connect, databases=[app_database], holder="test")
    assert checkpoint(connect, databases=[app_database], holder="other").checkpoint_lsn is not None


def test_without_the_right_to_create_the_journal_it_can_be_installed_by_somebody_else(site):
    server, connect, database = site
    server.execute("REVOKE CREATE ON DATABASE postgres FROM freezer")

    install(server.connect_factory("postgres"), grant=["freezer"])

    assert preflight(connect, databases=[database], holder="test").refusals == ()
    pause(connect, databases=[database], holder="test")
    assert len(resume(connect, databases=[database], holder="test").thawed) == 1


def test_a_journal_of_somebody_elses_is_refused_until_its_owner_grants_it(site):
    server, connect, database = site
    install(server.connect_factory("postgres"))

    found = finding(connect, "journal-closed", database)

    assert found.severity is Severity.REFUSE
    for act in (status, history):
        with pytest.raises(FreezeRefused, match="pg-freeze install --grant freezer"):
            act(connect)
    install(server.connect_factory("postgres"), grant=["freezer"])
    assert preflight(connect, databases=[database], holder="test").refusals == ()


def test_an_upgrade_of_the_journal_keeps_what_was_granted(site):
    server, connect, database = site
    server.execute("REVOKE CREATE ON DATABASE postgres FROM freezer")
    owner = server.connect_factory("postgres")
    install(owner, grant=["freezer"])
    server.execute("COMMENT ON SCHEMA pgfreeze IS 'an older one'")
    assert finding(connect, "journal-version", database).severity is Severity.REFUSE

    assert install(owner) is True
    assert install(owner) is False

    pause(connect, databases=[database], holder="test")
    resume(connect, databases=[database], holder="test")


def test_an_upgrade_of_the_journal_during_a_freeze_keeps_the_freeze(connect_to, own_server, new_database):
    connect, database, before = connect_to(own_server), new_database(own_server), settings_of(own_server)
    frozen = pause(connect, databases=[database], holder="test")
    own_server.execute("COMMENT ON SCHEMA pgfreeze IS 'an older one'")

    with pytest.raises(FreezeRefused, match=r"older .* as its owner 'freezer': pg-freeze install"):
        pause(connect, databases=[database], holder="test")
    assert install(connect) is True
    again = pause(connect, databases=[database], holder="test")

    assert again.token == frozen.token
    resume(connect, databases=[database], holder="test")
    assert settings_of(own_server) == before


def test_prepared_transactions_are_warned_of_and_reported_with_the_freeze(connect, server, app_database, app_connect):
    writer = app_connect(app_database)
    writer.execute("CREATE TABLE t ()")
    writer.execute("BEGIN; INSERT INTO t DEFAULT VALUES")
    writer.execute("PREPARE TRANSACTION 'forgotten'")

    found = finding(connect, "prepared-transactions", app_database)

    assert found.severity is Severity.WARN
    assert "'forgotten'" in found.message
    frozen = pause(connect, databases=[app_database], holder="test")
    assert found.as_dict() in frozen.warnings
    assert status(connect, databases=[app_database]).freezes[0].warnings == frozen.warnings


def test_a_superusers_session_is_warned_of(connect, app_database, super_connect):
    admin = super_connect(app_database)

    assert str(admin.info.backend_pid) in finding(connect, "superuser-session", app_database).message
    admin.close()
    assert wait_until(lambda: finding(connect, "superuser-session", app_database) is None)


def test_a_superuser_is_not_warned_of_superusers(own_server, new_database, super_connect):
    database = new_database(own_server)
    super_connect(database, server=own_server)

    assert finding(own_server.connect_factory("postgres"), "superuser-session", database) is None


def test_strict_refuses_what_is_only_warned_of_otherwise(connect, server, app_database, super_connect, pg_version):
    super_connect(app_database)
    before = settings_of(server)

    with pytest.raises(FreezeRefused, match="superuser's session"):
        pause(connect, databases=[app_database], holder="test", admit="nobody", strict=True)

    assert settings_of(server) == before


def test_strict_freezes_when_there_is_nothing_to_warn_of(own_server, new_database):
    superuser = own_server.connect_factory("postgres")

    assert (
        pause(superuser, databases=[new_database(own_server)], holder="test", admit="nobody", strict=True).warnings
        == ()
    )


@pytest.mark.parametrize("admit", ["readers", "readers-once-drained"])
def test_whoever_admits_readers_is_warned_that_clients_can_override_read_only(connect, app_database, admit):
    assert finding(connect, "client-override", app_database, admit=admit).severity is Severity.WARN
    assert finding(connect, "client-override", app_database, admit="nobody") is None


@pytest.mark.parametrize(
    "name",
    [
        "x" * 63,
        'qu"oted',
        "apo'strophe",
        "100% %s %(x)s",
        "with space",
        "ünïcode 数据库",
        "semi;colon",
        "back\\slash",
        "-- c",
        "$$",
    ],
)
def test_a_database_may_have_any_name(server, connect, name):
    with server.database(name, "app_owner"):
        before = settings_of(server)
        pause(connect, databases=[name], holder=name)
        (frozen,) = status(connect, databases=[name]).freezes
        assert frozen.databases == (name,)
        with psycopg.connect(server.dsn(name, "app")) as conn:
            assert is_read_only(conn)
        assert len(resume(connect, databases=[name], holder=name).thawed) == 1
        assert settings_of(server) == before


@pytest.mark.parametrize("name", ["no such database", "x" * 64, "POSTGRES"])
def test_an_unknown_database_is_refused(connect, name):
    with pytest.raises(FreezeRefused, match="there is no database") as refused:
        pause(connect, databases=[name], holder="test")
    assert [one.code for one in refused.value.findings] == ["unknown-database"]
    for act in (resume, checkpoint):
        with pytest.raises(FreezeError):
            act(connect, databases=[name], holder="test")


def test_a_64_byte_name_is_not_taken_for_the_63_byte_one_that_postgresql_would_make_of_it(server, connect):
    with server.database("y" * 63, "app_owner"), pytest.raises(FreezeRefused, match="there is no database"):
        pause(connect, databases=["y" * 64], holder="test")


def test_the_maintenance_database_cannot_be_frozen(connect):
    with pytest.raises(FreezeRefused, match="'postgres' is the maintenance database"):
        pause(connect, databases=["postgres"], holder="test")


@pytest.mark.parametrize(
    "request_",
    [
        {"databases": []},
        {"databases": [""]},
        {"databases": ["  "]},
        {"databases": ["a\0b"]},
        {"databases": ["a\udcff"]},
        {"databases": [None]},
        {"holder": ""},
        {"holder": "a\0b"},
        {"holder": "\udcff"},
        {"lease": SECONDS[0]},
        {"lease": -SECONDS[1]},
        {"drain_timeout": SECONDS[0]},
        {"drain_timeout": -SECONDS[1]},
        {"lease": SECONDS[20], "drain_timeout": SECONDS[20]},
        {"lease": SECONDS[10], "drain_timeout": SECONDS[20]},
        {"admit": "everybody"},
        {"on_drain_timeout": "shrug"},
    ],
    ids=repr,
)
def test_a_request_that_makes_no_sense_is_refused_without_asking_the_server(request_):
    def connect():
        raise AssertionError("asked the server")

    with pytest.raises(InvalidRequest):
        pause(connect, **{"databases": ["app"], "holder": "test", **request_})


def test_an_absurdly_long_lease_is_an_error_and_changes_nothing(connect, server, app_database):
    before = settings_of(server)

    with pytest.raises(FreezeError):
        pause(connect, databases=[app_database], holder="test", lease=SECONDS[60] * 60 * 24 * 366 * 1_000_000)

    assert settings_of(server) == before


def test_a_right_that_is_lost_during_the_freeze_does_not_undo_it(site):
    server, connect, database = site
    pause(connect, databases=[database], holder="test")
    server.execute("REVOKE pg_signal_backend FROM freezer")

    with pytest.raises(FreezeRefused, match="GRANT pg_signal_backend"):
        pause(connect, databases=[database], holder="test", drain_timeout=ms(500))

    assert [freeze.state for freeze in status(connect).freezes] == ["frozen"]
    resume(connect, databases=[database], holder="test")


def test_when_track_activities_is_off_for_the_freezing_role_preflight_says_what_to_do(site):
    server, connect, database = site
    server.execute("ALTER ROLE freezer SET track_activities = off")

    found = finding(connect, "no-activities", database)

    assert found.severity is Severity.REFUSE
    apply_remedy(server, found.remedy)
    pause(connect, databases=[database], holder="test")


def test_a_database_that_belongs_to_a_superuser_is_to_be_given_an_owner_not_the_superusers_rights(site):
    server, connect, database = site
    alter(server, "ALTER DATABASE {} OWNER TO postgres", database)

    found = finding(connect, "not-owner", database)

    assert "GRANT postgres" not in found.remedy
    apply_remedy(server, found.remedy)
    assert finding(connect, "not-owner", database) is None


def test_each_strategy_is_judged_by_what_it_needs_itself(site):
    server, connect, database = site
    server.execute("REVOKE app_owner FROM freezer")
    with server.connect_factory("app", database)() as app:
        app.execute("CREATE TABLE things ()")

    def codes(strategy):
        found = preflight(connect, connect_to=into(server), databases=[database], holder="test", strategy=strategy)
        return {one.code for one in found.refusals}

    assert codes("read-only") == {"not-owner"}
    assert codes("lock") == {"not-lockable"}
    # There is no journal in it yet, and whether all can be revoked is found by trying.
    assert codes("privileges") == {"no-journal"}

    for strategy, code in (("lock", "not-lockable"), ("privileges", "no-journal")):
        found = preflight(connect, connect_to=into(server), databases=[database], holder="test", strategy=strategy)
        (one,) = (one for one in found.refusals if one.code == code)
        apply_remedy(server, one.remedy.rpartition("or ")[2] if code == "not-lockable" else one.remedy)
        assert codes(strategy) == set()


def test_a_strategy_that_enters_is_refused_where_it_may_not(site):
    server, connect, database = site
    server.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(sql.Identifier(database)))
    server.execute("REVOKE app_owner FROM freezer")

    for strategy in ("lock", "privileges"):
        found = preflight(connect, connect_to=into(server), databases=[database], holder="test", strategy=strategy)
        (one,) = found.refusals
        assert one.code == "no-connect"
        with pytest.raises(FreezeRefused, match="may not connect"):
            frozen(connect, into(server), databases=[database], holder="test", strategy=strategy).__enter__()
    assert finding(connect, "no-connect", database) is None


def into(server):
    return lambda name: server.connect_factory(dbname=name)()
