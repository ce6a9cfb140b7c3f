"""Nothing in a strange database keeps a session of ours for ever, and what rightly takes long is not cut."""

import time
from functools import partial

import pytest

from devtools.asking import frozen
from pg_freeze import FreezeError
from pg_freeze.control import control, unhurried
from pg_freeze.entrance import entered
from tests.server.names import CRASH_ONLY, LOCK, QUIESCED

pytestmark = pytest.mark.every_version


def milliseconds(conn, setting):
    return conn.execute("SELECT setting::integer FROM pg_settings WHERE name = %s", (setting,)).fetchone()[0]


@pytest.fixture
def into(server):
    return lambda name: server.connect_factory("freezer", name)()


def test_statements_and_waits_for_locks_end_by_themselves_but_for_those_that_rightly_take_long(
    server, connect, into, app_database
):
    server.execute(f"ALTER DATABASE {app_database} SET statement_timeout = 0")
    with control(connect, "look") as outside, entered(outside, into, app_database, "look") as inside:
        for conn in (outside, inside):
            bounds = [milliseconds(conn, f"{what}_timeout") for what in ("statement", "lock")]
            assert all(bounds)
            with unhurried(conn):
                assert milliseconds(conn, "statement_timeout") == 0
            assert [milliseconds(conn, f"{what}_timeout") for what in ("statement", "lock")] == bounds


def test_a_statement_that_is_cut_is_an_error_that_says_so(connect, into, app_database):
    with (
        pytest.raises(FreezeError, match="statement timeout"),
        control(connect, "look") as outside,
        entered(outside, into, app_database, "look", statement_timeout="50ms") as inside,
    ):
        inside.execute("SELECT pg_sleep(60)")


def test_a_look_under_locks_that_somebody_keeps_waiting_does_not_prolong_the_outage_and_proves_nothing(
    connect, into, app_database, super_connect, app_connect
):
    app_connect(app_database).execute("CREATE TABLE t (n integer)")
    wicked = super_connect(app_database)
    block = frozen(connect, into, databases=[app_database], holder="h", strategy=LOCK, checkpoint=False)
    super_connect(app_database).execute("GRANT ALL ON t TO freezer")

    with block as hold:
        wicked.execute("BEGIN; LOCK TABLE pg_catalog.pg_namespace IN ACCESS EXCLUSIVE MODE")
        began = time.monotonic()

    assert time.monotonic() - began < 20
    wicked.execute("ROLLBACK")
    assert hold.attestation.level == CRASH_ONLY
    assert "unlocked" in [one.code for one in hold.attestation.violations]
    assert hold.attestation.unseen


def test_under_locks_nothing_connects_but_what_nobody_waits_for_and_a_session_that_was_ended_is_replaced(
    connect, into, app_database, super_connect, app_connect
):
    app_connect(app_database).execute("CREATE TABLE t (n integer)")
    superuser = super_connect(app_database)
    superuser.execute("GRANT ALL ON t TO freezer")
    under_locks = []

    def noted(name):
        held = superuser.execute(
            "SELECT count(*) FROM pg_locks WHERE mode = 'ExclusiveLock' AND relation = 't'::regclass"
        )
        under_locks.append(bool(held.fetchone()[0]))
        return into(name)

    block = partial(frozen, connect, databases=[app_database], holder="h", strategy=LOCK, checkpoint=False)
    with block(noted):
        pass
    # The sizes are recorded beside the command.
    assert under_locks.count(True) <= 1
    with block(into) as hold:
        superuser.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'pg-freeze look'"
        )

    assert (hold.attestation.level, hold.attestation.unseen) == (QUIESCED, ())
