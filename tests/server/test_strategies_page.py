"""Every GRANT of docs/strategies.md and docs/operators/attest.md, on a server where nothing has been granted."""

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from packaging.specifiers import SpecifierSet

from devtools.asking import frozen
from devtools.binaries import CHECKOUT
from devtools.pgserver import Server
from pg_freeze import FreezeRefused

PAGE = (CHECKOUT / "docs/strategies.md").read_text()
BLOCKS = re.findall(r"^```sql ([\w-]+) ?(\S*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
OPTIONS: dict[str, Any] = {"holder": "page", "lease": timedelta(seconds=60), "drain_timeout": timedelta(seconds=10)}


REFUSALS = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.ReadOnlySqlTransaction,
    psycopg.errors.InsufficientPrivilege,
)


@pytest.fixture
def site(pg_version: int) -> Iterator[Server]:
    """The page's site: the roles freezer and gitlab, and gitlabhq, with a table in a schema that is not everybody's."""
    with Server(pg_version) as server:
        server.create_role("freezer")
        server.create_role("gitlab")
        server.create_database("gitlabhq", "gitlab")
        server.execute("REVOKE CONNECT ON DATABASE gitlabhq FROM PUBLIC")
        with psycopg.connect(server.dsn("gitlabhq", "gitlab")) as owner:
            owner.execute("CREATE SCHEMA own")
            owner.execute("CREATE TABLE own.things (id integer)")
        yield server


def grant(server: Server, strategy: str) -> None:
    for kind, versions, text in BLOCKS:
        if kind in ("all", strategy) and SpecifierSet(versions).contains(str(server.version)):
            server.execute(text.encode(), "gitlabhq" if "ALTER SCHEMA" in text else "postgres")


def freeze(server: Server, strategy: str) -> object:
    with frozen(
        server.connect_factory("freezer"),
        lambda name: psycopg.connect(server.dsn(name, "freezer"), autocommit=True),
        databases=["gitlabhq"],
        strategy=strategy,
        checkpoint=server.version >= 15,
        **OPTIONS,
    ) as hold:
        with psycopg.connect(server.dsn("gitlabhq", "gitlab", options="-c lock_timeout=200ms")) as writer:
            with pytest.raises(REFUSALS):
                writer.execute("INSERT INTO own.things VALUES (1)")
    return hold.attestation


@pytest.mark.parametrize("strategy", ["lock", "read-only", "privileges"])
def test_the_rights_of_the_page_suffice_and_without_them_nothing_is_frozen(site, strategy):
    with pytest.raises(FreezeRefused):
        freeze(site, strategy)
    grant(site, strategy)
    assert freeze(site, strategy).certified


@pytest.mark.pg(">=15,!=16,!=17")
def test_the_rights_of_the_attestation_make_it_read_the_wal(site):
    page = (CHECKOUT / "docs/operators/attest.md").read_text()
    (block,) = re.findall(r"^```sql\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    grant(site, "lock")
    assert freeze(site, "lock").method == "transaction-ids"
    site.execute(block.encode())
    assert freeze(site, "lock").method == "wal"
