"""Rows of the journal: what somebody who may write them can have a superuser do, who thaws."""

from __future__ import annotations

import json

import psycopg
import pytest

from devtools.asking import frozen, pause
from devtools.pgserver import Server
from devtools.rights import create_application_database
from pg_freeze import install, resume, status, thaw_expired
from tests.server.names import PRIVILEGES, SCHEMA

pytestmark = pytest.mark.pg("!=15,!=16,!=17")
TOKEN = "11111111-1111-1111-1111-111111111111"
TICKET = f"""INSERT INTO {SCHEMA}.tickets (act, holder, databases, began_at)
    VALUES ('pause', 'h', '{{x}}', now()) RETURNING ticket"""
DENIED = psycopg.errors.InsufficientPrivilege


@pytest.fixture
def site(own_server: Server) -> Server:
    """A server with a superuser's journal that the role monitor may use, who may do nothing else."""
    own_server.create_role("monitor")
    own_server.create_database("foreign", "postgres")
    install(own_server.control, grant=["freezer", "monitor"])
    return own_server


def begin(conn: psycopg.Connection, **columns: object) -> None:
    """Write a freeze as no routine of ours would."""
    drawn = conn.execute(TICKET).fetchone()
    assert drawn is not None
    row = {
        "token": TOKEN,
        "ticket": drawn[0],
        "holder": "h",
        "databases": ["x"],
        "strategy": "read-only",
        "admit": "readers",
        "state": "frozen",
        "requested_at": "now",
        "changed_at": "now",
        "lease_until": "now",
        **columns,
    }
    values = ", ".join(["%s"] * len(row))
    conn.execute(
        f"INSERT INTO {SCHEMA}.freezes ({', '.join(row)}) VALUES ({values})".encode(),
        tuple(row.values()),
    )


@pytest.mark.parametrize("writer", ["the freezer", "somebody without the journal"])
def test_nobody_writes_by_pg_write_all_data_what_a_superuser_gives_back(site, writer):
    user = "freezer" if "freezer" in writer else "app"
    site.execute(f"GRANT pg_write_all_data, pg_read_all_data TO {user}; ALTER ROLE {user} BYPASSRLS")
    with site.connect_factory(user)() as conn:
        if user == "app":
            with pytest.raises(DENIED, match="permission denied for function"):
                begin(conn, strategy=PRIVILEGES)
            with site.control() as superuser:
                begin(superuser, strategy=PRIVILEGES)
        else:
            begin(conn, strategy=PRIVILEGES)
        entry = {"level": 1, "grantor": 10, "grantee": 0, "grantable": False}
        entry["privilege"] = f"USAGE ON SCHEMA public TO PUBLIC; ALTER ROLE {user} SUPERUSER; --"
        with pytest.raises(DENIED, match=r"only the owner of the journal|permission denied for function owned"):
            conn.execute(
                f"INSERT INTO {SCHEMA}.revoked"
                " SELECT %s, 'pg_namespace'::regclass, 'public'::regnamespace, 0, 1, NULL, %s",
                (TOKEN, json.dumps([entry])),
            )


def test_what_is_no_privilege_is_not_granted(own_server):
    create_application_database(own_server, "app")
    connect = own_server.connect_factory("postgres", "app")
    own_server.execute("CREATE TABLE t (); GRANT INSERT ON t TO app", "app")
    pause(connect, databases=["app"], holder="h", strategy=PRIVILEGES, checkpoint=False)
    own_server.execute(
        f"UPDATE {SCHEMA}.revoked SET entries = entries"
        " || jsonb_build_object('level', 1, 'grantor', owner, 'grantee', 0,"
        " 'privilege', 'INSERT ON t TO app; ALTER ROLE app SUPERUSER; --',"
        " 'grantable', false)",
        "app",
    )

    resume(connect, databases=["app"], holder="h")

    assert own_server.execute("SELECT rolsuper FROM pg_roles WHERE rolname = 'app'") == [(False,)]
    assert own_server.execute("SELECT has_table_privilege('app', 't', 'INSERT')", "app") == [(True,)]


