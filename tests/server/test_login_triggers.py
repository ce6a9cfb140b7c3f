"""An event trigger on login runs as whoever connects: no database that has one is entered (PostgreSQL 17 and later)."""

from __future__ import annotations

from functools import partial

import pytest
from psycopg import sql

from devtools.asking import frozen, pause, preflight
from devtools.pgserver import Server
from pg_freeze import FreezeRefused, attest, resume, status, thaw_expired
from pg_freeze.advise import advise
from tests.server.names import LOCK, MARK, PRIVILEGES, READ_ONLY

pytestmark = [pytest.mark.every_version, pytest.mark.pg(">=17")]

# What the function of the trigger does, it does with the rights of whoever logs in.
_TRIGGER = """
    CREATE TABLE came (who name);
    GRANT INSERT ON came TO PUBLIC;
    CREATE FUNCTION greet() RETURNS event_trigger LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO public.came VALUES (session_user); END $$;
    CREATE EVENT TRIGGER greet ON login EXECUTE FUNCTION greet();
    ALTER FUNCTION greet() OWNER TO {}"""


def greet(server: Server, database: str, owner: str) -> None:
    with server.control(database) as conn:
        conn.execute(sql.SQL(_TRIGGER).format(sql.Identifier(owner)))


def came(server: Server, database: str) -> list[str]:
    """Return who has logged in; the one who asks does not count."""
    with server.connect_factory("postgres", database, options="-c event_triggers=off")() as conn:
        return [who for (who,) in conn.execute("SELECT who FROM came")]


@pytest.fixture
def site(own_server, new_database):
    """A server, a database with such a trigger that looks as if it were frozen from inside, and two ways to connect."""
    database = new_database(own_server)
    greet(own_server, database, "app")
    own_server.execute(f"ALTER ROLE app IN DATABASE {database} SET application_name = '{MARK}'")
    connect = own_server.connect_factory("freezer")
    return own_server, database, connect, lambda name: own_server.connect_factory("freezer", name)()


def test_nothing_enters_a_database_with_one_and_preflight_names_it(site):
    server, database, connect, connect_to = site
    block = partial(frozen, connect, connect_to, databases=[database], holder="h")

    found = preflight(connect, databases=[database], holder="h")
    assert [one.code for one in found.warnings if "event trigger on login" in one.message] == ["login-trigger"]
    for strategy in (LOCK, PRIVILEGES):
        with pytest.raises(FreezeRefused, match="event trigger on login"), block(strategy=strategy):
            pytest.fail("it was frozen")
    with block(strategy=READ_ONLY, checkpoint=False) as hold:
        pass
    pause(connect, databases=[database], holder="h")
    attest.before(connect, databases=[database], holder="h", connect_to=connect_to)
    after = attest.after(connect, databases=[database], holder="h", connect_to=connect_to)
    status(connect, connect_to=connect_to)
    resume(connect, databases=[database], holder="h", connect_to=connect_to)
    thaw_expired(connect, connect_to)
    advice = advise(connect, connect_to, databases=[database])

    assert came(server, database) == []
    for attestation in (hold.attestation, after):
        assert "event trigger on login" in " ".join(attestation.unseen)
    assert advice.strategy == READ_ONLY


def test_what_preflight_says_lets_our_role_in_without_running_it(site):
    server, database, connect, connect_to = site
    (found,) = (one for one in preflight(connect, databases=[database], holder="h").warnings if "login" in one.message)
    server.execute(sql.SQL("{}").format(sql.SQL(found.remedy.partition(";")[0])))
    server.execute("GRANT pg_write_all_data TO freezer")

    with frozen(connect, connect_to, databases=[database], holder="h", strategy=LOCK, checkpoint=False) as hold:
        pass

    assert came(server, database) == []
    assert "login" not in " ".join(hold.attestation.unseen)
    assert not [one for one in preflight(connect, databases=[database], holder="h").findings if "login" in one.message]


@pytest.mark.parametrize(
    "where", ["ALTER DATABASE postgres SET", "ALTER ROLE freezer IN DATABASE postgres SET"], ids=["database", "role"]
)
def test_triggers_that_are_off_only_where_we_look_from_do_not_count_as_off(site, where):
    server, database, connect, connect_to = site
    server.execute(sql.SQL(f"{where} event_triggers = off"))

    with (
        pytest.raises(FreezeRefused, match="event trigger on login"),
        frozen(connect, connect_to, databases=[database], holder="h", strategy=LOCK, checkpoint=False),
    ):
        pytest.fail("it was frozen")
    assert came(server, database) == []


@pytest.mark.parametrize(("owner", "refused"), [("app", True), ("postgres", False)])
def test_one_of_the_maintenance_database_is_refused_unless_its_function_is_trusted(
    own_server, new_database, owner, refused
):
    greet(own_server, "postgres", owner)
    connect = own_server.connect_factory("freezer")
    database = new_database(own_server)

    found = preflight(connect, databases=[database], holder="h").refusals

    assert [one.code for one in found] == ["login-trigger"] * refused
    if refused:
        with pytest.raises(FreezeRefused, match="'greet'"):
            pause(connect, databases=[database], holder="h")
        own_server.execute(sql.SQL("{}").format(sql.SQL(found[0].remedy.partition(";")[0])))
        pause(connect, databases=[database], holder="h")
        resume(connect, databases=[database], holder="h")
