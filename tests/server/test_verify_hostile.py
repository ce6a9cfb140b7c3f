"""A copy that wants more than to be verified: its code, its settings, its links, and servers that still use it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from devtools.environment import without
from devtools.pgserver import Server
from devtools.rights import create_application_database, create_roles
from pg_freeze import FreezeError, FreezeRefused
from pg_freeze.copies.server import wait_until_gone
from pg_freeze.copies.tree import unused_uid
from tests.server.copies import TRUSTED, copied, frozen_copies, verify

DATABASE = "app_1"
PROGRAM = Path(sys.executable).with_name("pg-freeze")
# What code of the copy does wherever it is run, but not on the server that it comes from: it notes who it is, what it
# sees, and whom it reaches. Nothing of it keeps the copy from being good.
SPY = """
exec >> seen 2>&1
echo uid=$(id -u) gids=$(id -G)
echo root=$(ls /)
echo etc=$(ls /etc)
echo var=$(ls /var 2> /dev/null)
echo x > {outside}/written
cat /etc/shadow
(echo > /dev/tcp/127.0.0.1/{port}) && echo network
true"""
SPIES = (
    "CREATE FUNCTION run_it() RETURNS void LANGUAGE sql AS $$ COPY (SELECT 1) TO PROGRAM 'bash ./spy' $$",
    """CREATE FUNCTION spy(id integer) RETURNS integer IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN
       IF pg_catalog.current_setting('port') = '5432' THEN PERFORM public.run_it(); END IF; RETURN id; END $$""",
)


@pytest.fixture(scope="module")
def copies(pg_version, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    for part in (outside, *outside.parents[:3]):
        if part.stat().st_uid == os.geteuid():
            part.chmod(0o777)
    with Server(pg_version) as server:
        create_roles(server)
        create_application_database(server, DATABASE)
        (server.data / "spy").write_text(SPY.format(outside=outside, port=server.port))
        (server.data / "spy").chmod(0o755)
        for statement in (
            "CREATE TABLE things AS SELECT i AS id FROM generate_series(1, 100) i",
            *SPIES,
            "CREATE INDEX things_spied ON things (spy(id)) WHERE id < 3",
        ):
            server.execute(statement, dbname=DATABASE)
        with frozen_copies(server, [DATABASE]) as copies:
            copies.outside = outside
            yield copies


def refused(copies, copy, **options):
    with pytest.raises(FreezeRefused) as raised:
        copies.verify(copy, **options)
    return str(raised.value)


@pytest.mark.needs("isolation")
@pytest.mark.every_version
def test_code_of_the_copy_runs_as_nobody_who_matters_and_reaches_nothing(copies):
    copy = copies.clone()
    found = copies.verify(copy)
    assert found.problems == ()
    assert found.isolated
    seen = (copy / "seen").read_text()
    uid = int(seen.partition("uid=")[2].split()[0])
    assert uid > 65534
    assert f"gids={uid}\n" in seen
    assert "written" not in [path.name for path in copies.outside.iterdir()]
    assert "network" not in seen
    assert "root:" not in seen
    roots = set(seen.partition("root=")[2].partition("\n")[0].split())
    # Of the path to the copy and to PostgreSQL's programs there is the bare directory.
    needed = {path.resolve().parts[1] for path in (copy, Path(copies.server.programs))}
    assert not ({"boot", "home", "mnt", "proc", "run", "srv", "sys", "var"} - needed) & roots
    assert set(seen.partition("var=")[2].partition("\n")[0].split()) <= {"tmp"}
    assert "etc=hosts ld.so.cache nsswitch.conf\n" in seen


@pytest.mark.needs("isolation")
def test_routines_of_the_copy_s_journal_are_not_run(copies):
    own = Server(copies.server.version, data=copied(copies.taken, copies.place / "planted"))
    evil = "LANGUAGE plpgsql AS $$ BEGIN COPY (SELECT 1) TO '/tmp/thawed'; RAISE 'planted'; END $$"
    with own:
        own.execute(f"CREATE OR REPLACE PROCEDURE pgfreeze.thaw_all() {evil}")
        own.execute(f"CREATE FUNCTION pgfreeze.evil() RETURNS trigger {evil}")
        for table in ("freezes", "frozen_databases"):
            own.execute(f"CREATE TRIGGER t BEFORE UPDATE ON pgfreeze.{table} EXECUTE FUNCTION pgfreeze.evil()")
        own.execute("CREATE FUNCTION pgfreeze.evil_event() RETURNS event_trigger " + evil)
        own.execute("CREATE EVENT TRIGGER e ON ddl_command_start EXECUTE FUNCTION pgfreeze.evil_event()")
        own.execute("ALTER DATABASE postgres SET search_path = pgfreeze, pg_catalog")
        own.execute("CHECKPOINT")
    found = copies.verify(copied(own.data, copies.place / "planted-copy"))
    assert not [one for one in found.problems if "planted" in one]
    assert found.thawed == (DATABASE,)


@pytest.mark.every_version
def test_what_fires_always_and_checks_of_the_copy_s_journal_are_not_run_and_are_there_afterwards(copies):
    own = Server(copies.server.version, data=copied(copies.taken, copies.place / "always"))
    evil = "LANGUAGE plpgsql AS $$ BEGIN RAISE 'planted'; END $$"
    with own:
        own.execute(f"CREATE FUNCTION pgfreeze.evil() RETURNS trigger {evil}")
        own.execute(f"CREATE FUNCTION pgfreeze.never() RETURNS boolean {evil}")
        for table in ("freezes", "frozen_databases"):
            for moment in ("BEFORE UPDATE", "AFTER UPDATE"):
                name = f"a_{moment[:5].strip().lower()}"
                own.execute(
                    f"CREATE TRIGGER {name} {moment} ON pgfreeze.{table} FOR EACH ROW EXECUTE FUNCTION pgfreeze.evil();"
                    f" ALTER TABLE pgfreeze.{table} ENABLE ALWAYS TRIGGER {name}"
                )
            own.execute(f"ALTER TABLE pgfreeze.{table} ADD CHECK (pgfreeze.never()) NOT VALID")
            own.execute(f"CREATE POLICY p ON pgfreeze.{table} USING (pgfreeze.never())")
            own.execute(f"ALTER TABLE pgfreeze.{table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        there = own.execute("SELECT relname, relhastriggers, relchecks FROM pg_class WHERE relhastriggers ORDER BY 1")
        own.execute("CHECKPOINT")
    copy = copied(own.data, copies.place / "always-copy")

    found = copies.verify(copy)

    assert not [one for one in found.problems if "planted" in one]
    assert found.thawed == (DATABASE,)
    with Server(copies.server.version, data=copy) as verified:
        asked = "SELECT relname, relhastriggers, relchecks FROM pg_class WHERE relhastriggers ORDER BY 1"
        assert verified.execute(asked) == there


@pytest.mark.parametrize(
    "planted",
    [
        "ALTER TABLE pgfreeze.freezes ADD more text GENERATED ALWAYS AS (pgfreeze.code(holder)) STORED",
        "CREATE DOMAIN pgfreeze.held AS text CHECK (pgfreeze.code(VALUE) IS DISTINCT FROM 'x');"
        " ALTER TABLE pgfreeze.freezes ADD more pgfreeze.held",
        "CREATE INDEX ON pgfreeze.freezes (pgfreeze.code(holder))",
        "CREATE INDEX ON pgfreeze.freezes (holder) WHERE pgfreeze.code(holder) = ''",
        "CREATE RULE r AS ON UPDATE TO pgfreeze.freezes DO ALSO SELECT pgfreeze.code('x')",
    ],
    ids=["computed", "domain", "index", "condition", "rule"],
)
def test_a_journal_of_a_copy_that_computes_something_is_none_of_ours(copies, planted, request):
    place = copies.place / request.node.callspec.id
    own = Server(copies.server.version, data=copied(copies.taken, place))
    with own:
        own.execute("CREATE FUNCTION pgfreeze.code(text) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT $1'")
        own.execute(planted.encode())
        own.execute("CHECKPOINT")
    with pytest.raises(FreezeError, match="freezes is not one of its tables"):
        copies.verify(copied(own.data, place.with_suffix(".copy")))


@pytest.mark.every_version
def test_settings_of_the_copy_have_no_effect_and_are_there_afterwards(copies):
    copy = copies.clone()
    live = copies.server
    elsewhere = copies.place / "elsewhere"
    settings = {
        "data_directory": str(live.data),
        "hba_file": "/nonexistent",
        "ident_file": "/nonexistent",
        "shared_preload_libraries": "nonexistent",
        "session_preload_libraries": "nonexistent",
        "local_preload_libraries": "nonexistent",
        "archive_mode": "on",
        "archive_command": f"touch {elsewhere}",
        "restore_command": f"touch {elsewhere}; false",
        "recovery_end_command": f"touch {elsewhere}",
        "archive_cleanup_command": f"touch {elsewhere}",
        "external_pid_file": str(elsewhere),
        "unix_socket_directories": "/nonexistent",
        "log_directory": str(elsewhere),
        "logging_collector": "on",
        "primary_conninfo": live.dsn(),
        "ssl": "on",
        "ssl_cert_file": "/nonexistent",
        "port": str(live.port),
        "wal_level": "minimal",
        "listen_addresses": "*",
        "max_connections": "1",
        "fsync": "nonsense",
    }
    text = "".join(f"{name} = '{value}'\n" for name, value in settings.items())
    for name in ("postgresql.conf", "postgresql.auto.conf"):
        (copy / name).write_text(text + "include = '/nonexistent'\n")
    for name in ("standby.signal", "recovery.signal", "recovery.conf"):
        (copy / name).write_text("")
    before = (copy / "postgresql.auto.conf").read_bytes()

    found = copies.verify(copy)

    assert found.problems == ()
    assert "standby.signal of the copy, which was set aside" in found.unseen
    assert not elsewhere.exists()
    assert live.running
    assert live.execute("SELECT state FROM pgfreeze.freezes") == [("frozen",)]
    assert (copy / "postgresql.auto.conf").read_bytes() == before
    assert (copy / "standby.signal").exists()


@pytest.mark.needs("isolation")
def test_settings_of_databases_and_roles_have_no_effect(copies):
    own = Server(copies.server.version, data=copied(copies.taken, copies.place / "set"))
    with own:
        with own.control() as session:
            for statement in (
                f"ALTER DATABASE {DATABASE} SET local_preload_libraries = 'nonexistent'",
                f"ALTER DATABASE {DATABASE} SET statement_timeout = '1ms'",
                "ALTER ROLE postgres SET session_preload_libraries = 'nonexistent'",
                "ALTER ROLE postgres SET zero_damaged_pages = on",
                "ALTER ROLE postgres SET search_path = pgfreeze",
                "ALTER ROLE postgres SET role = app",
            ):
                session.execute(statement)
    assert copies.verify(copied(own.data, copies.place / "set-copy")).thawed == (DATABASE,)


def test_a_link_that_leads_out_of_the_copy_is_refused_and_what_it_leads_to_is_left_alone(copies):
    copy = copies.clone()
    live = copies.server.data
    before = sorted((path.name, path.stat().st_mtime) for path in (live / "pg_wal").iterdir())
    real = (copy / "pg_wal").rename(copies.place / "wal-of-copy")
    (copy / "pg_wal").symlink_to(live / "pg_wal")
    assert f"leads out of the copy, to {live}/pg_wal: name the copy of that directory with --wal DIR" in refused(
        copies, copy
    )
    assert "a server runs on" in refused(copies, copy, wal_dir=live / "pg_wal")
    assert sorted((path.name, path.stat().st_mtime) for path in (live / "pg_wal").iterdir()) == before
    assert copies.server.running

    assert copies.verify(copy, wal_dir=real).problems == ()
    assert (copy / "pg_wal").readlink() == live / "pg_wal"

    for name in ("base/99999", "pg_xact", "global/1262"):
        spoilt = copies.clone()
        with suppress(FileNotFoundError):
            (spoilt / name).rename(copies.place / name.replace("/", "-"))
        (spoilt / name).symlink_to(live / "base")
        assert "leads out of the copy" in refused(copies, spoilt)


def test_links_that_a_server_does_not_need_are_taken_away_for_the_time(copies):
    copy = copies.clone()
    (copy / "log").symlink_to("/var/log")
    (copy / "server.key").symlink_to("/etc/shadow")
    assert copies.verify(copy).problems == ()
    assert (copy / "log").readlink() == Path("/var/log")


@pytest.mark.every_version
def test_a_tablespace_is_looked_for_where_it_is_mapped_to(own_server, tmp_path):
    create_application_database(own_server, DATABASE)
    place = own_server.directory / "fast"
    place.mkdir()
    os.chown(place, own_server.data.stat().st_uid, own_server.data.stat().st_gid)
    own_server.execute(f"CREATE TABLESPACE fast LOCATION '{place}'")
    own_server.execute("CREATE TABLE things (id int PRIMARY KEY) TABLESPACE fast", dbname=DATABASE)
    own_server.execute("INSERT INTO things SELECT generate_series(1, 1000)", dbname=DATABASE)
    with frozen_copies(own_server, [DATABASE]) as copies:
        copy, moved = copies.clone(), copied(place, copies.place / "fast")
        assert f"--tablespace {place}=DIR" in refused(copies, copy)
        assert "lie in each other" in refused(copies, copy, tablespaces={str(place): copy / "base"})
        assert "none of the copy's" in refused(copies, copy, tablespaces={str(place): moved, "/other": moved})
        before = sorted((path, path.stat().st_mtime_ns) for path in place.rglob("*"))

        assert copies.verify(copy, tablespaces={str(place): moved}).problems == ()

        assert sorted((path, path.stat().st_mtime_ns) for path in place.rglob("*")) == before
        assert moved.stat().st_uid == place.stat().st_uid


def test_a_file_with_a_second_name_outside_or_that_is_none_is_refused(copies):
    copy = copies.clone()
    os.link(copy / "PG_VERSION", copies.place / "second-name")
    assert "has another name outside of the copy" in refused(copies, copy)
    (copies.place / "second-name").unlink()
    os.link(copy / "PG_VERSION", copy / "base" / "twin")
    assert "are one file (a hard link)" in refused(copies, copy)
    (copy / "base" / "twin").unlink()
    (copy / "base" / "twin").symlink_to("../PG_VERSION")
    assert "is a link, and no data directory has one there" in refused(copies, copy)
    (copy / "base" / "twin").unlink()
    os.mkfifo(copy / "base" / "pipe")
    assert "has a device or a pipe" in refused(copies, copy)
    (copy / "base" / "pipe").unlink()
    (copy / "tablespace_map").write_text("16384 /etc\n")
    assert "tablespace_map" in refused(copies, copy)


def namespaced(*command, **options):
    return subprocess.Popen(
        [
            "unshare",
            "--pid",
            "--mount",
            "--net",
            "--ipc",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--",
            *map(str, command),
        ],
        text=True,
        **options,
    )


def end(process):
    """End what runs in the namespaces: a change of the user id makes it survive its parent."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    process.wait()