def test_a_superuser_who_thaws_touches_only_what_the_writer_of_the_row_could_alter(site):
    site.create_database("closed", "postgres")
    site.execute("ALTER DATABASE closed ALLOW_CONNECTIONS false")
    boss = site.control("foreign")
    victim = json.dumps(
        [
            {
                "pid": boss.info.backend_pid,
                "backend_start": site.execute(
                    f"SELECT backend_start::text FROM pg_stat_activity WHERE pid = {boss.info.backend_pid}"
                )[0][0],
            }
        ]
    )
    with site.connect_factory("monitor")() as conn:
        with pytest.raises(DENIED, match="a session that holds locks"):
            begin(conn, sessions=victim)
        begin(conn)
        for name, closed in (("closed", True), ("template0", True), ("foreign", True), ("foreign", False)):
            with pytest.raises(DENIED, match="must be owner of database"):
                conn.execute(
                    f"INSERT INTO {SCHEMA}.frozen_databases (token, database, name, closed)"
                    " SELECT %s, oid, datname, %s FROM pg_database WHERE datname = %s",
                    (TOKEN, closed, name),
                )
        for role in ("NULL", "postgres", "app"):
            with pytest.raises(DENIED, match="to alter setting"):
                conn.execute(
                    f"INSERT INTO {SCHEMA}.prior_settings SELECT %s, d.oid, COALESCE(r.oid, 0), 'on' FROM pg_database d"
                    " LEFT JOIN pg_roles r ON r.rolname = %s WHERE datname = 'foreign'",
                    (TOKEN, role),
                )

    thaw_expired(site.control, site.control)

    assert boss.execute("SELECT 1").fetchall() == [(1,)]
    assert site.execute("SELECT datname FROM pg_database WHERE NOT datallowconn ORDER BY 1") == [
        ("closed",),
        ("template0",),
    ]
    assert site.execute("SELECT count(*) FROM pg_db_role_setting") == [(0,)]


def test_what_was_frozen_and_thawed_is_not_frozen_again_by_its_row(site, new_database):
    database = new_database(site)
    freezer = site.connect_factory("freezer")
    pause(freezer, databases=[database], holder="h", checkpoint=False)
    resume(freezer, databases=[database], holder="h")
    with site.connect_factory("monitor")() as conn:
        for change in (
            "freezes SET state = 'frozen'",
            "freezes SET strategy = 'lock'",
            "freezes SET sessions = '[{}]'",
            "frozen_databases SET active = true",
            "frozen_databases SET closed = true",
            "frozen_databases SET database = 1",
            "prior_settings SET restored_at = NULL",
            "prior_settings SET value = 'on'",
        ):
            with pytest.raises(DENIED):
                conn.execute(f"UPDATE {SCHEMA}.{change}".encode())


@pytest.mark.parametrize(
    "columns",
    [
        {"sessions": "{}"},
        {"sessions": '[{"pid": "x"}]'},
        {"lingering": "5"},
        {"lingering": '[{"pid": "x"}]'},
        {"lingering": '[{"pid": 1, "backend_start": "01/02/2026"}]'},
        {"lingering": '[{"pid": 1, "backend_start": "infinity"}]'},
        {"warnings": "[5]"},
        {"terminated": "[]"},
        {"terminated": '{"a": "b"}'},
        {"left_over": "[{}]"},
        {"lease_until": "infinity"},
        {"frozen_at": "-infinity"},
        {"databases": []},
        {"databases": [None]},
        {"roles": [None]},
    ],
    ids=str,
)
def test_no_row_keeps_the_others_from_being_read(server, columns):
    with server.control() as conn:
        with conn.transaction(force_rollback=True), pytest.raises(psycopg.Error):
            begin(conn, lease_until=columns.pop("lease_until", "now"), **columns)
    status(server.control)


def test_a_freeze_by_locks_is_recorded_and_let_go_with_whoever_may_use_the_journal(site, new_database):
    database = new_database(site)
    site.execute(f"GRANT {'pg_maintain' if site.version >= 17 else 'pg_write_all_data'} TO freezer")

    with frozen(
        site.connect_factory("freezer"),
        lambda name: site.connect_factory("freezer", name)(),
        databases=[database],
        holder="h",
        strategy="lock",
        checkpoint=False,
    ) as hold:
        assert hold.freeze.holds
    assert status(site.control).freezes == ()
