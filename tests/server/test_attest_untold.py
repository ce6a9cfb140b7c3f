"""What a look does not tell proves nothing: each of its fields in turn, and the level that is left at most."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from devtools.asking import pause
from pg_freeze import attest
from pg_freeze.attestation import Level
from pg_freeze.judge import Evidence, judge
from pg_freeze.look import Look
from pg_freeze.wal import Wal
from tests.server.names import SCHEMA

#: What becomes of a strict attestation if one look has no answer there. None: it cannot be read as a look at all.
WITHOUT: dict[str, Level | None] = {
    **dict.fromkeys(("at", "lsn", "xid", "databases", "overrides", "lingering", "transactions", "granted"), None),
    **dict.fromkeys(("unlocked", "inside"), None),
    **dict.fromkeys(("server_started", "state", "strategy", "admit", "locked", "lease_until"), Level.CRASH_ONLY),
    # Of no consequence: they tell more of what is known already.
    **dict.fromkeys(("checkpoint_lsn", "thawed_by", "restoring_at"), Level.STRICT),
}
#: The same for what a look saw of each database.
OF_A_DATABASE: dict[str, Level] = {
    "admits": Level.STRICT,
    "read_only": Level.CRASH_ONLY,
    "version": Level.CRASH_ONLY,
    "settings": Level.CRASH_ONLY,
    "tablespace": Level.STRICT,
    "name": Level.STRICT,
}


@pytest.fixture
def looks(connect, server, app_database) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two looks of a freeze of which everything was seen, and nothing had changed."""
    options: dict[str, Any] = {"databases": [app_database], "holder": "untold"}
    pause(connect, admit="nobody", **options)
    attest.before(connect, **options)
    found = attest.after(connect, **options)
    ((first, second),) = server.execute(
        f"SELECT before, after FROM {SCHEMA}.attestations WHERE id = {found.id}".encode()
    )
    assert judged(first, second) is Level.STRICT
    return first, second


def judged(first: dict[str, Any], second: dict[str, Any], databases: int = 1) -> Level | None:
    """Return the level where the WAL says that nothing was written; None where a look is none."""
    try:
        looks = Look.from_json(first), Look.from_json(second)
    except (TypeError, ValueError, LookupError):
        return None
    return judge(*looks, Evidence(0, {}, Wal(), databases)).level


def test_each_field_that_is_missing_leaves_the_level_of_a_table(looks):
    first, second = looks
    assert set(WITHOUT) == {one.name for one in fields(Look)}
    for name, level in WITHOUT.items():
        assert judged({**first, name: None}, second) is level, f"first {name}"
        assert judged(first, {**second, name: None}) is level, f"second {name}"
        without = {key: value for key, value in first.items() if key != name}
        assert judged(without, second) is None, name
        assert judged({**first, "more": None}, second) is None


def test_what_was_not_seen_of_a_database_leaves_the_level_of_a_table(looks):
    first, second = looks
    for name, level in OF_A_DATABASE.items():
        unseen = [{**one, name: None} for one in second["databases"]]
        assert judged(first, {**second, "databases": unseen}) is level, name
    assert judged({**first, "databases": []}, second) is Level.CRASH_ONLY
    assert judged(first, {**second, "databases": []}) is Level.CRASH_ONLY
    assert judged(first, second, databases=2) is Level.CRASH_ONLY
    assert judged({**first, "state": "thawing"}, second) is Level.CRASH_ONLY


def test_what_could_not_be_entered_is_not_called_strict_unless_nobody_could(looks):
    first, second = looks
    admits = [{**one, "admits": True} for one in first["databases"]]
    for one in (first, second):
        assert all(inside["unseen"] for inside in one["inside"]), "this freeze admits nobody"
    assert judged({**first, "databases": admits}, {**second, "databases": admits}) is not Level.STRICT


def test_a_role_that_may_not_see_the_sessions_any_more_attests_nothing(connect, server, app_database):
    options: dict[str, Any] = {"databases": [app_database], "holder": "untold"}
    pause(connect, **options)
    attest.before(connect, **options)
    ((roles,),) = server.execute(
        "SELECT array_agg(g.rolname::text) FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid"
        " WHERE m.member = 'freezer'::regrole AND pg_has_role(g.oid, 'pg_read_all_stats', 'USAGE')"
    )
    for role in roles:
        server.execute(f'REVOKE "{role}" FROM freezer'.encode())
    try:
        assert attest.after(connect, **options).level is Level.CRASH_ONLY
    finally:
        for role in roles:
            server.execute(f'GRANT "{role}" TO freezer'.encode())


def test_of_several_databases_one_that_was_dropped_before_the_first_look_is_missed(own_server, new_database):
    names = [new_database(own_server) for _ in range(2)]
    options: dict[str, Any] = {"databases": names, "holder": "untold"}
    pause(own_server.control, checkpoint=False, **options)
    own_server.execute(f'DROP DATABASE "{names[0]}" WITH (FORCE)'.encode())
    attest.before(own_server.control, **options)
    assert attest.after(own_server.control, **options).level is Level.CRASH_ONLY
