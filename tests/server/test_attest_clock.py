"""Who was there before a freeze is known by a list of them: the server's clock may have been set back since."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from devtools.asking import frozen, pause
from devtools.rights import checkpointer, keep_private
from pg_freeze import attest, lingering_of
from tests.server.clients import is_alive, ms
from tests.server.test_attest_commits import codes

pytestmark = pytest.mark.every_version

# Moving the barrier is moving the clock: a session that began while the clock was an hour ahead has begun, by its own
# word, after a barrier of now.
EARLIER = (
    "UPDATE pgfreeze.freezes SET barrier_at = barrier_at - interval '1 hour' WHERE state IN ('draining', 'frozen')"
)
LATER = "UPDATE pgfreeze.freezes SET barrier_at = barrier_at + interval '1 hour' WHERE state IN ('draining', 'frozen')"
HELD: dict[str, Any] = {"holder": "attested"}


def test_a_session_begun_while_the_clock_was_ahead_is_drained(connect, server, app_database, app_connect):
    writer = app_connect(app_database)
    writer.execute("BEGIN")
    told = []

    def set_back(progress: Any) -> None:
        if not told:
            server.execute(EARLIER)
        told.append(progress)

    freeze = pause(connect, databases=[app_database], drain_timeout=ms(300), progress=set_back, **HELD)

    assert dict(freeze.terminated) == {"drain-timeout": 1}, "its transaction was let finish, and then it was ended"
    assert not is_alive(writer)


def test_a_transaction_begun_while_the_clock_was_ahead_is_drained_under_revoked_privileges(
    server, app_database, app_connect
):
    keep_private(server, app_database)
    server.execute("GRANT app TO freezer")
    writer = app_connect(app_database)
    writer.execute("CREATE TABLE things (id integer)")
    writer.execute("BEGIN; INSERT INTO things VALUES (1)")
    told = []

    def set_back(progress: Any) -> None:
        if not told:
            server.execute(EARLIER, app_database)
        told.append(progress)

    def into(name: str = "postgres") -> psycopg.Connection[Any]:
        return server.connect_factory(checkpointer(server.version), name)()

    options = {"strategy": "privileges", "drain_timeout": ms(300), "progress": set_back, **HELD}
    with frozen(into, into, databases=[app_database], **options) as hold:
        assert dict(hold.freeze.terminated) == {"drain-timeout": 1}
    assert app_connect(app_database).execute("SELECT * FROM things").fetchall() == []


@pytest.mark.parametrize("admit", ["readers", "nobody"])
def test_a_session_begun_while_the_clock_was_ahead_breaks_the_proof(
    connect, server, app_database, super_connect, admit
):
    boss = super_connect(app_database)
    boss.execute("CREATE UNLOGGED TABLE unlogged (id integer)")
    pause(connect, databases=[app_database], admit=admit, **HELD)
    server.execute(EARLIER)
    attest.before(connect, databases=[app_database], **HELD)

    # An ordinary statement: nobody has told the session that the database is read-only.
    boss.execute("INSERT INTO unlogged VALUES (1)")
    found = attest.after(connect, databases=[app_database], **HELD)

    assert found.level == "crash-only"
    assert "lingering" in codes(found)
    pids = [one.pid for one in lingering_of(connect, databases=[app_database], **HELD)]
    assert pids == [boss.info.backend_pid]


def test_a_session_from_after_the_barrier_is_none_of_them_though_the_clock_was_set_back(
    connect, server, app_database, app_connect
):
    pause(connect, databases=[app_database], admit="readers", **HELD)
    server.execute(LATER)
    reader = app_connect(app_database)
    attest.before(connect, databases=[app_database], **HELD)
    found = attest.after(connect, databases=[app_database], **HELD)

    assert (found.level, found.violations) == ("quiesced", ())
    assert lingering_of(connect, databases=[app_database], **HELD) == ()
    assert is_alive(reader)


def test_where_nobody_is_admitted_whoever_is_there_breaks_the_proof(connect, server, app_database, super_connect):
    boss = super_connect(app_database)
    pause(connect, databases=[app_database], admit="nobody", **HELD)
    server.execute("UPDATE pgfreeze.freezes SET older = '[]' WHERE state = 'frozen'")
    attest.before(connect, databases=[app_database], **HELD)
    found = attest.after(connect, databases=[app_database], **HELD)

    assert is_alive(boss)
    assert (found.level, codes(found)) == ("crash-only", {"lingering"})
    assert "nobody was to be admitted" in found.reasons
