"""A PostgreSQL server of one's own: started in a second, and gone with the process that started it."""

import atexit
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, LiteralString, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from devtools.binaries import BinariesMissing, binaries, client, exclusive, server_account, shared_directory, temp_root

__all__ = ["BinariesMissing", "Server", "ServerFailed", "binaries", "client", "password"]

SUPERUSER: Final = "postgres"
SETTINGS: Final[Mapping[str, str | int | bool]] = {
    "max_connections": 250,
    "max_prepared_transactions": 20,
    "wal_level": "logical",
    "shared_buffers": "128MB",
    "fsync": False,
    "jit": False,
    "timezone": "UTC",
    "log_timezone": "UTC",
    "lc_messages": "C",
    "log_line_prefix": "%m [%p] %q%u@%d/%a ",
}
# The superuser comes in through the socket; everybody else has a password, as in production.
HBA: Final = (
    f"local all {SUPERUSER} trust",
    "local all,replication all scram-sha-256",
    "host all,replication all 127.0.0.1/32 scram-sha-256",
)
STOP_SIGNALS: Final = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
# Reads its standard input to the end, which comes when its parent is gone, however it went.
WATCHER: Final = """
cat >/dev/null
pid=$(head -n 1 "$1/postmaster.pid" 2>/dev/null)
if [ -n "$pid" ] && [ "$(readlink "/proc/$pid/cwd")" = "$1" ]; then
    kill -QUIT "$pid"
    for _ in 1 2 3 4 5 6 7 8 9 10; do [ -d "/proc/$pid" ] || break; sleep 0.5; done
fi
rm -rf "$2"
"""


class ServerFailed(Exception):
    """A server did not start or stop; the message ends with its log."""


def password(user: str) -> str:
    """Return the password that :meth:`Server.create_role` gives to *user*; it needs quoting wherever passwords do."""
    return f"{user}'s \\ pässword"


