"""Exact restoration: after a thaw the catalogs are, byte for byte, what they were before the pause."""

import psycopg
import pytest
from psycopg import sql

from devtools.asking import pause, preflight
from pg_freeze import State, history, resume, status
from tests.server.clients import alter, is_read_only, settings_of

pytestmark = pytest.mark.every_version

SPELLINGS = ["off", "no", "0", "false", "on", "yes", "1", "true", "OFF", "Of", "f"]


@pytest.fixture
def site(own_server, connect_to, new_database):
    """A server of one's own, on which freezer may alter the roles' settings."""
    own_server.execute("ALTER ROLE freezer CREATEROLE")
    for role in ("batch", 'we"ird 100%'):
        own_server.create_role(role)
        if own_server.version >= 16:
            alter(own_server, "GRANT {} TO freezer WITH ADMIN OPTION", role)
    return own_server, connect_to(own_server), new_database(own_server)


def frozen_and_back(server, connect, database, *roles):
    """Freeze, see that all roles are read-only, thaw, and return the catalogs before and after."""
    before = settings_of(server)
    pause(connect, databases=[database], holder="test")
    for role in ("app", *roles):
        with psycopg.connect(server.dsn(database, role), autocommit=True) as conn:
            assert is_read_only(conn), role
    resume(connect, databases=[database], holder="test")
    return before, settings_of(server)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_databases_own_setting_comes_back_as_it_was_spelt(connect, server, app_database, spelling):
    server.execute(
        sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}").format(
            sql.Identifier(app_database), sql.Literal(spelling)
        )
    )

    before, after = frozen_and_back(server, connect, app_database)

    assert after == before
    assert spelling in before[1][0]


def test_role_settings_come_back_as_they_were_spelt_everywhere_and_in_the_database(site):
    server, connect, database = site
    for role, spelling in (("batch", "no"), ('we"ird 100%', "0")):
        server.execute(
            sql.SQL("ALTER ROLE {} SET default_transaction_read_only = {}").format(
                sql.Identifier(role), sql.Literal(spelling)
            )
        )
    for spelling in ("off", "0", "no", "on", "yes"):
        server.execute(
            sql.SQL("ALTER ROLE batch IN DATABASE {} SET default_transaction_read_only = {}").format(
                sql.Identifier(database), sql.Literal(spelling)
            )
        )
        before, after = frozen_and_back(server, connect, database, "batch", 'we"ird 100%')
        assert after == before


def test_unrelated_settings_keep_their_values_and_their_order(site):
    server, connect, database = site
    for target in ("DATABASE {0}", "ROLE batch IN DATABASE {0}", "ROLE batch"):
        for setting in (
            "work_mem = '5MB'",
            "default_transaction_read_only = 'off'",
            "search_path = 'we\"ird', public",
            "application_name = 'a=b, c\\d'",
            "default_transaction_isolation = 'repeatable read'",
        ):
            server.execute(sql.SQL("ALTER " + target + " SET " + setting).format(sql.Identifier(database)))
    server.execute("ALTER ROLE ALL SET default_transaction_read_only = off")

    before, after = frozen_and_back(server, connect, database, "batch")

    assert after == before


def test_settings_that_somebody_changes_during_the_freeze_stay_changed(site):
    server, connect, database = site
    pause(connect, databases=[database], holder="test")
    alter(server, "ALTER DATABASE {} SET work_mem = '7MB'", database)
    alter(server, "ALTER ROLE batch IN DATABASE {} SET work_mem = '8MB'", database)
    resume(connect, databases=[database], holder="test")

    assert server.execute("SELECT setconfig FROM pg_db_role_setting ORDER BY setrole") == [
        (["work_mem=7MB"],),
        (["work_mem=8MB"],),
    ]


def test_a_database_that_was_read_only_before_stays_so(connect, server, app_database, app_connect):
    alter(server, "ALTER DATABASE {} SET default_transaction_read_only = on", app_database)

    before, after = frozen_and_back(server, connect, app_database)

    assert after == before
    assert is_read_only(app_connect(app_database))


@pytest.mark.parametrize("admit", ["readers-once-drained", "readers", "nobody"])
def test_a_database_that_was_closed_before_stays_closed_all_the_time(connect, server, app_database, app_connect, admit):
    alter(server, "ALTER DATABASE {} ALLOW_CONNECTIONS false", app_database)
    before = settings_of(server)

    pause(connect, databases=[app_database], holder="test", admit=admit)

    with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
        app_connect(app_database)
    resume(connect, databases=[app_database], holder="test")
    assert settings_of(server) == before


