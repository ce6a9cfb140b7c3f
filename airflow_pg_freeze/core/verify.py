"""Verify a backup: start PostgreSQL on a restored copy, thaw it there, and report what state it was taken in.

The copy is changed by this, as by any start: recovery runs, and the thaw is committed. So verify a clone of what has to
be kept. Nothing reaches the copy but this process, and the copy reaches nothing: no TCP, a socket in a private
directory, no archiving, no subscriptions, no libraries preloaded that might run jobs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg.conninfo import make_conninfo

from airflow_pg_freeze.core import attest, journal, schema
from airflow_pg_freeze.core.attestation import Attestation
from airflow_pg_freeze.core.control import CONNECTION_DEFAULTS, Connect, Control, control
from airflow_pg_freeze.core.errors import FreezeError, FreezeRefused
from airflow_pg_freeze.core.inside import elsewhere
from airflow_pg_freeze.core.model import Freeze, State, iso

_START_WITHIN: Final = timedelta(minutes=30)
_LOOKS_FOR_PROGRAMS: Final = (
    "/usr/lib/postgresql/{version}/bin",
    "/usr/pgsql-{version}/bin",
    "/opt/homebrew/opt/postgresql@{version}/bin",
)
# What of the server's own limits recovery needs at least as large as they were (see "Administrator overview" of hot
# standby, and max_prepared_transactions), by its name in pg_controldata.
_LIMITS: Final[Mapping[str, str]] = {
    "max_connections setting": "max_connections",
    "max_worker_processes setting": "max_worker_processes",
    "max_wal_senders setting": "max_wal_senders",
    "max_prepared_xacts setting": "max_prepared_transactions",
    "max_locks_per_xact setting": "max_locks_per_transaction",
}
_ISOLATED: Final[Mapping[str, str]] = {
    "listen_addresses": "",
    "archive_mode": "off",
    "autovacuum": "off",
    "logging_collector": "off",
    "log_destination": "stderr",
    "max_logical_replication_workers": "0",
    "shared_preload_libraries": "",
    "ssl": "off",
    "external_pid_file": "",
}


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found on a copy. ``problems`` is empty for a good one."""

    data_dir: str
    version: int
    freezes: tuple[Freeze, ...]
    attestations: tuple[Attestation, ...]
    thawed: tuple[str, ...]
    amcheck: str
    problems: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether the copy was taken inside a freeze and came up whole."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {
            "data_dir": self.data_dir,
            "version": self.version,
            "good": self.good,
            "problems": list(self.problems),
            "freezes": [freeze.as_dict() for freeze in self.freezes],
            "attestations": [attestation.as_dict() for attestation in self.attestations],
            "thawed": list(self.thawed),
            "amcheck": self.amcheck,
        }


def verify_copy(
    data_dir: Path, *, bin_dir: Path | None = None, user: str = "postgres", maintenance_database: str = "postgres"
) -> Verified:
    """Start PostgreSQL on a copy, look into its journal, thaw it, check it, and stop it again.

    :param data_dir: the restored data directory. It is started, and so changed.
    :param bin_dir: where ``postgres`` of its major version is; looked for on the PATH and in the usual places.
    :param user: a superuser of the copied server.
    :param maintenance_database: where the journal is.
    :raises FreezeRefused: if this is no data directory, a server runs on it, or there are no programs for it.
    :raises FreezeError: if the server does not start; the message ends with its log.
    """
    version = _version(data_dir)
    programs = _programs(version, bin_dir)
    _refuse_running(data_dir)
    with (
        _server(data_dir, programs, user, maintenance_database) as connect,
        control(connect, "verify the copy") as conn,
    ):
        problems: list[str] = []
        freezes = journal.active(conn) if schema.require(conn) else ()
        # As the journal had it at the moment of the copy: sessions that held locks are not copied along.
        held = tuple(freeze for freeze in freezes if freeze.state in {State.DRAINING, State.FROZEN})
        attestations = tuple(one for freeze in held for one in attest.of_token(conn, freeze.token))
        if not held:
            problems.append(_not_frozen(conn))
        problems += [
            f"the copy was taken while {', '.join(freeze.databases)} still drained"
            for freeze in held
            if freeze.state is not State.FROZEN
        ]
        problems += [
            f"attestation {one.id}: {violation.what} ({violation.who or 'unknown'}, {violation.when or 'time unknown'})"
            for one in attestations
            for violation in one.violations
        ]
        names = tuple(name for freeze in held for name in freeze.databases)
        if held:
            # In a torn copy a row may belong to a transaction yet to come, and waiting for it has no end.
            conn.execute("SET statement_timeout = '5min'")
            conn.execute("CALL airflow_pg_freeze.thaw_all()")
        problems += _still_read_only(conn, names)
        amcheck, broken = _amcheck(conn, programs, names)
        problems += broken
    return Verified(str(data_dir), version, held, attestations, names, amcheck, tuple(problems))


