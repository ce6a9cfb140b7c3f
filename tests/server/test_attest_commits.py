"""A commit is in the WAL, and so in a copy, before its transaction leaves the lists of a server: it is found there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any, LiteralString

import psycopg
import pytest

from devtools.asking import frozen, pause
from devtools.pgserver import Server
from devtools.rights import checkpointer, create_application_database, create_roles, keep_private
from pg_freeze import attest, resume
from pg_freeze.attestation import Attestation
from tests.server.clients import background, wait_until

pytestmark = pytest.mark.every_version
OPTIONS: dict[str, Any] = {"holder": "attested", "checkpoint": False}
BY_THE_WAL = pytest.param("wal", marks=[pytest.mark.pg(">=15"), pytest.mark.pg("!=16,!=17")])
by_each_method = pytest.mark.parametrize("method", [BY_THE_WAL, "transaction-ids"])
NUMBERS = itertools.count(1)
WHO_WAITS: LiteralString = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@pytest.fixture(scope="module")
def away(pg_version: int) -> Iterator[Server]:
    """A server whose synchronous standby is away: whoever asks for it waits for ever at the end of a transaction."""
    settings = {"synchronous_standby_names": "away", "synchronous_commit": "local", "autovacuum": "off"}
    with Server(pg_version, settings=settings) as server:
        create_roles(server)
        server.execute("GRANT pg_read_all_data, app TO freezer")
        yield server


@pytest.fixture
def shop(away: Server) -> Iterator[str]:
    name = f"shop_{next(NUMBERS)}"
    create_application_database(away, name)
    keep_private(away, name)
    with psycopg.connect(away.dsn(name, "app"), autocommit=True) as app:
        app.execute("CREATE TABLE accounts (id integer PRIMARY KEY, money integer)")
        app.execute("INSERT INTO accounts VALUES (1, 100), (2, 0)")
    yield name
    resume(away.connect_factory(), databases=[name], holder="attested")
    for (gid,) in away.execute(f"SELECT gid FROM pg_prepared_xacts WHERE database = '{name}'"):
        away.execute(f"ROLLBACK PREPARED '{gid}'", dbname=name)
    away.drop_database(name)


@pytest.fixture
def readable(away: Server, method: str, shop: str) -> Iterator[None]:
    """Let the WAL be read, or not: from the maintenance database, and from the frozen one itself."""
    if method == "wal":
        for name in ("postgres", shop):
            away.execute("CREATE EXTENSION IF NOT EXISTS pg_walinspect SCHEMA pg_catalog", dbname=name)
            away.execute("GRANT EXECUTE ON FUNCTION pg_get_wal_records_info(pg_lsn, pg_lsn) TO freezer", dbname=name)
    yield
    away.execute("DROP EXTENSION IF EXISTS pg_walinspect")


@contextmanager
def that_waits(server: Server, session: psycopg.Connection[Any], ending: LiteralString) -> Iterator[Future[Any]]:
    """End a transaction with this statement, which waits for the standby, until the block is over."""
    assert not server.execute(WHO_WAITS)
    with background(lambda: session.execute(ending)) as done:
        try:
            wait_until(lambda: server.execute(WHO_WAITS))
            yield done
        finally:
            server.execute("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")


def moving(server: Server, database: str, *, prepared: bool) -> psycopg.Connection[Any]:
    """Return a session of the superuser which has moved money, and not committed that."""
    session = psycopg.connect(server.dsn(database), autocommit=True)
    session.execute("BEGIN; UPDATE accounts SET money = 100 - money")
    if prepared:
        session.execute("PREPARE TRANSACTION 'transfer'")
    session.execute("SET synchronous_commit = on")
    return session


def into(server: Server, user: str = "freezer") -> Callable[[str], psycopg.Connection[Any]]:
    return lambda name: server.connect_factory(user, name)()


def codes(attestation: Attestation) -> set[str]:
    return {violation.code for violation in attestation.violations}


@by_each_method
@pytest.mark.parametrize("ending", ["COMMIT PREPARED 'transfer'", "ROLLBACK PREPARED 'transfer'"])
def test_a_prepared_transaction_whose_end_waits_for_a_standby_breaks_the_proof(away, shop, readable, method, ending):
    moving(away, shop, prepared=True).close()
    connect = away.connect_factory()
    pause(connect, databases=[shop], admit="readers", **OPTIONS)
    attest.before(connect, databases=[shop], holder="attested", connect_to=into(away))
    ends = psycopg.connect(away.dsn(shop), autocommit=True)
    ends.execute("SET synchronous_commit = on")

    with that_waits(away, ends, ending):
        assert away.execute("SELECT gid FROM pg_prepared_xacts") == [("transfer",)], "it is still listed"
        found = attest.after(connect, databases=[shop], holder="attested", connect_to=into(away))

    assert found.level == "crash-only"
    assert codes(found) == {"prepared" if method == "wal" else "not-proved"}
    assert "transfer" in found.reasons


@by_each_method
def test_a_commit_under_locks_that_waits_for_a_standby_breaks_the_proof(away, shop, readable, method):
    app = psycopg.connect(away.dsn(shop, "app"), autocommit=True)
    app.execute("SET synchronous_commit = on")
    app.execute("BEGIN; SELECT lo_from_bytea(0, 'x'); CREATE TABLE made (id integer)")
    connect = away.connect_factory()

    with ExitStack() as later, frozen(connect, into(away), databases=[shop], strategy="lock", **OPTIONS) as hold:
        later.enter_context(that_waits(away, app, "COMMIT"))

    assert hold.attestation is not None
    assert hold.attestation.level == "crash-only"
    assert codes(hold.attestation) == {"open-write" if method == "wal" else "not-proved"}


@by_each_method
def test_a_prepared_transaction_breaks_a_freeze_of_privileges_if_its_commit_waits_for_a_standby(
    away, shop, readable, method
):
    session = moving(away, shop, prepared=True)
    connect = away.connect_factory()

    inside = into(away, checkpointer(away.version))
    with ExitStack() as later, frozen(connect, inside, databases=[shop], strategy="privileges", **OPTIONS) as hold:
        later.enter_context(that_waits(away, session, "COMMIT PREPARED 'transfer'"))

    assert hold.attestation is not None
    assert hold.attestation.level == "crash-only"
    assert codes(hold.attestation) == {"prepared" if method == "wal" else "not-proved"}


@pytest.mark.parametrize(
    ("method", "admit", "level"),
    [
        pytest.param("wal", "readers", "quiesced", marks=BY_THE_WAL.marks),
        ("transaction-ids", "readers", "crash-only"),
        # Only a session in its own database can end it, and there is none.
        ("transaction-ids", "nobody", "strict"),
    ],
)
def test_a_prepared_transaction_that_stays_is_harmless_where_it_is_known_not_to_be_committed(
    away, shop, readable, method, admit, level
):
    moving(away, shop, prepared=True).close()
    connect = away.connect_factory()
    pause(connect, databases=[shop], admit=admit, **OPTIONS)
    attest.before(connect, databases=[shop], holder="attested", connect_to=into(away))

    found = attest.after(connect, databases=[shop], holder="attested", connect_to=into(away))

    assert (found.level, codes(found)) == (level, {"not-proved"} if level == "crash-only" else set())
    assert found.method == ("none" if level == "crash-only" else method)
    assert ("with pg_walinspect" in found.reasons or "EXTENSION pg_walinspect" in found.reasons) is (
        level == "crash-only"
    )


@pytest.mark.parametrize(
    ("ending", "method", "level"),
    [
        (None, "transaction-ids", "crash-only"),
        ("COMMIT", "transaction-ids", "crash-only"),
        ("ROLLBACK", "transaction-ids", "strict"),
        pytest.param("COMMIT", "wal", "strict", marks=BY_THE_WAL.marks),
    ],
)
def test_a_transaction_of_another_database_could_be_a_drop_of_the_frozen_one(
    away, shop, readable, method, ending, level
):
    # A DROP DATABASE has its transaction id first, then makes a checkpoint, and only then removes the files.
    elsewhere = psycopg.connect(away.dsn(), autocommit=True)
    elsewhere.execute("BEGIN; CREATE TEMPORARY TABLE brief ()")
    connect = away.connect_factory()
    pause(connect, databases=[shop], admit="nobody", **OPTIONS)
    attest.before(connect, databases=[shop], holder="attested")
    if ending is not None:
        elsewhere.execute(ending)

    found = attest.after(connect, databases=[shop], holder="attested")

    elsewhere.close()
    assert (found.level, codes(found)) == (level, {"not-proved"} if level == "crash-only" else set())
