"""Who may write the journal's rows, and who counts as one of us: by what can really be done."""

from __future__ import annotations

import re
from typing import Any

import psycopg
import pytest

from devtools.asking import pause
from devtools.pgserver import Server
from devtools.rights import create_application_database, keep_private
from pg_freeze import attest, install, status
from tests.server.names import PRIVILEGES, READ_ONLY, SCHEMA
from tests.server.test_trust import cli

pytestmark = pytest.mark.pg("!=15,!=16,!=17")
GRANTS = {
    "everybody": (f"GRANT INSERT ON {SCHEMA}.blockers TO PUBLIC", "PUBLIC"),
    "one table": (f"GRANT UPDATE ON {SCHEMA}.attestations TO app", "app"),
    "one column": (f"GRANT UPDATE (level) ON {SCHEMA}.attestations TO app", "app"),
    "to delete": (f"GRANT DELETE ON {SCHEMA}.freezes TO freezer", "freezer"),
    "to truncate": (f"GRANT TRUNCATE ON {SCHEMA}.blockers TO app", "app"),
    "to let others": (f"GRANT INSERT ON {SCHEMA}.tickets TO freezer WITH GRANT OPTION", "freezer"),
    "a sequence": (f"GRANT UPDATE ON SEQUENCE {SCHEMA}.tickets_ticket_seq TO app", "app"),
    "by default": ("ALTER DEFAULT PRIVILEGES GRANT INSERT ON TABLES TO app", "app"),
}


@pytest.mark.parametrize("grant", GRANTS)
def test_a_journal_that_somebody_may_write_to_who_was_not_named_is_not_believed(own_server, grant):
    statement, role = GRANTS[grant]
    if grant == "by default":
        own_server.execute(statement.encode())
    install(own_server.control, grant=["freezer"]) if grant != "by default" else cli(own_server, "install")
    if grant != "by default":
        assert cli(own_server, "status")[0] == 0
        own_server.execute(statement.encode())

    for words, code in ((("status",), 3), (("status", "--check"), 8), (("guard",), 1), (("history",), 3)):
        found, said = cli(own_server, *words)
        assert (found, f"role '{role}' may" in " ".join(said.split())) == (code, True), said

    # What it says is what to type.
    typed = re.search(r"REVOKE ALL ON ALL TABLES .*?; REVOKE ALL ON ALL SEQUENCES .*?;", " ".join(said.split()))
    assert typed is not None
    own_server.execute(typed[0].encode())
    assert cli(own_server, "status")[0] == 0
    install(own_server.control, grant=["freezer"])
    assert cli(own_server, "status", user="freezer")[0] == 0


def test_whom_install_names_is_believed_and_so_are_its_members(own_server):
    own_server.execute("CREATE ROLE freezers; GRANT freezers TO freezer")
    install(own_server.control, grant=["freezers"])
    create_application_database(own_server, "app")
    freezer = own_server.connect_factory("freezer")

    assert pause(freezer, databases=["app"], holder="h", checkpoint=False).holds
    assert status(own_server.control).freezes[0].holder == "h"


