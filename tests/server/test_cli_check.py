"""`status --check`: what a script is to know, as an exit code."""

import json
from datetime import timedelta

import pytest
from psycopg import sql

from devtools.asking import pause
from pg_freeze import cli, resume


@pytest.fixture
def check(server, app_database, capfd):
    def check(*words):
        dsn = server.dsn(user="freezer")
        code = cli.main(["status", "--check", "--json", "--dsn", dsn, "--database", app_database, *words])
        said = json.loads(capfd.readouterr().out)
        assert said["exit_code"] == code
        return said["check"], code

    return check


def test_each_state_of_a_database_has_an_exit_code_of_its_own(check, server, app_database):
    connect = server.connect_factory("freezer")
    assert check() == ("clear", 0)
    pause(connect, databases=[app_database], holder="me", dead_man=False, lease=timedelta(minutes=5))
    assert check() == ("frozen", 7)
    overdue = sql.SQL("UPDATE pgfreeze.freezes SET lease_until = now() WHERE {} = ANY (databases)")
    server.execute(overdue.format(sql.Literal(app_database)))
    assert check() == ("overdue", 5)
    resume(connect, databases=[app_database], holder="me")
    assert check() == ("clear", 0)
    server.execute(
        sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(sql.Identifier(app_database))
    )
    assert check() == ("unexplained", 6)


def test_a_server_that_is_away_is_no_answer(capfd):
    code = cli.main(["status", "--check", "--json", "--dsn", "host=127.0.0.1 port=1"])

    assert code == 1
    assert json.loads(capfd.readouterr().out)["error"] == "ServerLost"
