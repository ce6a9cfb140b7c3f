"""A PgBouncer in front of a server, gone with the process that started it."""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psycopg

from devtools.binaries import BinariesMissing, server_account
from devtools.pgserver import Server, ServerFailed, free_port, password

START_WITHIN: Final = 20.0
# Reads its standard input to the end, which comes when its parent is gone, however it went. There is nothing to save,
# and the gentler signals mean other things to other versions.
WATCHER: Final = '"$@" & cat >/dev/null; kill -KILL $!; wait'


def program() -> str:
    """Return the path of ``pgbouncer``.

    :raises BinariesMissing: saying how to get it.
    """
    # Debian has it in a directory that is on root's PATH only.
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise BinariesMissing("PgBouncer is not installed; run: apt-get install pgbouncer")
    return found


def missing() -> str | None:
    """Return what this machine lacks to run it, or None."""
    try:
        program()
    except BinariesMissing as error:
        return str(error)
    return None


class PgBouncer:
    """PgBouncer on a port of 127.0.0.1, from ``with`` to its end.

    :param server: the server behind it.
    :param users: who may connect, with :func:`~devtools.pgserver.password`; the first may also use its admin console.
    :param pool_mode: ``session`` or ``transaction``.
    :param pool_size: how many server sessions each user may have in each database.
    """

    def __init__(
        self, server: Server, users: Sequence[str], *, pool_mode: str = "session", pool_size: int = 100
    ) -> None:
        self._program = program()
        self._server = server
        self._admin = users[0]
        self.port = free_port()
        self._log = server.directory / f"pgbouncer-{self.port}.log"
        known = self._file("users", "".join(f'"{user}" "{password(user)}"\n' for user in users))
        settings: dict[str, str | int] = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": str(known),
            "admin_users": self._admin,
            "pool_mode": pool_mode,
            "default_pool_size": pool_size,
            "max_client_conn": 700,
            "log_connections": 0,
            "log_disconnections": 0,
        }
        self._settings = self._file(
            "ini",
            f"[databases]\n* = host=127.0.0.1 port={server.port}\n[pgbouncer]\n"
            + "".join(f"{name} = {value}\n" for name, value in settings.items()),
        )
        self._process: subprocess.Popen[bytes] | None = None

    def _file(self, kind: str, content: str) -> Path:
        path = self._server.directory / f"pgbouncer-{self.port}.{kind}"
        path.touch(0o600)
        path.write_text(content)
        account = server_account()
        if account is not None:
            os.chown(path, account.pw_uid, account.pw_gid)
        return path

    def __enter__(self) -> Self:
        account = server_account()
        who: dict[str, Any] = (
            {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        )
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", WATCHER, "sh", self._program, str(self._settings)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
                **who,
            )
        deadline = time.monotonic() + START_WITHIN
        while not self._answers():
            if time.monotonic() > deadline:
                self._end()
                raise ServerFailed(f"PgBouncer did not start\n{self._log.read_text(errors='replace')}")
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            self.console().close()
        except psycopg.OperationalError:
            return False
        return True

    def dsn(self, dbname: str, user: str) -> str:
        """Return a connection string through it."""
        return self._server.dsn(dbname, user, port=self.port)

    def console(self) -> psycopg.Connection[Any]:
        """Return a connection to its admin console, for PAUSE and RESUME."""
        return psycopg.connect(self.dsn("pgbouncer", self._admin), autocommit=True)