class Server:
    """One PostgreSQL server on 127.0.0.1 and on a socket in a short temporary directory.

    :param version: major version, 14 to 18.
    :param settings: on top of ``SETTINGS``; a value is text, a number or a bool.
    :param hba: lines for pg_hba.conf that come before ``HBA``.
    :param data: where the cluster is, or shall be: on a volume under test, or a copy of another server's cluster, which
        keeps its own settings. Left in place by :meth:`destroy`. By default in the temporary directory.
    """

    def __init__(
        self,
        version: int = 18,
        settings: Mapping[str, str | int | bool] | None = None,
        hba: Sequence[str] = (),
        data: Path | None = None,
    ) -> None:
        self.version = version
        self.programs = binaries(version)
        self.directory = Path(tempfile.mkdtemp(prefix="pgf-", dir=temp_root()))
        self.directory.chmod(0o711)
        self.socket_dir = self.directory / "s"
        self.log = self.directory / "log"
        self.data = (data or self.directory / "data").resolve()
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.socket_dir.mkdir()
        _give_away(self.socket_dir)
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", WATCHER, "sh", str(self.data), str(self.directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
        )
        atexit.register(self.destroy)
        if not (self.data / "PG_VERSION").exists():
            # Each of 4,096 rounds costs a client and a server as much as the rest of a connection.
            quick = {"scram_iterations": 1} if version >= 16 else {}
            self._create_cluster({**SETTINGS, **quick, **(settings or {})}, hba)

    def _create_cluster(self, settings: Mapping[str, str | int | bool], hba: Sequence[str]) -> None:
        subprocess.run(["cp", "-a", "--reflink=auto", str(_template(self.version)), str(self.data)], check=True)
        with (self.data / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{name} = {_quoted(value)}\n" for name, value in settings.items())
        (self.data / "pg_hba.conf").write_text("".join(f"{line}\n" for line in (*hba, *HBA)))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        if self._process is None:
            raise ServerFailed(f"the server on port {self.port} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the postmaster lives."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout: float = 60) -> None:
        """Start, and return once the server accepts connections."""
        if self.running:
            return
        # A copied cluster comes with the process id of the server that it was copied from, which may well be alive.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        options = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": str(self.socket_dir)}
        command = [str(self.programs / "postgres"), "-D", str(self.data)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *(word for name, value in options.items() for word in ("-c", f"{name}={value}"))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.data,
                **_as_server(),
            )
        deadline = time.monotonic() + timeout
        while not self._accepts_connections():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerFailed(f"PostgreSQL {self.version} did not start\n{self.tail()}")
            time.sleep(0.02)

    def _accepts_connections(self) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        # Line 8 is the state that pg_ctl waits for.
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast", timeout: float = 60) -> None:
        """Stop as ``pg_ctl stop`` would; ``immediate`` leaves a cluster that must recover."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(STOP_SIGNALS[mode])
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ServerFailed(f"PostgreSQL {self.version} did not stop within {timeout} s\n{self.tail()}") from None
        self._process = None

    def restart(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop and start, on the same port."""
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """End the postmaster with SIGKILL, and return when its children are gone: it can be started again."""
        if self._process is None:
            return
        children = _children(self.pid)
        self._process.kill()
        self._process.wait()
        self._process = None
        # Children notice within moments; the rest would keep the shared memory, and with it the next start, from us.
        deadline = time.monotonic() + 5
        while (left := [pid for pid in children if _runs_in(pid, self.data)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in left:
            os.kill(pid, signal.SIGKILL)

    def destroy(self) -> None:
        """Stop for good, and remove what is in the temporary directory."""
        atexit.unregister(self.destroy)
        if self._watcher.poll() is not None:
            return
        if self.running:
            self.stop("immediate")
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        self._watcher.wait()

    def tail(self, lines: int = 30) -> str:
        """Return the end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def dsn(self, dbname: str = "postgres", user: str = SUPERUSER, **extra: str | int) -> str:
        """Return a connection string: by the socket for the superuser, by TCP and with a password for everybody else.

        :param extra: libpq options that add to it or replace a part of it.
        """
        if user == SUPERUSER:
            where = {"host": str(self.socket_dir)}
        else:
            where = {"host": "127.0.0.1", "password": password(user)}
        options = {"connect_timeout": "10", **where, "dbname": dbname, "user": user, "port": self.port, **extra}
        return make_conninfo(**{name: str(value) for name, value in options.items()})

    def control(self, dbname: str = "postgres") -> psycopg.Connection[Any]:
        """Return a new autocommit connection of the superuser."""
        return psycopg.connect(self.dsn(dbname, application_name="control"), autocommit=True)

    def connect_factory(
        self, user: str = "freezer", dbname: str = "postgres", **extra: str | int
    ) -> Callable[[], psycopg.Connection[Any]]:
        """Return what the core takes for ``connect``: each call opens an autocommit connection of *user*."""
        dsn = self.dsn(dbname, user, **extra)
        return lambda: psycopg.connect(dsn, autocommit=True)

    def execute(self, query: LiteralString | sql.Composed, dbname: str = "postgres") -> list[Any]:
        """Run one statement as the superuser and return its rows, if it has any."""
        with self.control(dbname) as conn:
            done = conn.execute(query)
            return done.fetchall() if done.description else []

    def create_role(self, name: str, attributes: LiteralString = "LOGIN") -> None:
        """Create role *name* with :func:`password`."""
        statement = sql.SQL("CREATE ROLE {} PASSWORD {} " + attributes)
        self.execute(statement.format(sql.Identifier(name), sql.Literal(password(name))))

    def create_database(self, name: str, owner: str = SUPERUSER) -> None:
        """Create database *name*."""
        # As before 15: by the files, without a word in the WAL, in half the time.
        how: LiteralString = " STRATEGY file_copy" if self.version >= 15 else ""
        statement = sql.SQL("CREATE DATABASE {} OWNER {}" + how)
        self.execute(statement.format(sql.Identifier(name), sql.Identifier(owner)))

    def drop_database(self, name: str) -> None:
        """Drop database *name* with everything that holds on to it: sessions, prepared transactions, slots."""
        quoted = sql.Identifier(name)
        with self.control() as conn:
            conn.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(quoted))
            conn.execute(sql.SQL("ALTER DATABASE {} RESET ALL").format(quoted))
            prepared = conn.execute("SELECT gid FROM pg_prepared_xacts WHERE database = %s", [name]).fetchall()
            if prepared:
                with self.control(name) as inside:
                    for (gid,) in prepared:
                        inside.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
            conn.execute(
                "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots"
                " WHERE database = %s AND active_pid IS NOT NULL",
                [name],
            )
            conn.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", [name]
            )
            conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(quoted))

    @contextmanager
    def database(self, name: str, owner: str = SUPERUSER) -> Iterator[str]:
        """Have database *name* for a while."""
        self.create_database(name, owner)
        try:
            yield name
        finally:
            self.drop_database(name)


def _template(version: int) -> Path:
    """Return an initialised cluster to copy; initdb takes longer than everything else together."""
    programs = binaries(version)
    build = subprocess.run([programs / "postgres", "--version"], check=True, capture_output=True, text=True, timeout=30)
    template = shared_directory() / f"cluster-{build.stdout.split()[2]}-small-wal"
    with exclusive(template):
        if not template.exists():
            unfinished = template.with_name(template.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(mode=0o700)
            _give_away(unfinished)
            command = [str(programs / "initdb"), "--no-sync", "--pgdata", str(unfinished), "--username", SUPERUSER]
            done = subprocess.run(
                [*command, "--auth", "trust", "--encoding", "UTF8", "--no-locale", "--wal-segsize", "1"],
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
                cwd="/",
                **_as_server(),
            )
            if done.returncode:
                raise ServerFailed(f"initdb of PostgreSQL {version} failed\n{done.stdout}{done.stderr}")
            unfinished.rename(template)
    return template


def _as_server() -> dict[str, Any]:
    """Return the arguments that make a subprocess a server's: its account, and an environment without PG* variables."""
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"}
    account = server_account()
    if account is None:
        return {"env": environment}
    return {"env": environment, "user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _give_away(path: Path) -> None:
    account = server_account()
    if account is not None:
        os.chown(path, account.pw_uid, account.pw_gid)


def _quoted(value: str | int | bool) -> str:
    text = ("on" if value else "off") if isinstance(value, bool) else str(value)
    return "'" + text.replace("'", "''") + "'"


def free_port() -> int:
    """Return a port on 127.0.0.1 that nobody uses."""
    # Below the range from which the kernel takes ports for clients: one of those cannot come in between.
    while True:
        port = random.randint(15000, 32000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _children(pid: int) -> list[int]:
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid:
            children.append(int(status.parent.name))
    return children


def _runs_in(pid: int, directory: Path) -> bool:
    try:
        return Path(f"/proc/{pid}/cwd").readlink() == directory
    except (FileNotFoundError, ProcessLookupError):
        return False
