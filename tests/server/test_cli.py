"""The command line: real processes on real servers."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from devtools.asking import frozen as frozen_for_a_block
from devtools.environment import without
from devtools.pgserver import Server, password
from devtools.rights import create_application_database
from pg_freeze import LeaseLost, status
from tests.server.clients import heed_signals, wait_until

# Hardly anything here depends on the server's version: the oldest and the newest are enough.
pytestmark = pytest.mark.pg("!=15,!=16,!=17")

PROGRAM = Path(sys.executable).with_name("pg-freeze")
SECRET = "hunter2'; drop"


@dataclass(frozen=True)
class Done:
    """A process that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object that is all of stdout."""
        assert self.out.count("\n") == 1, self.out + self.err
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    @property
    def to_type(self) -> str:
        """The command line that thaws."""
        lines = (self.out + self.err).split("Thaw it with\n")[1].split("\n\nor in psql")[0]
        return lines.strip()


class Cli:
    """Runs ``pg-freeze`` against one server, as role ``freezer``."""

    def __init__(self, dsn: str, stack: ExitStack) -> None:
        self.environment = without("PG", "AIRFLOW", "COLUMNS")
        self.environment |= {
            "PG_FREEZE_DSN": dsn,
            "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}",
            "TERM": "xterm",
        }
        self._stack = stack

    def start(self, *words: str, **options: Any) -> "subprocess.Popen[str]":
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(
            [str(PROGRAM), *words],
            preexec_fn=heed_signals,  # noqa: PLW1509 - no thread forks here
            **{"env": self.environment, "text": True, **streams, **options},
        )
        self._stack.callback(_end, process)
        return process

    def __call__(self, *words: str, **options: Any) -> Done:
        process = self.start(*words, **options)
        out, err = process.communicate(timeout=60)
        return Done(process.returncode, out or "", err or "")

    def shell(self, line: str) -> Done:
        done = subprocess.run(
            ["sh", "-c", line], env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        return Done(done.returncode, done.stdout, done.stderr)


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def end_of(process: "subprocess.Popen[str]", within: float = 30) -> Done:
    out, err = process.communicate(timeout=within)
    return Done(process.returncode, out or "", err or "")


@pytest.fixture
def cli_to() -> Iterator[Callable[[Server], Cli]]:
    with ExitStack() as stack:
        yield lambda server: Cli(server.dsn("postgres", "freezer"), stack)


@pytest.fixture
def cli(server: Server, cli_to: Callable[[Server], Cli]) -> Cli:
    return cli_to(server)


@pytest.fixture
def open_transaction(app_connect) -> Callable[..., psycopg.Connection[Any]]:
    """Begin a transaction that has written, and would keep a drain waiting."""

    def begin(database: str, server: Server | None = None) -> psycopg.Connection[Any]:
        conn: psycopg.Connection[Any] = app_connect(database, server=server)
        conn.execute("CREATE TABLE IF NOT EXISTS t (i int)")
        conn.execute("BEGIN")
        conn.execute("INSERT INTO t VALUES (1)")
        return conn

    return begin


def frozen(server: Server, database: str) -> bool:
    return any(freeze.holds for freeze in status(server.connect_factory(), databases=[database]).freezes)


def writable(server: Server, database: str) -> bool:
    with psycopg.connect(server.dsn(database, "app"), autocommit=True) as conn:
        conn.execute("CREATE TABLE IF NOT EXISTS t (i int)")
        conn.execute("INSERT INTO t VALUES (2)")
    return True


def draining(server: Server, database: str) -> bool:
    freezes = status(server.connect_factory(), databases=[database]).freezes
    return any(freeze.state == "draining" and freeze.barrier_at is not None for freeze in freezes)


# What others build upon; more may be there.
FREEZE = {
    "token", "holder", "databases", "state", "admit", "requested_at", "barrier_at", "drained_at", "frozen_at",
    "lease_until", "checkpoint_at", "checkpoint_lsn", "restored_at", "thawed_at", "thawed_by", "terminated",
    "lingering", "warnings", "readers_ended", "dead_man_pid",
}  # fmt: skip


def test_every_verb_prints_one_json_object_of_a_known_shape(cli, app_database):
    database = ("--database", app_database)

    found = cli("preflight", *database, "--json")
    assert (found.code, set(found.json)) == (0, {"databases", "ok", "findings", "advice", "proof"})
    assert set(found.json["advice"]) == {"strategy", "reasons", "notes"}

    paused = cli("pause", *database, "--json", "--checkpoint" if cli_may_checkpoint(found) else "--strict")
    if paused.code == 3:  # PostgreSQL 14: this role may not CHECKPOINT, and strict refuses what is warned of
        paused = cli("pause", *database, "--json")
    assert (paused.code, FREEZE - set(paused.json)) == (0, set())
    assert paused.json["state"] == "frozen"
    assert paused.err == ""

    seen = cli("status", *database, "--json")
    assert (seen.code, (FREEZE | {"freezes", "unexplained", "server_time"}) - set(seen.json)) == (0, set())
    assert seen.json["token"] == paused.json["token"]
    assert seen.json["unexplained"] == []

    if cli_may_checkpoint(found):
        written = cli("checkpoint", *database, "--json")
        assert (written.code, FREEZE - set(written.json)) == (0, set())
        assert re.fullmatch(r"[0-9A-F]+/[0-9A-F]+", written.json["checkpoint_lsn"])

    thawed = cli("resume", *database, "--json")
    assert (thawed.code, set(thawed.json)) == (
        0,
        {"holder", "databases", "thawed", "held_by_others", "unexplained", "unknown"},
    )
    assert [FREEZE - set(one) for one in thawed.json["thawed"]] == [set()]

    past = cli("history", "--limit", "1", "--json")
    assert (past.code, [one["token"] for one in past.json["freezes"]]) == (0, [paused.json["token"]])

    assert cli("install", "--json").json == {"installed": False, "granted": []}
    guarded = cli("guard", "--json")
    assert (guarded.code, set(guarded.json)) == (0, {"servers", "thawed"})


def cli_may_checkpoint(preflight: Done) -> bool:
    return "no-checkpoint" not in {finding["code"] for finding in preflight.json["findings"]}


def test_a_freeze_from_the_command_line_refuses_writes_until_it_is_resumed(cli, server, app_database):
    paused = cli("pause", "-d", app_database, "--holder", "me")
    assert paused.code == 0
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        writable(server, app_database)
    assert "FROZEN" in paused.out
    assert "Next: checkpoint, snapshot, resume" in paused.out

    assert cli("resume", "-d", app_database, "--holder", "me").code == 0
    assert writable(server, app_database)


def test_several_databases_are_one_freeze(cli, server, new_database):
    one, two = new_database(), new_database()
    assert cli("pause", "-d", one, "-d", two, "--json").json["databases"] == [one, two]

    assert cli.shell(cli("status", "-d", two).to_type).code == 0

    assert writable(server, one)
    assert writable(server, two)


def test_the_package_can_be_run_as_a_module(cli):
    done = subprocess.run(
        [sys.executable, "-m", "pg_freeze", "status", "--json"],
        env=cli.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "freezes" in json.loads(done.stdout)


@pytest.mark.parametrize(
    "name",
    [
        'we; "rd" $HOME `id` %s',
        "--force",
        "ünï 'cöde' \\",
        "[bold]not bold[/bold] :smile:",
        "two\nlines\tand a tab",
        "esc \x1b[31mred\x1b[0m \x07",
        " ",
    ],
)
def test_what_status_says_thaws_whatever_the_database_is_called(cli, server, name):
    if not name.strip():
        assert cli("pause", f"--database={name}").code == 2
        return
    create_application_database(server, name)
    try:
        assert cli("pause", f"--database={name}", f"--holder={name}").code == 0
        said = cli("status", f"--database={name}")
        assert "\x1b" not in said.out

        thawed = cli.shell(said.to_type)

        assert (thawed.code, thawed.err) == (0, "")
        assert writable(server, name)
    finally:
        server.drop_database(name)


def test_what_a_pause_says_to_type_next_works(cli, server, app_database):
    said = cli("pause", "-d", app_database, "--holder", "o'brien & sons").out
    lines = [line.strip() for line in said.split("Next: ")[1].splitlines()[1:] if line.strip()]
    assert [line.split()[1] for line in lines] == ["checkpoint", "resume"]

    if server.version >= 15:
        assert cli.shell(lines[0]).code == 0
    assert cli.shell(lines[1]).code == 0
    assert writable(server, app_database)


def test_what_the_first_look_says_to_type_next_works(cli, app_database):
    cli("pause", "-d", app_database, "--holder", "o'brien & sons")
    said = cli("attest", "--before", "-d", app_database, "--holder", "o'brien & sons").out
    line = said.split("Next: snapshot, then\n")[1].strip()

    done = cli.shell(f"{line} --json")

    assert (done.code, done.json["databases"], done.json["holder"]) == (0, [app_database], "o'brien & sons"), done
    assert cli("resume", "-d", app_database, "--holder", "o'brien & sons").code == 0


def test_the_printed_command_works_in_psql_too(cli, server, app_database):
    cli("pause", "-d", app_database)
    statement = cli("status", "-d", app_database).out.split("maintenance database\n")[1].split("\n")[0].strip()
    with server.control() as conn:
        conn.execute(statement.encode())
    assert writable(server, app_database)


def test_an_option_that_named_the_server_is_in_the_printed_command(cli, server, app_database):
    dsn = server.dsn("postgres", "freezer", password=password("freezer"))
    del cli.environment["PG_FREEZE_DSN"]
    assert cli("pause", "-d", app_database, "--dsn", dsn).code == 0
    said = cli("status", "-d", app_database, "--dsn", dsn)
    assert "pässword" not in said.out + said.err
    assert "PGPASSWORD" in said.out
    assert "process list" in said.err

    cli.environment["PGPASSWORD"] = password("freezer")
    assert cli.shell(said.to_type).code == 0
    assert writable(server, app_database)


def test_libpqs_own_environment_names_the_server_too(cli, server):
    del cli.environment["PG_FREEZE_DSN"]
    cli.environment |= {"PGHOST": "127.0.0.1", "PGPORT": str(server.port), "PGUSER": "freezer"}
    cli.environment["PGPASSWORD"] = password("freezer")
    assert cli("status", "--json").code == 0


def test_status_tells_who_lingers_and_what_will_happen(cli, server, app_database, open_transaction, super_connect):
    held = open_transaction(app_database)
    idle = super_connect(app_database, application_name="the boss")
    process = cli.start("pause", "-d", app_database, "--drain-timeout", "60")
    wait_until(lambda: draining(server, app_database))

    said = cli("status", "-d", app_database).out
    seen = cli("status", "-d", app_database, "--json").json
    held.execute("COMMIT")
    done = end_of(process)

    assert re.search(rf"{held.info.backend_pid} .* app .* idle in transaction .* may finish its transaction", said)
    assert re.search(rf"{idle.info.backend_pid} .* postgres +the boss +idle .* cannot be ended", said)
    assert {one["pid"]: one["fate"] for one in seen["lingering"]} == {
        held.info.backend_pid: "in-transaction",
        idle.info.backend_pid: "superuser",
    }
    assert (done.code, "superuser's session" in done.out) == (0, True)
    assert cli("resume", "-d", app_database).code == 0


def test_status_tells_when_the_lease_ends_and_whether_a_dead_man_switch_watches(cli, app_database):
    cli("pause", "-d", app_database, "--lease", "1h30m")
    said = cli("status", "-d", app_database).out
    assert re.search(r"lease ends +\S+ \S+ UTC \(in 1 h (29|30) min\)", said)
    assert re.search(r"dead-man switch +alive \(pid \d+\)", said)
    cli("resume", "-d", app_database)

    cli("pause", "-d", app_database, "--no-dead-man")
    assert re.search(r"dead-man switch +none seen", cli("status", "-d", app_database).out)
    cli("resume", "-d", app_database)
    assert "is not frozen" in cli("status", "-d", app_database).out


def test_status_says_so_when_writers_only_wait_and_what_it_says_to_type_lets_them_go(
    cli, server, connect, new_database
):
    name = new_database()
    held = frozen_for_a_block(
        connect,
        lambda name: server.connect_factory(dbname=name)(),
        databases=[name],
        holder="block",
        checkpoint=server.version >= 15,
    )
    with pytest.raises(LeaseLost), held:
        said = cli("status", "-d", name)
        assert f"{name} is LOCKED: writers wait, readers go on" in said.out
        assert cli.shell(said.to_type).code == 0
        assert writable(server, name)
    assert "is not frozen" in cli("status", "-d", name).out


def test_a_database_closed_by_hand_is_named_with_the_commands_that_open_it(cli, server, app_database):
    server.execute(f"ALTER DATABASE {app_database} ALLOW_CONNECTIONS false")
    server.execute(f"ALTER DATABASE {app_database} SET default_transaction_read_only = on")
    said = cli("status")
    assert said.code == 0
    assert f"{app_database} is closed or read-only by default" in said.out
    assert "docs/stuck.md" in said.out
    # A resume that finds nothing to thaw must not sound as if all were well.
    resumed = cli("resume", "-d", app_database, "--json")
    assert (resumed.code, resumed.json["unexplained"]) == (6, [app_database])

    for line in said.out.splitlines():
        if line.startswith(f'  ALTER DATABASE "{app_database}"'):
            server.execute(line.encode())

    assert writable(server, app_database)


# Exit codes -------------------------------------------------------------------------------------------------------


def test_a_server_that_cannot_be_reached_is_1(cli):
    cli.environment["PG_FREEZE_DSN"] = "host=127.0.0.1 port=1 user=freezer"
    done = cli("status", "--json")
    assert (done.code, done.json["error"], done.json["exit_code"]) == (1, "ServerLost", 1)


def test_a_checkpoint_without_a_freeze_is_1(cli, app_database):
    done = cli("checkpoint", "-d", app_database, "--json")
    assert (done.code, done.json["error"]) == (1, "LeaseLost")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("thaw",),
        ("pause",),
        ("pause", "-d", "x", "--lease", "soon"),
        ("pause", "-d", "x", "--lease", "5", "--drain-timeout", "10"),
        ("pause", "-d", "x", "--admit", "friends"),
        ("pause", "--data", "x"),
        ("pause", "-d", "\udcff"),
        ("history", "--limit", "0"),
        ("resume", "-d", "x", "--holder", ""),
        ("status", "--dsn", "host=a", "--dsn", "host=b"),
        ("status", "--dsn", "no connection string"),
        ("status", "--dsn", "postgresql://u:p@ss@h/d"),
        ("status", "--dsn", "postgresql://u:p/ss@h/d"),
        ("guard", "--every", "0"),
    ],
)
def test_bad_usage_is_2(cli, words):
    done = cli(*words, "--json")
    assert (done.code, done.json["error"], done.json["exit_code"]) == (2, "InvalidRequest", 2)


@pytest.mark.parametrize(
    "words",
    [
        ("bash", "-c", "echo hi"),
        ("bash", "-v"),
        ("pg_dump", "-d", "postgres"),
        ("true",),
        (),
        ("--",),
        ("true", "--", "false"),
    ],
)
def test_a_command_that_does_not_follow_the_two_dashes_is_not_run_and_nothing_is_frozen(cli, app_database, words):
    done = cli("run", "-d", app_database, *words)

    assert (done.code, done.out) == (2, ""), done
    assert re.search(r"put -- before the command|put it after --", done.err), done.err
    assert re.search(r"usage: pg-freeze run [^\0]*-- COMMAND \.\.\.\n", done.err), done.err
    freezes = cli("history", "--json").json["freezes"]
    assert app_database not in [name for freeze in freezes for name in freeze["databases"]]


def test_what_follows_the_two_dashes_is_the_commands_own(cli):
    done = cli("run", "-d", "no such database", "--", "no such program", "--help", "--json", "--", "-d", "x")
    assert (done.code, "there is no program 'no such program'" in done.out + done.err) == (2, True), done
    assert "-- COMMAND ..." in cli("run", "--help").out.split("\n\n")[0]


def test_a_time_that_is_none_is_explained_in_what_a_shell_has(cli):
    said = cli("pause", "-d", "x", "--lease", "10x", "--json").json["message"]
    assert "give a number of seconds, or text such as 90s, 15m, 1h30m or 2d" in said


@pytest.mark.parametrize("words", [(), ("pause", "-d", "x", "--lease", "soon"), ("history", "--limit", "0")])
def test_bad_usage_is_explained_to_people_without_a_traceback(cli, words):
    done = cli(*words)
    assert (done.code, done.out) == (2, "")
    assert "pg-freeze: " in done.err
    assert "Traceback" not in done.err


def test_rounds_of_the_guard_are_no_single_json_object(cli):
    done = cli("guard", "--every", "5", "--json")
    assert (done.code, done.json["error"]) == (2, "InvalidRequest")


def test_a_server_that_nobody_named_is_bad_usage(cli):
    del cli.environment["PG_FREEZE_DSN"]
    done = cli("status", "--json")
    assert (done.code, "PG_FREEZE_DSN" in done.json["message"]) == (2, True)


def test_what_another_holder_has_is_refused_with_3_and_the_command_that_ends_it(cli, server, app_database):
    cli("pause", "-d", app_database, "--holder", "o'brien $HOME")
    done = cli("pause", "-d", app_database, "--json")
    assert (done.code, done.json["error"]) == (3, "FreezeRefused")
    (finding,) = [one for one in done.json["findings"] if one["severity"] == "refuse"]
    assert (finding["code"], "o'brien $HOME" in finding["message"]) == ("held", True)
    left = cli("resume", "-d", app_database)
    assert (left.code, "left alone" in left.out, frozen(server, app_database)) == (0, True, True)
    assert cli.shell(finding["remedy"].split("end it: ")[1].removesuffix(" (or --force)")).code == 0
    assert writable(server, app_database)


def test_an_overdue_freeze_of_another_holder_is_called_so_with_what_thaws_it(cli, app_database):
    expired(cli, app_database)
    refused = cli("pause", "-d", app_database, "--holder", "other", "--json")
    (finding,) = [one for one in refused.json["findings"] if one["code"] == "held"]

    assert refused.code == 3
    assert finding["message"].endswith("which is OVERDUE")
    assert finding["remedy"].startswith("nobody has thawed it: pg-freeze guard does, or: pg-freeze resume")
    assert cli("resume", "-d", app_database).code == 0


def test_a_lease_that_would_be_shortened_stays_and_that_is_said(cli, app_database):
    first = cli("pause", "-d", app_database, "--lease", "1h")
    until = cli("status", "-d", app_database, "--json").json["lease_until"]
    again = cli("pause", "-d", app_database, "--lease", "5m")

    assert cli("status", "-d", app_database, "--json").json["lease_until"] == until
    assert "never shortened" not in first.err
    assert "A lease is only extended, never shortened" in again.err
    assert cli("resume", "-d", app_database).code == 0


def test_status_and_history_name_the_strategy_and_where_other_journals_are(cli, app_database, new_database):
    assert cli("pause", "-d", app_database).code == 0
    assert re.search(r"strategy +read-only", cli("status", "-d", app_database).out)
    elsewhere = ("--maintenance-database", new_database())
    astray = cli("status", *elsewhere, "-d", app_database).out
    assert cli("resume", "-d", app_database).code == 0

    # The first thing said there must not be what undoes a good freeze.
    assert "a dead-man switch is at work in 'postgres'" in astray
    assert "ALTER DATABASE" not in astray
    said = cli("history").out
    assert "read-only" in said
    assert "--maintenance-database NAME" in said
    assert "There is no journal" in cli("history", *elsewhere).out
    assert cli("history", *elsewhere, "--json").json == {"freezes": [], "journal": False}


def test_a_missing_right_is_refused_with_3_and_the_grant_that_gives_it(cli, server, new_database):
    name = new_database()
    server.execute(f"ALTER DATABASE {name} OWNER TO postgres")
    right = f"ALTER DATABASE {name} OWNER TO freezer;"
    for verb in ("preflight", "pause"):
        done = cli(verb, "-d", name, "--json")
        assert (done.code, done.json["error"], done.json["exit_code"]) == (3, "FreezeRefused", 3)
        assert any(finding["remedy"].startswith(right) for finding in done.json["findings"])
        plain = cli(verb, "-d", name)
        assert right in plain.out + plain.err


def test_strict_refuses_what_is_only_warned_of(cli, app_database):
    for verb in ("preflight", "pause"):
        done = cli(verb, "-d", app_database, "--strict", "--json")
        assert done.code == 3
        assert "client-override" in {finding["code"] for finding in done.json["findings"]}


def test_a_drain_that_is_to_be_aborted_is_4_and_leaves_all_as_it_was(cli, server, app_database, open_transaction):
    held = open_transaction(app_database)
    words = ("pause", "-d", app_database, "--drain-timeout", "0.5", "--on-drain-timeout", "abort")
    done = cli(*words, "--json")
    assert (done.code, done.json["error"]) == (4, "DrainTimeout")
    assert [one["pid"] for one in done.json["backends"]] == [held.info.backend_pid]
    plain = cli(*words)
    assert (plain.code, str(held.info.backend_pid) in plain.err) == (4, True)
    held.execute("COMMIT")
    assert writable(server, app_database)


def test_a_thaw_that_fails_is_5_until_it_succeeds(cli_to, own_server, new_database):
    cli, name = cli_to(own_server), new_database(own_server)
    assert cli("pause", "-d", name, "--no-dead-man", "--lease", "2.5", "--drain-timeout", "1").code == 0
    own_server.execute("REVOKE app_owner FROM freezer")

    done = cli("resume", "-d", name, "--json")
    assert (done.code, done.json["error"], done.json["exit_code"]) == (5, "ThawFailed", 5)
    time.sleep(2.5)
    guarded = cli("guard", "--json")
    assert (guarded.code, guarded.json["servers"][0]["error"]) == (5, "ThawFailed")
    left_over = cli("status", "-d", name, "--check")
    assert left_over.code == 5
    assert f"DATABASE {name}: default_transaction_read_only" in left_over.out
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        writable(own_server, name)

    own_server.execute("GRANT app_owner TO freezer")
    assert cli("resume", "-d", name).code == 0
    assert writable(own_server, name)


def test_a_server_that_dies_in_a_drain_is_5_and_is_thawed_by_what_is_said_afterwards(
    cli_to, own_server, new_database, open_transaction
):
    cli, name = cli_to(own_server), new_database(own_server)
    open_transaction(name, own_server)
    process = cli.start("pause", "-d", name, "--drain-timeout", "60", "--json")
    wait_until(lambda: draining(own_server, name))

    own_server.kill()
    done = end_of(process)

    assert (done.code, done.json["error"]) == (5, "ThawFailed")
    own_server.start()
    assert cli.shell(cli("status", "-d", name).to_type).code == 0
    assert writable(own_server, name)


# Signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_pause_that_is_interrupted_is_undone(cli, server, app_database, open_transaction, signum):
    held = open_transaction(app_database)
    process = cli.start("pause", "-d", app_database, "--drain-timeout", "60", "--json")
    wait_until(lambda: draining(server, app_database))

    process.send_signal(signum)
    process.send_signal(signum)
    done = end_of(process)

    assert (done.code, done.json["error"], done.json["exit_code"]) == (128 + signum, "Interrupted", 128 + signum)
    assert "undone" in done.json["message"]
    assert "Traceback" not in done.err
    assert not frozen(server, app_database)
    held.execute("COMMIT")
    assert writable(server, app_database)


def test_a_pause_started_with_nohup_is_not_interrupted_by_a_lost_terminal(cli, server, app_database, open_transaction):
    held = open_transaction(app_database)
    process = subprocess.Popen(
        ["nohup", str(PROGRAM), "pause", "-d", app_database, "--drain-timeout", "60"],
        env=cli.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: draining(server, app_database))
    process.send_signal(signal.SIGHUP)
    held.execute("COMMIT")
    assert end_of(process).code == 0
    assert frozen(server, app_database)
    assert cli("resume", "-d", app_database).code == 0


def test_a_pause_that_is_killed_is_thawed_by_its_dead_man_switch(cli, server, app_database, open_transaction):
    held = open_transaction(app_database)
    process = cli.start("pause", "-d", app_database, "--lease", "3", "--drain-timeout", "2.9")
    wait_until(lambda: draining(server, app_database))
    process.kill()
    wait_until(lambda: not frozen(server, app_database))
    held.execute("COMMIT")
    assert writable(server, app_database)
    assert "lease ended" in cli("history", "--limit", "1").out


def test_a_pause_that_is_killed_can_be_resumed_or_repeated(cli, server, app_database, open_transaction):
    held = open_transaction(app_database)
    process = cli.start("pause", "-d", app_database, "--drain-timeout", "60")
    wait_until(lambda: draining(server, app_database))
    process.kill()
    process.wait()

    again = cli("pause", "-d", app_database, "--drain-timeout", "0.2", "--json")
    assert (again.code, again.json["terminated"]) == (0, {"drain-timeout": 1})
    with pytest.raises(psycopg.OperationalError):
        held.execute("COMMIT")
    assert cli("resume", "-d", app_database).code == 0
    assert writable(server, app_database)


def test_a_pause_that_was_typed_before_the_resume_comes_too_late(cli, server, app_database):
    assert cli("install").code == 0
    process = cli.start("pause", "-d", app_database, "--json")
    process.send_signal(signal.SIGSTOP)
    assert cli("resume", "-d", app_database).code == 0
    process.send_signal(signal.SIGCONT)
    done = end_of(process)
    assert (done.code, done.json["error"]) == (1, "LeaseLost")
    assert writable(server, app_database)


# What is seen, and what is not ------------------------------------------------------------------------------------


def test_a_terminal_shows_a_live_block_while_draining(cli, server, app_database, open_transaction):
    held = open_transaction(app_database)
    ours, theirs = pty.openpty()
    process = cli.start("pause", "-d", app_database, "--drain-timeout", "60", stderr=theirs, stdout=theirs)
    os.close(theirs)
    wait_until(lambda: draining(server, app_database))
    time.sleep(0.5)
    held.execute("COMMIT")
    shown = b""
    with suppress(OSError):  # EIO: the other side is closed
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    assert process.wait(30) == 0
    text = shown.decode()

    assert text.count("1 session(s) linger") >= 3
    assert "\x1b[1A\x1b[2K" in text or "\x1b[2K\x1b[1A" in text, "nothing was drawn over"
    assert str(held.info.backend_pid) in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor was not given back"
    assert cli("resume", "-d", app_database).code == 0


def test_a_log_gets_a_line_now_and_then_and_json_none(cli, server, app_database, open_transaction):
    open_transaction(app_database)
    plain = cli("pause", "-d", app_database, "--drain-timeout", "2.5")
    lines = [line for line in plain.err.splitlines() if "draining" in line]
    assert len(lines) == 2
    assert re.search(r"1 may finish for 2\.\d s more, then terminated \(pid \d+ app\)", lines[0])
    cli("resume", "-d", app_database)

    open_transaction(app_database)
    words = ("--drain-timeout", "0.5", "--on-drain-timeout", "abort", "--json")
    assert cli("pause", "-d", app_database, *words).err == ""


@pytest.mark.parametrize("words", [(), ("--json",), ("--verbose",), ("--json", "--verbose")])
def test_a_wrong_password_is_never_shown(cli, server, words):
    dsn = server.dsn("postgres", "freezer", password=SECRET)
    for where in ("--dsn", "environment"):
        if where == "environment":
            cli.environment["PG_FREEZE_DSN"] = dsn
        done = cli("status", *words, *(("--dsn", dsn) if where == "--dsn" else ()))
        assert done.code in (1, 3)
        assert "hunter2" not in done.out + done.err
        assert ("Traceback" in done.err) == ("--verbose" in words)


@pytest.mark.parametrize("uri", ["postgresql://u:{}@x@h/d", "postgresql://u:{}/x@h/d", "postgresql://u:{}:x/@h:y/d"])
def test_a_password_that_breaks_its_uri_is_not_shown_either(cli, uri):
    done = cli("status", "--verbose", "--dsn", uri.format("hunter2"))
    assert done.code == 2
    assert "hunter2" not in done.out + done.err


@pytest.mark.parametrize("verb", ["status", "guard"])
def test_airflow_is_not_loaded_for_a_dsn(cli, verb):
    script = (
        "import sys; from pg_freeze.cli import main; code = main([sys.argv[1], '--json']);"
        "sys.exit(code or any(name.partition('.')[0] == 'airflow' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script, verb], env=cli.environment, check=False).returncode == 0


@pytest.mark.timeout(240)
def test_an_airflow_connection_works_as_well(cli, server, app_database, tmp_path):
    del cli.environment["PG_FREEZE_DSN"]
    connection = {"conn_type": "postgres", "host": "127.0.0.1", "port": server.port, "login": "freezer"}
    connection |= {"password": password("freezer"), "schema": app_database}
    cli.environment |= {"AIRFLOW_CONN_GITLAB": json.dumps(connection), "AIRFLOW_HOME": str(tmp_path)}

    process = cli.start("pause", "-d", app_database, "--conn-id", "gitlab", "--json")
    other = cli.start("guard", "--conn-id", "nobody knows", "--conn-id", "gitlab", "--json")
    paused, guarded = end_of(process, 110), end_of(other, 110)

    assert (paused.code, paused.json["state"]) == (0, "frozen")
    assert guarded.code == 1
    assert [one.get("error") for one in guarded.json["servers"]] == ["InvalidRequest", None]
    cli.environment["PG_FREEZE_DSN"] = server.dsn("postgres", "freezer")
    assert cli("resume", "-d", app_database).code == 0


# Output that goes nowhere -----------------------------------------------------------------------------------------


def test_a_pause_whose_result_cannot_be_written_is_undone(cli, server, app_database):
    with Path("/dev/full").open("w") as full:
        done = cli("pause", "-d", app_database, "--json", stdout=full)
    assert (done.code, "undone" in done.err) == (1, True)
    assert writable(server, app_database)


def test_a_pause_whose_messages_nobody_reads_goes_on(cli, server, app_database, open_transaction):
    open_transaction(app_database)
    ours, theirs = os.pipe()
    os.close(ours)
    done = cli("pause", "-d", app_database, "--drain-timeout", "0.5", stderr=theirs)
    os.close(theirs)
    assert done.code == 0
    assert frozen(server, app_database)

    closed = cli.shell(f"pg-freeze resume -d {app_database} >&- 2>&-")
    assert closed.code == 0
    assert writable(server, app_database)


def test_a_reader_who_has_seen_enough_causes_no_traceback(cli):
    done = cli.shell("pg-freeze history | true; pg-freeze --help | true; pg-freeze status --json | true")
    assert "Traceback" not in done.err
    assert "Exception ignored" not in done.err


# Guard and install ------------------------------------------------------------------------------------------------


def expired(cli: Cli, name: str) -> None:
    assert cli("pause", "-d", name, "--no-dead-man", "--lease", "1.2", "--drain-timeout", "1").code == 0
    time.sleep(1.3)


def test_the_guard_thaws_what_has_outlived_its_lease_past_a_server_that_is_away(cli_to, own_server, new_database):
    cli, name = cli_to(own_server), new_database(own_server)
    expired(cli, name)
    assert frozen(own_server, name)

    dsns: Sequence[str] = ("--dsn", "host=127.0.0.1 port=1", "--dsn", cli.environment["PG_FREEZE_DSN"])
    done = cli("guard", *dsns, "--json")

    assert done.code == 1
    away, here = done.json["servers"]
    assert away["error"] == "ServerLost"
    assert [one["databases"] for one in here["thawed"]] == [[name]]
    assert (done.json["thawed"], writable(own_server, name)) == (1, True)


def test_the_guard_finds_nothing_to_do_where_nothing_is_installed(cli_to, own_server):
    done = cli_to(own_server)("guard", "--json")
    assert (done.code, done.json["thawed"]) == (0, 0)


def test_the_guard_goes_round_until_it_is_stopped(cli_to, own_server, new_database):
    cli, name = cli_to(own_server), new_database(own_server)
    process = cli.start("guard", "--every", "0.2")
    expired(cli, name)
    wait_until(lambda: not frozen(own_server, name))
    process.terminate()
    done = end_of(process)
    assert (done.code, "Stopped after" in done.out) == (0, True)
    assert f"thawed {name}" in done.err


def test_install_lets_other_roles_in(cli_to, own_server, new_database):
    cli, name = cli_to(own_server), new_database(own_server)
    own_server.execute("REVOKE CREATE ON DATABASE postgres FROM freezer")
    assert cli("pause", "-d", name, "--json").code == 3

    cli.environment["PG_FREEZE_DSN"] = own_server.dsn()
    assert cli("install", "--grant", "freezer", "--json").json == {"installed": True, "granted": ["freezer"]}
    assert cli("install", "--grant", "stranger", "--json").code == 3

    cli.environment["PG_FREEZE_DSN"] = own_server.dsn("postgres", "freezer")
    assert cli("pause", "-d", name).code == 0
    assert cli("resume", "-d", name).code == 0


def test_every_verb_has_help_with_examples(cli):
    verbs = re.findall(r"^    (\w[\w-]*)", cli("--help").out.split("verbs:")[1], re.MULTILINE)
    assert {"preflight", "pause", "checkpoint", "resume", "status", "history", "install", "uninstall", "guard"} <= set(
        verbs
    )
    for verb in verbs:
        shown = cli(verb, "--help")
        assert (shown.code, f"  pg-freeze {verb}" in shown.out.split("examples")[1]) == (0, True)


@pytest.mark.parametrize(
    ("verb", "codes"),
    [
        ("pause", "0 1 2 3 4 5 128+n"),
        ("resume", "0 1 2 3 5 6 8 128+n"),
        ("status", "0 1 2 3 5 6 7 8 128+n"),
        ("verify-copy", "0 1 2 3 128+n"),
    ],
)
def test_the_help_of_a_verb_lists_its_own_exit_codes(cli, verb, codes):
    listed = cli(verb, "--help").out.split("\nexit codes:\n")[1]
    assert re.findall(r"^  (\d[\d+n]*)  ", listed, re.MULTILINE) == codes.split()


def test_a_freeze_by_privileges_is_begun_checkpointed_attested_and_ended_by_verbs_of_their_own(
    cli_to, own_server, new_database
):
    name = new_database(own_server)
    own_server.execute("GRANT app TO freezer")
    cli = cli_to(own_server)
    with own_server.connect_factory("app", name)() as app:
        app.execute("CREATE TABLE t (i int)")
        paused = cli("pause", "-d", name, "--strategy", "privileges", "--json")
        assert (paused.code, paused.json["strategy"], paused.json["state"]) == (0, "privileges", "frozen"), paused.out
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            app.execute("INSERT INTO t VALUES (1)")
        again = cli("pause", "-d", name, "--strategy", "privileges", "--json")
        assert again.json["token"] == paused.json["token"]
        refused = cli("pause", "-d", name, "--json")
        assert (refused.code, refused.json["findings"][0]["code"]) == (3, "held")
        for verb in ("checkpoint",), ("attest", "--before"), ("attest", "--after"):
            done = cli(*verb, "-d", name, "--json")
            assert (done.code, done.json["token"]) == (0, paused.json["token"])
        assert name in cli("status").to_type
        assert cli("resume", "-d", name, "--json").json["thawed"][0]["token"] == paused.json["token"]
        app.execute("INSERT INTO t VALUES (1)")


def test_a_pause_by_locks_is_refused_and_says_what_to_use(cli, app_database):
    done = cli("pause", "-d", app_database, "--strategy", "lock", "--json")

    assert (done.code, done.json["error"]) == (2, "InvalidRequest")
    assert "pg-freeze run" in done.json["message"]
    assert cli("pause", "-d", app_database, "--strategy", "hope").code == 2