@pytest.mark.parametrize("strategy", [READ_ONLY, PRIVILEGES])
def test_who_writes_to_every_table_of_the_server_writes_nothing_here(own_server, strategy):
    where = "app" if strategy == PRIVILEGES else "postgres"
    create_application_database(own_server, "app")
    keep_private(own_server, "app")
    own_server.create_role("etl")
    own_server.execute("GRANT pg_write_all_data, pg_read_all_data TO etl; ALTER ROLE etl BYPASSRLS")
    inside = own_server.connect_factory("postgres", where)
    options: dict[str, Any] = {"databases": ["app"], "holder": "h"}
    pause(inside, strategy=strategy, roles=["app"] if where == "app" else [], checkpoint=False, **options)
    attest.before(inside, **options)
    own_server.execute(
        f"INSERT INTO {SCHEMA}.blockers (token, pid, backend_start, ended) SELECT token, 1, now(), true"
        f" FROM {SCHEMA}.freezes",
        where,
    )

    with own_server.connect_factory("etl", where)() as etl:
        for table in (
            "tickets",
            "freezes",
            "frozen_databases",
            "prior_settings",
            "blockers",
            "attestations",
            "revoked",
        ):
            columns = f"SELECT attname FROM pg_attribute WHERE attrelid = '{SCHEMA}.{table}'::regclass AND attnum = 2"
            ((column,),) = etl.execute(columns.encode()).fetchall()
            if etl.execute(f"SELECT FROM {SCHEMA}.{table}".encode()).rowcount:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    etl.execute(f"UPDATE {SCHEMA}.{table} SET {column} = {column}".encode())
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    etl.execute(f"DELETE FROM {SCHEMA}.{table}".encode())
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            etl.execute(f"UPDATE {SCHEMA}.frozen_databases SET active = false".encode())
    assert status(own_server.control, connect_to=own_server.control).freezes[0].holds


def journal_of(server: Server, owner: str) -> None:
    server.create_role(owner)
    server.execute(f"GRANT CREATE ON DATABASE postgres TO {owner}")
    install(server.connect_factory(owner), grant=["freezer"])


def trusts(server: Server) -> bool:
    code, said = cli(server, "status", user="freezer")
    assert (code == 3) == ("belongs to role" in said)
    return code == 0


@pytest.mark.pg(">=16")
@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ("INHERIT FALSE, SET FALSE", False),
        ("INHERIT TRUE, SET FALSE", True),
        ("INHERIT FALSE, SET TRUE", True),
        # It can grant itself the rest.
        ("INHERIT FALSE, SET FALSE, ADMIN TRUE", True),
    ],
)
def test_a_membership_counts_for_what_can_be_done_with_it(own_server, options, counts):
    journal_of(own_server, "other")
    own_server.execute(f"GRANT freezer TO other WITH {options}".encode())
    assert trusts(own_server) is counts


@pytest.mark.pg(">=16")
@pytest.mark.parametrize(
    ("first", "second", "counts"),
    [
        ("INHERIT FALSE, SET TRUE", "INHERIT TRUE, SET FALSE", True),
        ("INHERIT TRUE, SET FALSE", "INHERIT FALSE, SET TRUE", False),
        ("INHERIT TRUE, SET FALSE", "INHERIT FALSE, SET FALSE, ADMIN TRUE", True),
        ("INHERIT FALSE, SET FALSE", "INHERIT TRUE, SET TRUE", False),
        ("INHERIT FALSE, SET FALSE, ADMIN TRUE", "INHERIT FALSE, SET TRUE", True),
    ],
)
def test_a_way_of_two_memberships_counts_if_it_can_be_gone(own_server, first, second, counts):
    journal_of(own_server, "other")
    own_server.execute(f"CREATE ROLE middle; GRANT middle TO other WITH {first}".encode())
    own_server.execute(f"GRANT freezer TO middle WITH {second}".encode())
    assert trusts(own_server) is counts
    # As PostgreSQL itself sees it.
    with own_server.connect_factory("other")() as other:
        for attempt in ("GRANT middle TO other", "GRANT freezer TO other", "SET ROLE middle", "GRANT freezer TO other"):
            try:
                other.execute(attempt.encode())
            except psycopg.Error:
                continue
        query = "SELECT pg_has_role('freezer', 'USAGE') OR pg_has_role('freezer', 'SET')"
        assert other.execute(query.encode()).fetchone() == (counts,)


@pytest.mark.pg("<16")
def test_before_16_each_member_counts(own_server):
    journal_of(own_server, "other")
    own_server.execute("ALTER ROLE other NOINHERIT")
    assert not trusts(own_server)
    own_server.execute("GRANT freezer TO other")
    assert trusts(own_server)
