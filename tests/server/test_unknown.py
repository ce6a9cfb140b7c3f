"""What cannot be known is called unknown, with what to type: by status, guard and resume, in words and exit codes."""

from __future__ import annotations

import json
from datetime import timedelta
from functools import partial

import pytest
from psycopg import sql

from devtools.asking import frozen, pause
from devtools.pgserver import Server
from devtools.rights import create_application_database, keep_private
from pg_freeze import install, thaw_expired
from tests.server.names import LOCK, MARK, PRIVILEGES, SCHEMA
from tests.server.test_trust import cli

pytestmark = pytest.mark.pg("!=15,!=16,!=17")
CLEAR, FAILED, UNEXPLAINED, FROZEN, UNKNOWN = 0, 1, 6, 7, 8


class Site:
    """A server with a superuser's journal, and a database ``app`` that the role app_owner owns."""

    def __init__(self, server: Server) -> None:
        self.server = server
        install(server.control, grant=["freezer"])
        create_application_database(server, "app")
        keep_private(server, "app")
        server.execute("ALTER SCHEMA public OWNER TO app_owner", "app")

    def check(self, *words: str, user: str | None = None) -> tuple[str, int]:
        """Return the word and the exit code of ``status --check``."""
        code, said = cli(self.server, "status", "--check", "--json", *words, user=user)
        document = json.loads(said.splitlines()[-1])
        assert document["exit_code"] == code
        return document["check"], code

    def resume(self, user: str | None = None) -> tuple[int, str]:
        return cli(self.server, "resume", "--database", "app", "--holder", "h", user=user)

    def freeze_by_privileges(self) -> None:
        inside = self.server.connect_factory("postgres", "app")
        pause(inside, databases=["app"], holder="h", strategy=PRIVILEGES, checkpoint=False, dead_man=False)


@pytest.fixture
def site(own_server: Server) -> Site:
    return Site(own_server)


def test_what_was_frozen_and_has_no_journal_any_more_is_not_called_clear(site):
    pause(site.server.control, databases=["app"], holder="h", checkpoint=False, dead_man=False)
    assert site.check() == ("frozen", FROZEN)
    site.server.execute(f"DROP SCHEMA {SCHEMA} CASCADE")

    assert site.check() == ("unexplained", UNEXPLAINED)
    code, said = site.resume()
    assert code == UNEXPLAINED
    assert "ALTER DATABASE" in said
    assert "is not frozen" not in cli(site.server, "status", "--database", "app")[1]


def test_a_template_that_is_read_only_by_default_is_not_hidden(site):
    site.server.execute(
        "ALTER DATABASE app SET default_transaction_read_only = on; ALTER DATABASE app IS_TEMPLATE true"
    )
    assert site.check() == ("unexplained", UNEXPLAINED)


def test_a_role_that_is_read_only_by_its_own_wish_is_no_sign_of_a_freeze(site):
    with site.server.connect_factory("app", "app")() as app:
        app.execute("ALTER ROLE app IN DATABASE app SET default_transaction_read_only = on")
    assert site.check() == ("clear", CLEAR)


def test_a_freeze_from_inside_by_a_role_whose_code_we_do_not_run_is_unknown(site):
    site.server.execute("GRANT app_owner TO freezer")
    freezer = site.server.connect_factory("freezer", "app")
    site.server.execute("GRANT CREATE ON DATABASE app TO freezer")
    install(freezer)
    pause(freezer, databases=["app"], holder="h", strategy=PRIVILEGES, checkpoint=False, dead_man=False)

    # It may have lost the right to make a journal since. It still owns one.
    site.server.execute("REVOKE CREATE ON DATABASE app FROM freezer; REVOKE app_owner FROM freezer")
    assert site.check() == ("unknown", UNKNOWN)
    code, said = cli(site.server, "status")
    assert code == 0
    assert "not known whether app is frozen" in said
    assert "log in as freezer" in said
    assert site.resume()[0] == UNKNOWN
    assert cli(site.server, "guard")[0] == FAILED
    assert thaw_expired(site.server.control, site.server.control) == ()


def test_a_mark_that_anybody_may_make_for_himself_makes_nothing_unknown(site):
    with site.server.connect_factory("app", "app")() as app:
        app.execute(f"ALTER ROLE app IN DATABASE app SET application_name = '{MARK}'")

    assert site.check() == ("clear", CLEAR)
    assert site.resume()[0] == cli(site.server, "guard")[0] == CLEAR


@pytest.mark.parametrize("anew", [False, True], ids=["dropped", "dropped and installed anew"])
def test_a_journal_inside_that_was_dropped_leaves_a_mark_that_is_not_overlooked(site, anew):
    site.freeze_by_privileges()
    assert site.check() == ("frozen", FROZEN)
    site.server.execute(f"DROP SCHEMA {SCHEMA} CASCADE", "app")
    if anew:
        install(partial(site.server.control, "app"))

    assert site.check() == ("unknown", UNKNOWN)
    code, said = site.resume()
    assert code == UNKNOWN
    assert "RESET application_name" in said
    assert cli(site.server, "guard")[0] == FAILED


def test_a_freeze_whose_journal_is_in_another_maintenance_database_is_unknown(site):
    freezer = site.server.connect_factory("freezer")
    site.server.create_database("other")
    site.server.execute(f"GRANT {'pg_maintain' if site.server.version >= 17 else 'pg_write_all_data'} TO freezer")
    with frozen(
        freezer,
        lambda name: site.server.connect_factory("freezer", name)(),
        databases=["app"],
        holder="h",
        strategy=LOCK,
        checkpoint=False,
        lease=timedelta(minutes=5),
    ):
        assert site.check() == ("frozen", FROZEN)
        assert site.check("--maintenance-database", "other", user="freezer") == ("unknown", UNKNOWN)
        said = cli(site.server, "status", "--maintenance-database", "other", user="freezer")[1]
        assert "pg-freeze status --maintenance-database postgres" in said
    assert site.check() == ("clear", CLEAR)


def test_a_journal_that_may_not_be_read_or_is_not_trusted_is_unknown(site):
    pause(site.server.control, databases=["app"], holder="h", checkpoint=False, dead_man=False)
    assert site.check(user="app") == ("unknown", UNKNOWN)
    code, said = cli(site.server, "status", user="app")
    assert code == 3
    assert "it is not known what is frozen" in said
    assert "read-only by default: 'app'" in said
    assert "pg-freeze install --grant app" in said
    assert cli(site.server, "guard", user="app")[0] == FAILED

    site.server.execute(f"GRANT CREATE ON SCHEMA {SCHEMA} TO app")
    assert site.check() == ("unknown", UNKNOWN)
    assert cli(site.server, "guard")[0] == FAILED
    assert site.resume()[0] != 0


def test_a_closed_database_of_which_no_journal_knows_is_not_thawed_without_a_word(site):
    site.server.execute(sql.SQL("ALTER DATABASE app ALLOW_CONNECTIONS false"))
    assert site.check() == ("unexplained", UNEXPLAINED)
    assert site.resume()[0] == UNEXPLAINED