def _not_frozen(conn: Control) -> str:
    newest = journal.newest(conn, 1) if schema.require(conn) else ()
    if newest and (newest[0].thawed_by or "").startswith("thaw_all"):
        return (
            f"the copy was thawed before, by {newest[0].thawed_by} at {iso(newest[0].thawed_at)}, and shows no more in "
            "which state it was taken: verify a fresh copy of the snapshot"
        )
    if names := elsewhere(conn):
        return (
            f"the journal in {conn.info.dbname!r} has no freeze that held; but {', '.join(map(repr, names))} was "
            f"frozen by privileges, with a journal of its own: --maintenance-database {shlex.quote(names[0])}"
        )
    return "the copy was not taken inside a freeze: its journal has none that held"


def _version(data_dir: Path) -> int:
    try:
        return int((data_dir / "PG_VERSION").read_text().strip())
    except (OSError, ValueError) as error:
        raise FreezeRefused(f"{data_dir} is no PostgreSQL data directory: {error}") from error


def _programs(version: int, bin_dir: Path | None) -> Path:
    found = shutil.which("postgres")
    candidates = [bin_dir] if bin_dir else [Path(found).parent] if found else []
    if bin_dir is None:
        candidates += [Path(place.format(version=version)) for place in _LOOKS_FOR_PROGRAMS]
    for candidate in candidates:
        with contextlib.suppress(OSError):
            said = subprocess.run([candidate / "postgres", "--version"], capture_output=True, text=True, check=False)
            if re.search(rf"\) {version}\b", said.stdout):
                return candidate
    looked = ", ".join(map(str, candidates))
    raise FreezeRefused(f"no postgres of version {version} in {looked}: install it, or name its place with --bin-dir")


