"""The command of ``pg-freeze run``: told when its freeze is over, and ended with all that it has started."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from devtools.environment import without
from devtools.rights import checkpointer
from pg_freeze.cli import command
from tests.server.clients import heed_signals, wait_until

PROGRAM = Path(sys.executable).with_name("pg-freeze")
# Beside its first process: a child, one in a session of its own, and a daemon that has forked twice.
FAMILY = """
echo $$ >>"$1"
sh -c 'echo $$ >>"$1"; exec sleep 300' sh "$1" &
setsid sh -c 'echo $$ >>"$1"; exec sleep 300' sh "$1" &
(setsid sh -c 'echo $$ >>"$1"; exec sleep 300' sh "$1" &) &
"""
STUBBORN = {
    "ignores SIGTERM": "trap '' TERM; echo $$ >\"$1\"; while :; do sleep 1; done",
    "stops itself": 'echo $$ >"$1"; while :; do kill -STOP $$; done',
}


@pytest.fixture
def run(server, app_database, app_connect):
    app_connect(app_database).execute("CREATE TABLE things (i int)")
    server.execute("GRANT app TO freezer")
    environment = without("PG", "AIRFLOW")
    environment["PG_FREEZE_DSN"] = server.dsn("postgres", checkpointer(server.version))
    started = []

    def start(*words, **options):
        options = {"stdin": subprocess.DEVNULL, "preexec_fn": heed_signals, **options}
        process = subprocess.Popen(
            [str(PROGRAM), "run", "--database", app_database, *words],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(OSError):
            process.kill()
        process.wait()


def processes(file, number):
    """Return the process ids that are written there, once there are so many."""
    wait_until(lambda: file.exists() and len(file.read_text().split()) == number, within=30)
    return [int(pid) for pid in file.read_text().split()]


def alive(pid):
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def gone(pids, within=10):
    wait_until(lambda: not any(map(alive, pids)), within=within)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_all_that_a_command_has_started_ends_with_pg_freeze(run, tmp_path, number):
    file = tmp_path / "pids"
    process = run("--", "sh", "-c", FAMILY + "wait; sleep 300", "sh", str(file))
    family = processes(file, 4)

    process.send_signal(number)

    process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert not any(map(alive, family))
    gone(family)


@pytest.mark.parametrize("how", STUBBORN)
def test_a_command_that_heeds_no_sigterm_is_killed(run, tmp_path, how):
    file = tmp_path / "pids"
    process = run("--", "sh", "-c", STUBBORN[how], "sh", str(file))
    pids = processes(file, 1)

    process.send_signal(signal.SIGKILL)

    gone(pids, within=15)
    process.communicate(timeout=30)


def test_a_second_ctrl_c_changes_nothing(run, tmp_path, app_connect, app_database):
    file = tmp_path / "pids"
    process = run("--", "sh", "-c", STUBBORN["ignores SIGTERM"], "sh", str(file))
    pids = processes(file, 1)

    process.send_signal(signal.SIGINT)
    wait_until(lambda: can_write(app_connect, app_database), within=30)
    process.send_signal(signal.SIGINT)

    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert not any(map(alive, pids))


def can_write(app_connect, database):
    conn = app_connect(database)
    conn.execute("SET lock_timeout = '500ms'")
    try:
        conn.execute("INSERT INTO things VALUES (1)")
    except psycopg.errors.LockNotAvailable:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_a_signal_has_ended_is_reported_as_a_shell_does(run, number):
    process = run("--json", "--", "sh", "-c", f"echo to stdout; kill -{number.value} $$")

    out, err = process.communicate(timeout=60)

    assert process.returncode == 128 + number
    assert json.loads(out)["command_exit_code"] == -number
    assert "to stdout" in err


@pytest.mark.parametrize("order", ["and dies at once", "and stays"])
def test_a_command_is_not_started_any_more_for_a_pg_freeze_that_is_gone(tmp_path, order):
    file = tmp_path / "started"
    control, ours = os.pipe()
    status, its = os.pipe()
    program = [
        sys.executable,
        "-I",
        "-S",
        command.__file__.replace("command", "supervisor"),
        str(control),
        str(its),
        "1",
    ]
    words = ["sh", "-c", 'echo $$ >"$1"; exec sleep 300', "sh", str(file)]
    asked = json.dumps({"command": words, "program": "/bin/sh", "environment": {}}).encode() + b"\n"
    os.write(ours, asked)
    if order == "and dies at once":
        os.close(ours)
    with subprocess.Popen(program, pass_fds=(control, its), start_new_session=True) as supervisor:
        for end in (control, its):
            os.close(end)
        if order == "and stays":
            (pid,) = processes(file, 1)
            os.close(ours)
            gone([pid])
        supervisor.wait(timeout=30)
    assert file.exists() == (order == "and stays")
    os.close(status)


def test_a_command_whose_supervisor_is_killed_is_ended_and_all_is_thawed(run, tmp_path, app_connect, app_database):
    file = tmp_path / "pids"
    process = run("--", "sh", "-c", 'echo $$ >"$1"; sleep 300 & echo $! >>"$1"; wait', "sh", str(file))
    pids = processes(file, 2)
    parent = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])

    os.kill(parent, signal.SIGKILL)

    _, err = process.communicate(timeout=30)
    assert process.returncode == 1, err
    gone(pids)
    app_connect(app_database).execute("INSERT INTO things VALUES (1)")


@pytest.mark.parametrize("event", ["the lease is over", "SIGTERM"])
def test_a_command_whose_supervisor_stands_still_is_ended_with_it(run, tmp_path, app_connect, app_database, event):
    file = tmp_path / "pids"
    words = ("--strategy", "read-only", *(("--lease", "4", "--drain-timeout", "1") if event != "SIGTERM" else ()))
    process = run(*words, "--", "sh", "-c", FAMILY + "wait; sleep 300", "sh", str(file))
    pids = processes(file, 4)
    parent = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])

    os.kill(parent, signal.SIGSTOP)
    if event == "SIGTERM":
        process.send_signal(signal.SIGTERM)

    _, err = process.communicate(timeout=60)
    assert process.returncode == (1 if event != "SIGTERM" else 128 + signal.SIGTERM), err
    assert err.count("The freeze is over: telling the command to end") == (event != "SIGTERM")
    assert not any(map(alive, [parent, *pids]))
    app_connect(app_database).execute("INSERT INTO things VALUES (1)")


def test_a_supervisor_that_stands_still_keeps_nobody_waiting_who_tells_it_something(tmp_path):
    file = tmp_path / "pids"
    with command.Command("/bin/sh", ["sh", "-c", 'echo $$ $PPID >"$1"; exec sleep 300', "sh", str(file)]) as watched:
        watched.start({"PATH": os.environ["PATH"]})
        _, parent = processes(file, 2)
        os.kill(parent, signal.SIGSTOP)
        for _ in range(20_000):  # more than a pipe holds
            watched.due_in(300)
        os.kill(parent, signal.SIGCONT)
        time.sleep(0.1)
        watched.tell()
        assert watched.wait(timedelta(seconds=60)) == -signal.SIGTERM


@pytest.mark.parametrize("strategy", ["lock", "read-only"])
def test_a_command_is_told_when_the_lease_is_over(run, tmp_path, strategy):
    file = tmp_path / "pids"
    words = ("--strategy", strategy, "--lease", "2", "--drain-timeout", "1")
    process = run(*words, "--", "sh", "-c", 'echo $$ >"$1"; trap "exit 3" TERM; sleep 300 & wait', "sh", str(file))
    pids = processes(file, 1)

    _, err = process.communicate(timeout=20)

    assert process.returncode == 1, err
    gone(pids)


def test_a_command_is_told_by_the_end_of_the_lease_although_pg_freeze_stands_still(run, tmp_path):
    file = tmp_path / "pids"
    words = ("--strategy", "read-only", "--lease", "3", "--drain-timeout", "1")
    process = run(*words, "--", "sh", "-c", 'echo $$ >"$1"; exec sleep 300', "sh", str(file))
    pids = processes(file, 1)
    time.sleep(0.6)  # until it has looked once

    process.send_signal(signal.SIGSTOP)

    gone(pids)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1, err


@pytest.mark.parametrize("strategy", ["lock", "read-only", "privileges"])
def test_a_command_is_told_when_somebody_else_thaws(run, server, tmp_path, app_database, strategy):
    file = tmp_path / "pids"
    process = run("--strategy", strategy, "--", "sh", "-c", 'echo $$ >"$1"; exec sleep 300', "sh", str(file))
    pids = processes(file, 1)

    where = app_database if strategy == "privileges" else "postgres"
    with server.connect_factory(checkpointer(server.version), where)() as conn:
        conn.execute("CALL pgfreeze.thaw_all()")

    gone(pids)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1, err


def test_a_command_goes_on_without_its_freeze_if_so_asked(run, server, tmp_path):
    file, done = tmp_path / "pids", tmp_path / "done"
    shell = 'echo $$ >"$1"; sleep 3; echo done >"$2"'
    process = run("--on-lost", "ignore", "--", "sh", "-c", shell, "sh", str(file), str(done))
    processes(file, 1)

    server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'pg-freeze lock%'"
    )

    _, err = process.communicate(timeout=30)
    assert process.returncode == 1, err
    assert done.exists()


def take_terminal():
    heed_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize("what", ["Ctrl-C", "hangup"])
def test_ctrl_c_and_the_loss_of_a_terminal_thaw_and_end_the_command(run, tmp_path, app_connect, app_database, what):
    ours, its = pty.openpty()
    file = tmp_path / "pids"
    shell = 'echo $$ >"$1"; exec sleep 300'
    process = run("--", "sh", "-c", shell, "sh", str(file), stdin=its, start_new_session=True, preexec_fn=take_terminal)
    os.close(its)
    pids = processes(file, 1)

    os.write(ours, b"\x03") if what == "Ctrl-C" else os.close(ours)

    process.communicate(timeout=30)
    assert process.returncode == 128 + (signal.SIGINT if what == "Ctrl-C" else signal.SIGHUP)
    gone(pids)
    app_connect(app_database).execute("INSERT INTO things VALUES (1)")


def test_what_is_typed_reaches_the_command_and_its_exit_code_is_passed_on(run):
    process = run("--", "sh", "-c", 'read word; test "$word" = yes && exit 9', stdin=subprocess.PIPE)

    _, err = process.communicate("yes\n", timeout=60)

    assert process.returncode == 9, err


def test_a_command_that_cannot_be_run_fails_and_all_is_thawed(run, tmp_path, app_connect, app_database):
    program = tmp_path / "no program"
    program.write_bytes(b"\x7fELF nonsense")
    program.chmod(0o755)

    process = run("--", str(program))

    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "could not be run" in err
    app_connect(app_database).execute("INSERT INTO things VALUES (1)")