def running(directory):
    with suppress(FileNotFoundError):
        return "ready" in (directory / "postmaster.pid").read_text()
    return False


@pytest.mark.needs("isolation")
def test_a_server_in_another_namespace_is_seen_and_its_lock_file_left_to_it(copies):
    copy = copies.clone()
    (copy / "postmaster.pid").unlink()
    owner = copy.stat().st_uid
    command = ("setpriv", f"--reuid={owner}", "--clear-groups", copies.server.programs / "postgres", "-D", copy)
    process = namespaced(
        *command, "-c", f"port={copies.server.port}", "-c", f"unix_socket_directories={copy}", stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
        while not running(copy):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        lock = (copy / "postmaster.pid").read_bytes()
        for stale in (False, True):
            assert "a server runs on" in refused(copies, copy, stale_pid=stale)
        assert (copy / "postmaster.pid").read_bytes() == lock
        assert process.poll() is None
    finally:
        end(process)


@pytest.mark.needs("isolation")
def test_a_server_that_runs_on_the_copy_through_an_overlay_is_seen(copies):
    base = copies.place / "over lay,s"
    for name in ("lower", "upper", "work", "merged"):
        (base / name).mkdir(parents=True)
        (base / name).chmod(0o755)
    base.chmod(0o755)
    copy = copied(copies.taken, base / "upper" / "data")
    (copy / "postmaster.pid").unlink()
    seen = base / "merged" / "data"
    quoted = {name: str(base / name).replace(",", "\\,") for name in ("lower", "upper", "work")}
    options = "lowerdir={lower},upperdir={upper},workdir={work}".format(**quoted)
    owner, port = copy.stat().st_uid, copies.server.port
    server = f"'{copies.server.programs}/postgres' -D '{seen}' -c port={port} -c unix_socket_directories="
    start = f"exec setpriv --reuid={owner} --clear-groups {server}"
    process = namespaced("sh", "-c", f"mount -t overlay -o '{options}' overlay '{base}/merged' && {start}")
    try:
        deadline = time.monotonic() + 30
        while not running(copy):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        assert "it is the working directory of process" in refused(copies, copy, stale_pid=True)
        assert process.poll() is None
    finally:
        end(process)


@pytest.mark.needs("isolation")
def test_from_a_container_a_lock_file_is_only_believed_to_be_stale_if_somebody_says_so(copies):
    def run(copy, *more):
        words = ("--data-dir", copy, "--bin-dir", copies.server.programs, "--attestation", copies.attestation)
        process = namespaced(PROGRAM, "verify-copy", *words, *more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return process.communicate(timeout=60)[0], process.returncode

    copy = copies.clone()
    lock = (copy / "postmaster.pid").read_bytes()
    said, code = run(copy)
    assert (code, "this is a container" in said, "--stale-pid" in said) == (3, True, True), said
    assert (copy / "postmaster.pid").read_bytes() == lock
    said, code = run(copy, "--stale-pid")
    assert code == 0, said


@pytest.mark.needs("isolation")
def test_only_what_still_runs_keeps_the_files_of_a_copy():
    uid = unused_uid()
    process = subprocess.Popen(["sleep", "60"], user=uid)
    try:
        with pytest.raises(FreezeError, match="does not end"):
            wait_until_gone(uid, within=0)
        # A zombie, as long as nobody reaps it: in a container perhaps for ever.
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        wait_until_gone(uid, within=0)
    finally:
        process.kill()
        process.wait()


def test_libpq_s_variables_have_no_effect_nor_has_a_strict_umask_and_a_relative_path_works(copies):
    copy = copies.clone()
    environment = {
        **without("PG"),
        "PGHOST": str(copies.server.socket_dir),
        "PGHOSTADDR": "127.0.0.1",
        "PGPORT": str(copies.server.port),
        "PGSERVICE": "nonexistent",
        "PGOPTIONS": "-c nonsense=1",
        "PGSSLMODE": "verify-full",
        "PGDATA": str(copies.server.data),
        "PGUSER": "nobody",
        "PGTARGETSESSIONATTRS": "standby",
        "PGREQUIREAUTH": "scram-sha-256",
        "LD_PRELOAD_NOTHING": "",
    }
    words = ["verify-copy", "--data-dir", copy.name, "--bin-dir", os.path.relpath(copies.server.programs, copies.place)]
    words += ["--attestation", "attestation.json", *(["--trust-copy"] if TRUSTED else [])]
    done = subprocess.run(
        [PROGRAM, *words], cwd=copies.place, env=environment, capture_output=True, text=True, check=False, umask=0o077
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The copy is good" in done.stdout
    assert "Not looked at: database 'postgres': it was not frozen" in done.stdout


# A user who is not root, but may read root's Python here.
AS_OWNER = (
    *("setpriv", "--reuid={0}", "--regid={0}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--"),
)


@pytest.mark.needs("isolation")
def test_who_is_not_root_is_refused_unless_the_copy_is_trusted(copies):
    copy = copies.clone()
    (copies.place / "tmp").mkdir(exist_ok=True)
    (copies.place / "tmp").chmod(0o777)

    def run(*more):
        words = ("verify-copy", "--data-dir", copy, "--bin-dir", copies.server.programs)
        prefix = [word.format(copy.stat().st_uid) for word in AS_OWNER]
        return subprocess.run(
            [*prefix, PROGRAM, *words, "--attestation", copies.attestation, *more],
            env={"PATH": os.environ["PATH"], "HOME": "/", "TMPDIR": str(copies.place / "tmp")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    # What an earlier run has left, it may say: it is not touched either.
    aside, owner = copy / ".verify-copy", copy.stat().st_uid
    aside.mkdir(mode=0o700)
    (aside / "state.json").write_text(json.dumps({"owner": [owner, owner], "lent_to": None, "moved": ["planted"]}))
    (aside / "0").write_text("")
    for path in (aside, *aside.iterdir()):
        os.chown(path, owner, owner)
    done = run()
    assert done.returncode == 3
    assert "--trust-copy" in done.stderr
    assert (aside / "0").exists()
    shutil.rmtree(aside)
    assert (copy / "postmaster.pid").exists()
    done = run("--trust-copy")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.needs("isolation")
def test_a_verification_that_is_killed_leaves_nothing_running_and_the_next_one_repairs_the_copy(copies):
    copy = copies.clone()
    (copy / "standby.signal").write_text("")
    owner = copy.stat().st_uid
    command = [PROGRAM, "verify-copy", "--data-dir", copy, "--bin-dir", copies.server.programs]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while copy.stat().st_uid == owner or not running(copy):
        assert time.monotonic() < deadline
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lent = copy.stat().st_uid
    assert lent != owner
    while any(path.stat().st_uid == lent for path in Path("/proc").glob("[0-9]*") if path.exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (copy / "standby.signal").exists()

    copies.verify(copy)

    assert copy.stat().st_uid == owner
    assert (copy / "standby.signal").exists()
    assert not (copy / ".verify-copy").exists()
    assert lent not in {path.lstat().st_uid for path in copy.rglob("*")}


def test_two_verifications_of_one_copy_are_refused(copies):
    copy = copies.clone()
    descriptor = os.open(copy, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert "another verify-copy is at work" in refused(copies, copy)
    finally:
        os.close(descriptor)


def test_a_copy_that_hangs_is_given_up(copies):
    own = Server(copies.server.version, data=copied(copies.taken, copies.place / "hanging"))
    sleep = "IF pg_catalog.current_setting('port') = '5432' THEN PERFORM pg_catalog.pg_sleep(3600); END IF"
    with own:
        own.execute(f"ALTER DATABASE {DATABASE} SET default_transaction_read_only = off")
        own.execute(
            f"""CREATE OR REPLACE FUNCTION spy(id integer) RETURNS integer IMMUTABLE LANGUAGE plpgsql
                AS $$ BEGIN {sleep}; RETURN id; END $$""",
            dbname=DATABASE,
        )
    with pytest.raises(FreezeError, match="could not be verified within"):
        verify(copied(own.data, copies.place / "hanging-copy"), copies.server, within=timedelta(seconds=5))