def _refuse_running(data_dir: Path) -> None:
    """Refuse a directory that a server runs on, and remove the lock file that came along with the copy."""
    lock = data_dir / "postmaster.pid"
    with contextlib.suppress(FileNotFoundError):
        first, home = (*lock.read_text().splitlines(), "", "")[:2]
        with contextlib.suppress(OSError, ValueError):
            here = Path(f"/proc/{int(first)}/cwd").resolve() == data_dir.resolve()
            if here or (Path(home).resolve() == data_dir.resolve() and _alive(int(first))):
                raise FreezeRefused(f"a server runs on {data_dir} (pid {first}): give a copy of it")
        lock.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _server(data_dir: Path, programs: Path, user: str, database: str) -> Iterator[Connect]:
    owner = data_dir.stat()
    if os.geteuid() == 0 and owner.st_uid == 0:
        raise FreezeRefused(
            f"{data_dir} belongs to root, as whom PostgreSQL does not run: chown -R postgres {data_dir}"
        )
    with tempfile.TemporaryDirectory(prefix="pgv-") as made:
        place = Path(made)
        (place / "pg_hba.conf").write_text("local all all trust\n")
        if os.geteuid() == 0:
            for path in (place, place / "pg_hba.conf"):
                os.chown(path, owner.st_uid, owner.st_gid)
        settings = {
            **_ISOLATED,
            **_limits(data_dir, programs),
            "hba_file": str(place / "pg_hba.conf"),
            "ident_file": str(place / "pg_hba.conf"),
            "unix_socket_directories": made,
            "port": "5432",
        }
        if not (data_dir / "postgresql.conf").exists():  # Debian keeps it elsewhere
            (place / "postgresql.conf").write_text("")
            settings["config_file"] = str(place / "postgresql.conf")
        command = [str(programs / "postgres"), "-D", str(data_dir)]
        command += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        as_owner: dict[str, Any] = {"user": owner.st_uid, "group": owner.st_gid} if os.geteuid() == 0 else {}
        with (place / "log").open("w+b") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=data_dir, start_new_session=True, **as_owner
            )
            try:
                parameters = {**CONNECTION_DEFAULTS, "host": made, "port": "5432", "user": user, "dbname": database}
                _wait(process, place / "log", parameters)
                yield lambda: psycopg.connect(autocommit=True, **parameters)  # type: ignore[arg-type]
            finally:
                process.send_signal(2)  # SIGINT: fast shutdown
                try:
                    process.wait(120)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _limits(data_dir: Path, programs: Path) -> dict[str, str]:
    """Return the limits that recovery needs, from the control file; none where pg_controldata is not installed."""
    with contextlib.suppress(FileNotFoundError):
        said = subprocess.run(
            [programs / "pg_controldata", data_dir],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
        values = dict(line.split(":", 1) for line in said.stdout.splitlines() if ":" in line)
        return {name: values[key].strip() for key, name in _LIMITS.items() if key in values}
    return {}


def _wait(process: subprocess.Popen[bytes], log: Path, parameters: Mapping[str, str]) -> None:
    """Wait until recovery is over, for as long as the server works on it."""
    info = make_conninfo("", **parameters).encode()
    deadline = time.monotonic() + _START_WITHIN.total_seconds()
    while process.poll() is None and time.monotonic() < deadline:
        if psycopg.pq.PGconn.ping(info) == psycopg.pq.Ping.OK:
            return
        time.sleep(0.1)
    lines = log.read_text(errors="replace").splitlines()[-15:]
    raise FreezeError("PostgreSQL does not start on the copy. Its log ends with:\n" + "\n".join(lines))


def _still_read_only(conn: Control, names: tuple[str, ...]) -> Iterator[str]:
    """Yield the databases in which a new session cannot write after the thaw."""
    for name in names:
        parameters = {**conn.info.get_parameters(), "dbname": name}
        try:
            with psycopg.connect(autocommit=True, **parameters) as session:  # type: ignore[arg-type]
                row = session.execute("SHOW transaction_read_only").fetchone()
                if row is None or row[0] != "off":
                    yield f"{name!r} was read-only before the freeze, and is so again"
        except psycopg.OperationalError as error:
            yield f"{name!r} cannot be entered after the thaw: {error}"


def _amcheck(conn: Control, programs: Path, names: tuple[str, ...]) -> tuple[str, list[str]]:
    """Run pg_amcheck on the frozen databases; return what was done, and what it complained of."""
    if not names:
        return "not run: there was no freeze whose databases to check", []
    program = programs / "pg_amcheck"
    if not program.exists():
        return "not run: pg_amcheck is not installed beside postgres", []
    row = conn.execute("SELECT true FROM pg_available_extensions WHERE name = 'amcheck'").fetchone()
    if row is None:
        return "not run: the extension amcheck is not installed on this machine", []
    info = conn.info
    broken: list[str] = []
    for name in names:
        said = subprocess.run(
            [
                program,
                "--install-missing",
                "--heapallindexed",
                "-h",
                info.host,
                "-p",
                str(info.port),
                "-U",
                info.user,
                name,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if said.returncode:
            broken.append(f"pg_amcheck of {name!r}: {' '.join((said.stdout + said.stderr).split())[:2000]}")
    return f"run on {len(names)} database(s)", broken
