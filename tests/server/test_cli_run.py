"""``pg-freeze run``, ``attest`` and ``verify-copy``: real commands, real signals, and a ledger that must balance."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psycopg
import pytest

from airflow_pg_freeze.core import history, status
from devtools.rights import checkpointer

PROGRAM = Path(sys.executable).with_name("pg-freeze")


@pytest.fixture
def cli(server, app_database, app_connect):
    app_connect(app_database).execute("CREATE TABLE things (id serial PRIMARY KEY, name text)")
    server.execute("GRANT app TO freezer")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "AIRFLOW"))}
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


def wait_until(condition, within: float = 20) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def frozen(connect, database) -> bool:
    freezes = status(connect, databases=[database]).freezes
    return bool(freezes) and freezes[0].holds and freezes[0].frozen_at is not None


@pytest.mark.parametrize("strategy", ["lock", "database"])
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
    words = ("run", "--database", app_database, "--strategy", "database", "--holder", "h", "--json")
    for more, code in (((), 1), (("--require", "none"), 0)):
        process = cli(*words, *more, "--", sys.executable, "-c", writes, dsn)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        found = json.loads(out)
        assert found["attestation"]["level"] == "crash-only"
        assert (found["state"], "read-only is required" in found.get("message", "")) == ("thawed", code == 1)
        assert f"{found['token']} h" in err


@pytest.mark.parametrize("strategy", ["lock", "database"])
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
    words = ("--strategy", "database", "--lease", "3", "--drain-timeout", "2")
    process = cli("run", "--database", app_database, *words, "--", "sleep", "1")
    wait_until(lambda: frozen(connect, app_database))
    process.kill()
    process.wait()
    wait_until(lambda: not status(connect, databases=[app_database]).freezes, within=10)
    app_connect(app_database).execute("INSERT INTO things (name) VALUES ('after')")


@pytest.mark.parametrize("strategy", ["lock", "database"])
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
    assert (code, json.loads(said)["level"]) == (0, "read-only")
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


@pytest.mark.parametrize("strategy", ["lock", "database", "privileges"])
def test_a_ledger_balances_to_the_cent_around_freezes(cli, app_connect, app_database, strategy):
    """A transfer that a client saw committed is there once; one whose answer was lost is there once or not at all."""
    bank = app_connect(app_database)
    bank.execute("CREATE TABLE accounts (id integer PRIMARY KEY, cents bigint NOT NULL)")
    bank.execute("CREATE TABLE transfers (id uuid PRIMARY KEY, cents bigint NOT NULL)")
    bank.execute("INSERT INTO accounts SELECT i, 100000 FROM generate_series(1, 20) i")
    bank.close()
    stop = threading.Event()
    committed: set[str] = set()
    unsure: set[str] = set()
    refused: list[str] = []

    def client(seed: int) -> None:
        chance = random.Random(seed)
        conn = None
        while not stop.is_set():
            transfer = f"{chance.getrandbits(128):032x}"
            sending = False
            try:
                conn = conn if conn is not None and not conn.closed else app_connect(app_database)
                with conn.transaction():
                    one, two = sorted(chance.sample(range(1, 21), 2))
                    cents = chance.randint(1, 500)
                    conn.execute("INSERT INTO transfers VALUES (%s, %s)", (transfer, cents))
                    conn.execute("UPDATE accounts SET cents = cents - %s WHERE id = %s", (cents, one))
                    conn.execute("UPDATE accounts SET cents = cents + %s WHERE id = %s", (cents, two))
                    sending = True
                committed.add(transfer)
            except psycopg.Error as error:
                if sending:
                    unsure.add(transfer)
                refused.append(type(error).__name__)
                if conn is not None:
                    conn.close()
                time.sleep(0.05)
            time.sleep(0.02)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            words = ("--strategy", strategy, "--drain-timeout", "30", "--lease", "60")
            process = cli("run", "--database", app_database, *words, "--", "sleep", "0.3")
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)

    with app_connect(app_database) as auditor:
        found = {row[0].hex for row in auditor.execute("SELECT id FROM transfers")}
        total = auditor.execute("SELECT sum(cents) FROM accounts").fetchone()
    assert total == (20 * 100000,)
    assert committed <= found
    assert found <= committed | unsure
    assert len(committed) > 20
    if strategy == "lock":
        assert refused == []
