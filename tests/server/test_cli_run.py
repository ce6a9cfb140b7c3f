"""``pg-freeze run``, ``attest`` and ``verify-copy``: real commands, real signals, and a ledger that must balance."""

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from devtools.environment import without
from devtools.rights import checkpointer
from devtools.wire import PLAIN, Proxy
from pg_freeze import history, status
from tests.server.clients import wait_until
from tests.server.ledger import Ledger

PROGRAM = Path(sys.executable).with_name("pg-freeze")


@pytest.fixture
def cli(server, app_database, app_connect):
    app_connect(app_database).execute("CREATE TABLE things (id serial PRIMARY KEY, name text)")
    server.execute("GRANT app TO freezer")
    environment = without("PG", "AIRFLOW")
    environment["PG_FREEZE_DSN"] = server.dsn("postgres", checkpointer(server.version))

    def start(*words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [str(PROGRAM), *words],
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


def frozen(connect, database) -> bool:
    freezes = status(connect, databases=[database]).freezes
    return bool(freezes) and freezes[0].holds and freezes[0].frozen_at is not None


@pytest.mark.pg("!=16,!=17")
@pytest.mark.pg(">=15")
def test_on_a_busy_server_without_walinspect_it_fails_and_the_line_that_it_prints_helps(
    request, cli, server, app_database
):
    busy = f"import psycopg; psycopg.connect({server.dsn()!r}).execute('SELECT pg_current_xact_id()')"
    block = ("run", "--database", app_database, "--", sys.executable, "-c", busy)

    out, err = (first := cli(*block)).communicate(timeout=60)
    assert first.returncode == 1, err
    (line,) = (line for line in out.splitlines() if line.startswith("To have better: "))
    assert line.partition(", ")[2] in out.splitlines()[-1]
    request.addfinalizer(lambda: server.execute("DROP EXTENSION pg_walinspect"))
    for statement in line.partition("'postgres': ")[2].split(";")[:-1]:
        server.execute(sql.SQL("{}").format(sql.SQL(statement)))

    out, err = (second := cli(*block)).communicate(timeout=60)
    assert second.returncode == 0, err
    assert "quiesced" in out


@pytest.mark.parametrize("strategy", ["lock", "read-only"])
def test_a_command_runs_frozen_and_its_exit_code_is_passed_on(cli, connect, app_database, strategy):
    shown = 'import sys; print("inside"); sys.exit(7)'
    words = ("run", "--database", app_database, "--strategy", strategy, "--json", "--", sys.executable, "-c", shown)
    process = cli(*words)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    found = json.loads(out)
    assert found["command_exit_code"] == 7
    assert found["strategy"] == strategy
    assert found["attestation"]["certified"]
    assert "inside" in err
    (freeze,) = history(connect, limit=1)
    assert freeze.state == "thawed"


def test_a_command_learns_of_its_freeze_and_fails_below_the_required_level(cli, connect, server, app_database):
    dsn = server.dsn(app_database, "app")
    writes = (
        "import os, psycopg, sys\n"
        "print(os.environ['PG_FREEZE_TOKEN'], os.environ['PG_FREEZE_HOLDER'], file=sys.stderr)\n"
        "with psycopg.connect(sys.argv[1]) as conn:\n"
        "    conn.execute(\"SET TRANSACTION READ WRITE; INSERT INTO things (name) VALUES ('sneaky')\")\n"
    )
    words = ("run", "--database", app_database, "--strategy", "read-only", "--holder", "h", "--json")
    for more, code in (((), 1), (("--require", "none"), 0)):
        process = cli(*words, *more, "--", sys.executable, "-c", writes, dsn)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        found = json.loads(out)
        assert found["attestation"]["level"] == "crash-only"
        assert (found["state"], "quiesced is required" in found.get("message", "")) == ("thawed", code == 1)
        assert f"{found['token']} h" in err


@pytest.mark.parametrize("strategy", ["lock", "read-only"])
def test_a_signal_thaws_first_and_then_ends_the_command(cli, connect, app_connect, app_database, strategy):
    process = cli("run", "--database", app_database, "--strategy", strategy, "--", "sleep", "60")
    wait_until(lambda: frozen(connect, app_database))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, err
    app_connect(app_database).execute("INSERT INTO things (name) VALUES ('after')")
    assert not status(connect, databases=[app_database]).freezes


def test_killed_while_it_holds_locks_it_leaves_nothing_behind(cli, connect, app_connect, app_database):
    process = cli("run", "--database", app_database, "--strategy", "lock", "--", "sleep", "5")
    wait_until(lambda: frozen(connect, app_database))
    process.kill()
    process.wait()
    app_connect(app_database).execute("INSERT INTO things (name) VALUES ('after')")
    wait_until(lambda: not status(connect, databases=[app_database]).freezes, within=5)


def test_killed_while_the_database_is_frozen_the_lease_thaws(cli, connect, app_connect, app_database):
    words = ("--strategy", "read-only", "--lease", "3", "--drain-timeout", "2")
    process = cli("run", "--database", app_database, *words, "--", "sleep", "1")
    wait_until(lambda: frozen(connect, app_database))
    process.kill()
    process.wait()
    wait_until(lambda: not status(connect, databases=[app_database]).freezes, within=10)
    app_connect(app_database).execute("INSERT INTO things (name) VALUES ('after')")


@pytest.mark.parametrize("strategy", ["lock", "read-only"])
def test_a_command_that_outlasts_the_lease_is_not_believed(cli, app_database, strategy):
    words = ("--strategy", strategy, "--lease", "2", "--drain-timeout", "1")
    process = cli("run", "--database", app_database, *words, "--", "sleep", "4")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "not to be trusted" in " ".join(err.split())


def test_a_program_that_does_not_exist_freezes_nothing(cli, connect, app_database):
    before = history(connect, limit=1)
    process = cli("run", "--database", app_database, "--", "no-such-program-at-all")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "nothing was frozen" in err
    assert history(connect, limit=1) == before


def test_attest_says_the_level_and_fails_below_it(cli, server, app_database):
    def done(*words: str) -> tuple[int, str]:
        process = cli(*words, "--database", app_database, "--holder", "me")
        out, err = process.communicate(timeout=60)
        return process.returncode, out + err

    assert done("pause", "--admit", "readers")[0] == 0
    assert done("attest", "--before")[0] == 0
    code, said = done("attest", "--after", "--json")
    assert (code, json.loads(said)["level"]) == (0, "quiesced")
    assert done("attest", "--before")[0] == 0
    server.execute(f'ALTER ROLE app IN DATABASE "{app_database}" SET default_transaction_read_only = off')
    code, said = done("attest", "--after")
    assert code == 1
    assert "crash-only" in said
    assert done("resume")[0] == 0
    assert done("attest", "--after")[0] == 1


def test_verify_copy_needs_no_server_and_says_what_is_wrong(cli, tmp_path):
    process = cli("verify-copy", "--data-dir", str(tmp_path), "--json")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "no PostgreSQL data directory" in json.loads(out)["message"]


def test_verify_copy_says_that_it_starts_a_server_only_when_it_does(cli, server, tmp_path):
    missing = tmp_path / "missing"
    for words, code in (
        (("--data-dir", missing), 3),
        (("--data-dir", server.data, "--trust-copy", "--bin-dir", server.programs), 3),
        (("--data-dir", server.data, "--attestation", missing), 2),
    ):
        process = cli("verify-copy", *map(str, words))
        out, err = process.communicate(timeout=60)
        assert (process.returncode, "Starting" in out + err) == (code, False), out + err


@pytest.fixture
def ledger(server, app_database):
    return Ledger(server.connect_factory("app", app_database))


@pytest.mark.parametrize("strategy", ["lock", "read-only", "privileges"])
def test_a_ledger_balances_to_the_cent_around_freezes(cli, ledger, app_database, strategy):
    words = ("--strategy", strategy, "--drain-timeout", "30", "--lease", "60")
    with ledger:
        for _ in range(3):
            process = cli("run", "--database", app_database, *words, "--", "sleep", "0.3")
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, out + err

    ledger.audit()
    assert len(ledger.committed) > 20
    if strategy == "lock":
        assert ledger.refused == []


@pytest.mark.pg("!=15,!=16,!=17")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "strategy",
    [
        "lock",
        pytest.param("read-only", marks=pytest.mark.thorough),
        pytest.param("privileges", marks=pytest.mark.thorough),
    ],
)
def test_a_ledger_balances_to_the_cent_around_freezes_that_are_killed_stopped_or_cut_off(
    cli, server, connect, ledger, app_database, tmp_path, strategy
):
    chance = random.Random(strategy)
    words = ("--strategy", strategy, "--drain-timeout", "60", "--on-drain-timeout", "abort", "--lease", "120")
    user, hit = checkpointer(server.version), 0

    def inside(name):
        return server.connect_factory(user, name)()

    def over():
        """Let the lease of what is frozen end now. Tell whether nothing is frozen any more."""
        with suppress(psycopg.errors.UndefinedTable):
            server.execute(
                "UPDATE pgfreeze.freezes SET lease_until = clock_timestamp() "
                f"WHERE state IN ('draining', 'frozen') AND databases = '{{{app_database}}}'",
                app_database if strategy == "privileges" else "postgres",
            )
        return not status(connect, databases=[app_database], connect_to=inside).freezes

    with ledger, Proxy(server.port) as proxy:
        dsn = server.dsn("postgres", user, **PLAIN, port=proxy.port)

        for number in range(6):
            block, fault = tmp_path / f"block {number}", tmp_path / f"fault {number}"
            until = f"until [ -e '{fault}' ]; do sleep 0.05; done"
            command = f"date +%s.%N >'{block}'; sleep 0.3; {until}; date +%s.%N >>'{block}'"
            process = cli("run", "--dsn", dsn, "--database", app_database, *words, "--", "sh", "-c", command)
            if number % 2:  # while it is frozen; else at any time
                wait_until(lambda block=block: block.exists(), within=100)
                hit += process.poll() is None
            else:
                time.sleep(chance.uniform(0, 1.5))
            [killed, stopped, cut_off][number // 2 % 3](process, proxy, over)
            fault.touch()
            _, err = process.communicate(timeout=60)

            if process.returncode == 0:
                began, ended = map(float, block.read_text().split())
                assert ledger.transfers_between(began, ended) == 0, err
            wait_until(over, within=60)

    ledger.audit()
    assert hit == 3
    assert len(ledger.committed) > 20
    if strategy == "lock":
        assert ledger.refused == []


def killed(process, proxy, over):
    process.kill()


def stopped(process, proxy, over):
    process.send_signal(signal.SIGSTOP)
    wait_until(over, within=60)
    process.send_signal(signal.SIGCONT)


def cut_off(process, proxy, over):
    proxy.cut()
    time.sleep(0.5)
    proxy.mend()