def test_a_database_renamed_during_the_freeze_is_thawed_under_its_new_name(connect, server, app_database, app_connect):
    before = settings_of(server)
    pause(connect, databases=[app_database], holder="test", admit="nobody")
    alter(server, "ALTER DATABASE {} RENAME TO renamed", app_database)

    assert [freeze.holder for freeze in status(connect, databases=["renamed"]).freezes] == ["test"]
    resumed = resume(connect, databases=["renamed"], holder="test")

    app_connect("renamed").execute("CREATE TABLE t ()").connection.close()
    alter(server, "ALTER DATABASE renamed RENAME TO {}", app_database)
    assert len(resumed.thawed) == 1
    assert settings_of(server) == before


def test_a_database_renamed_during_the_freeze_is_thawed_under_its_old_name_too(
    connect, server, app_database, app_connect
):
    pause(connect, databases=[app_database], holder="test")
    alter(server, "ALTER DATABASE {} RENAME TO renamed", app_database)

    resumed = resume(connect, databases=[app_database], holder="test")

    app_connect("renamed").execute("CREATE TABLE t ()").connection.close()
    alter(server, "ALTER DATABASE renamed RENAME TO {}", app_database)
    assert len(resumed.thawed) == 1


def test_one_database_dropped_during_the_freeze_does_not_keep_the_other_frozen(
    connect, server, new_database, app_connect
):
    kept, dropped = new_database(), new_database()
    pause(connect, databases=[dropped, kept], holder="test")
    alter(server, "DROP DATABASE {}", dropped)

    resumed = resume(connect, databases=[kept], holder="test")

    assert [freeze.state for freeze in resumed.thawed] == [State.THAWED]
    app_connect(kept).execute("CREATE TABLE t ()")
    server.create_database(dropped)  # for the fixture to drop


def test_the_freeze_of_a_dropped_database_can_be_ended_by_its_old_name(connect, server, app_database):
    pause(connect, databases=[app_database], holder="test")
    alter(server, "DROP DATABASE {}", app_database)

    resumed = resume(connect, databases=[app_database], holder="test")

    assert [freeze.state for freeze in resumed.thawed] == [State.THAWED]
    server.create_database(app_database)


def test_a_new_database_with_the_name_of_a_dropped_frozen_one_is_not_touched_by_the_thaw(
    connect, server, app_database, app_connect
):
    pause(connect, databases=[app_database], holder="test")
    alter(server, "DROP DATABASE {}", app_database)
    server.create_database(app_database, "app_owner")
    alter(server, "ALTER DATABASE {} SET default_transaction_read_only = on", app_database)
    session = app_connect(app_database)

    resume(connect, databases=[app_database], holder="test")

    assert is_read_only(app_connect(app_database))
    assert is_read_only(session)


def test_roles_dropped_and_renamed_during_the_freeze_do_not_hinder_the_thaw(site):
    server, connect, database = site
    for role in ("batch", 'we"ird 100%'):
        server.execute(
            sql.SQL("ALTER ROLE {} IN DATABASE {} SET default_transaction_read_only = off").format(
                sql.Identifier(role), sql.Identifier(database)
            )
        )
    pause(connect, databases=[database], holder="test")
    alter(server, "DROP ROLE {}", "batch")
    alter(server, "ALTER ROLE {} RENAME TO renamed", 'we"ird 100%')

    resume(connect, databases=[database], holder="test")

    assert server.execute("SELECT setrole::regrole::text, setconfig FROM pg_db_role_setting") == [
        ("renamed", ["default_transaction_read_only=off"])
    ]
    (thawed,) = history(connect)
    assert thawed.state is State.THAWED


def test_an_owner_changed_during_the_freeze_can_still_be_thawed_by_a_superuser(connect, server, app_database):
    before = settings_of(server)
    pause(connect, databases=[app_database], holder="test")
    alter(server, "ALTER DATABASE {} OWNER TO postgres", app_database)

    superuser = server.connect_factory("postgres")
    resumed = resume(superuser, databases=[app_database], holder="test")

    assert len(resumed.thawed) == 1
    alter(server, "ALTER DATABASE {} OWNER TO app_owner", app_database)
    assert settings_of(server) == before


def test_preflight_and_status_change_nothing(connect, server, app_database):
    before = settings_of(server)

    preflight(connect, databases=[app_database], holder="test")
    status(connect)

    assert settings_of(server) == before
