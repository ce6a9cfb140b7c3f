"""Whoever may write the journal writes odd values into every column of it: nobody who reads them is stopped."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest
from psycopg import sql

from devtools.asking import pause
from devtools.pgserver import Server
from devtools.rights import create_application_database
from pg_freeze import FreezeError, attest, history, install, resume, status
from pg_freeze.cli.show import counted
from tests.server.names import SCHEMA
from tests.server.test_trust import cli

pytestmark = [pytest.mark.pg("!=15,!=16,!=17"), pytest.mark.timeout(600)]
DEEP = "[" * 900 + "]" * 900
DIGITS = "1" + "0" * 5000
OBJECTS: list[Any] = [
    [5],
    ["x"],
    [None],
    [[]],
    [{}],
    [{"pid": "x"}],
    [{"pid": 1, "backend_start": "infinity"}],
    [{"pid": 1, "backend_start": "294276-01-01T00:00:00Z"}],
    [{"pid": 1, "backend_start": None, "xact_start": "-infinity"}],
    [{"pid": 1, "more": {"and": ["more"]}}],
    [{"what": 1, "why": None}],
    [{"severity": "odd", "code": "x", "message": "\u001b[2J\n", "remedy": "x"}],
    [{"code": "x", "what": "y", "who": 1, "when": None, "more": 1}],
    {"a": "b"},
    {"idle": -1},
    {"idle": [1, 2]},
    {"idle": []},
    {"lsn": "0/0", "xid": 1},
    {"lsn": "x", "xid": "x"},
    {"1": {"name": 1, "relations": 5}},
]
VALUES: dict[str, list[str]] = {
    "timestamptz": ["infinity", "-infinity", "294276-12-31", "4713-01-01 BC", "0001-01-01", "9998-12-31", "1970-01-02"],
    "text": ["", "\u001b[2J\u001b]0;x\u0007\n  Thaw it with \u202e %s {} $(id)", "x" * 100_000],
    "text[]": ["{}", "{NULL}", "{{a},{b}}", "[5:6]={a,b}", '{"",""}', '{"\\n\u001b[2J"}'],
    "jsonb": ["null", "5", '"x"', "[]", "{}", DIGITS, f"[{DIGITS}]", DEEP, *map(json.dumps, OBJECTS)],
    "bigint": ["-1", "0", str(2**63 - 1)],
    "smallint": ["-1", "0"],
    "integer": ["-1", "0", str(2**31 - 1)],
    "oid": ["0", "1", str(2**32 - 1)],
    "boolean": ["true", "false"],
    "uuid": ["00000000-0000-0000-0000-000000000000"],
    "pg_lsn": ["0/0", "FFFFFFFF/FFFFFFFF"],
}
COLUMNS = """
    SELECT c.relname, a.attname, format_type(a.atttypid, NULL) FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
     WHERE c.relnamespace = 'pgfreeze'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
       AND a.attidentity <> 'a' ORDER BY 1, 2"""
NAMES = {"timestamp with time zone": "timestamptz"}


@pytest.fixture
def site(own_server: Server) -> Server:
    own_server.create_role("monitor")
    install(own_server.control, grant=["freezer", "monitor"])
    for name in ("one", "two"):
        create_application_database(own_server, name)
    freezer = own_server.connect_factory("freezer")
    for holder, name in (("h", "one"), ("other", "two")):
        pause(freezer, databases=[name], holder=holder, checkpoint=False, dead_man=False)
        attest.before(freezer, databases=[name], holder=holder)
    own_server.execute(
        f"INSERT INTO {SCHEMA}.blockers (token, pid, backend_start, ended)"
        f" SELECT token, 0, '-infinity', false FROM {SCHEMA}.freezes"
    )
    return own_server


def read_all(server: Server, what: object) -> None:
    """Look at everything, as a superuser, and find what nobody has touched."""
    freezes = status(server.control, connect_to=server.control).freezes
    assert "other" in [one.holder for one in freezes if "two" in one.databases], what
    shown = (*freezes, *history(server.control))
    json.dumps([one.as_dict() for one in shown])
    assert all(counted(one.terminated) for one in shown), what


def test_no_value_in_any_column_stops_who_reads(site):
    (token, ticket), *_ = site.execute(f"SELECT token, ticket FROM {SCHEMA}.freezes WHERE holder = 'h'")
    passed = []
    with site.connect_factory("monitor")() as monitor, site.control() as owner:
        for table, column, kind in site.execute(COLUMNS):
            where = sql.SQL("ticket = {}").format(ticket) if table == "tickets" else sql.SQL("token = {}").format(token)
            row = {"t": sql.Identifier(SCHEMA, table), "c": sql.Identifier(column), "where": where}
            was = owner.execute(sql.SQL("SELECT {c}::text FROM {t} WHERE {where} LIMIT 1").format(**row)).fetchone()
            for value in (None, *VALUES[NAMES.get(kind, kind)]):
                try:
                    done = monitor.execute(sql.SQL("UPDATE {t} SET {c} = %s WHERE {where}").format(**row), (value,))
                except psycopg.Error:
                    assert not monitor.broken, (table, column, value)
                    continue
                if done.rowcount and was is not None:
                    passed.append((table, column))
                    read_all(site, (table, column, value))
                    back = "BEGIN; ALTER TABLE {t} DISABLE TRIGGER USER; UPDATE {t} SET {c} = {was} WHERE {where};"
                    back += "ALTER TABLE {t} ENABLE TRIGGER USER; COMMIT"
                    owner.execute(sql.SQL(back).format(was=sql.Literal(was[0]), **row))
    assert {table for table, _ in passed} >= {"tickets", "freezes", "frozen_databases", "blockers", "attestations"}
    for words in (("status",), ("history",), ("guard",), ("status", "--json"), ("history", "--json")):
        code, said = cli(site, *words)
        assert (code, "Traceback" in said) == (0, False), said
    freezer = site.connect_factory("freezer")
    for name, holder in (("one", "h"), ("two", "other")):
        assert resume(freezer, databases=[name], holder=holder).thawed
    assert status(site.control).freezes == ()


def test_a_look_that_nobody_has_written_attests_nothing_and_keeps_back_no_other(site):
    freezer = site.connect_factory("freezer")
    with site.connect_factory("monitor")() as monitor:
        monitor.execute(
            f"UPDATE {SCHEMA}.attestations a SET before = jsonb_build_object('lsn', '0/0', 'xid', 1)"
            f" FROM {SCHEMA}.freezes f WHERE f.token = a.token AND f.holder = 'h'"
        )
    for again in (attest.after, attest.before):
        with pytest.raises(FreezeError, match="none that this program has written"):
            again(freezer, databases=["one"], holder="h")
    assert attest.after(freezer, databases=["two"], holder="other").level is not None


@pytest.mark.parametrize("column", ["began_at", "drawn_at"])
def test_no_ticket_of_the_future_voids_the_attempts_to_come(site, column):
    with site.connect_factory("monitor")() as monitor, pytest.raises(psycopg.Error, match="no ticket is drawn"):
        monitor.execute(f"UPDATE {SCHEMA}.tickets SET {column} = '9000-01-01'".encode())


def test_no_time_of_the_future_has_a_thaw_wait_for_readers(site):
    with site.connect_factory("monitor")() as monitor, pytest.raises(psycopg.Error, match="restored at such a time"):
        monitor.execute(f"UPDATE {SCHEMA}.frozen_databases SET restored_at = '9000-01-01'".encode())
