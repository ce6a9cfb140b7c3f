"""A copy without Airflow and without a freeze, and PostgreSQL started on any copy."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg

from demo.application import DATABASE
from demo.check import Compared, compare
from devtools.binaries import client, server_account
from devtools.environment import without
from devtools.pgserver import Server, password

REPLICATION: Final = "copier"
# What dags/local_snapshot.py does between pause and resume.
CLUSTER: Final = 'mkdir -p "$TARGET" && pg_basebackup --checkpoint=fast --pgdata "$TARGET/cluster"'
FILES: Final = 'mkdir -p "$TARGET" && cp -a --reflink=auto "$FILES" "$TARGET/files"'


def copy_without_freeze(server: Server, files: Path, target: Path, meanwhile: Callable[[], None]) -> None:
    """Copy cluster and files while the application writes: the DAG's two commands, both at once."""
    ours = without("PG")
    environment = {
        **ours,
        "PATH": f"{client('pg_basebackup', 18).parent}:{os.environ['PATH']}",
        "PGHOST": "127.0.0.1",
        "PGPORT": str(server.port),
        "PGUSER": REPLICATION,
        "PGPASSWORD": password(REPLICATION),
        "FILES": str(files),
        "TARGET": str(target),
    }
    cluster = subprocess.Popen(["bash", "-c", CLUSTER], env=environment, stdin=subprocess.DEVNULL)
    # Without a freeze files vanish under cp, which says so and copies the others.
    cp = subprocess.Popen(["bash", "-c", FILES], env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while cluster.poll() is None or cp.poll() is None:
            meanwhile()
    finally:
        for command in (cluster, cp):
            if command.poll() is None:
                command.kill()
            command.wait()
    if cluster.returncode:
        raise RuntimeError("pg_basebackup failed")


@contextmanager
def started(target: Path) -> Iterator[Server]:
    """Start PostgreSQL on the copied cluster."""
    cluster = target / "cluster"
    account = server_account()
    if account is not None:
        for path in (cluster, *cluster.rglob("*")):
            shutil.chown(path, account.pw_uid, account.pw_gid)
    with Server(18, data=cluster) as server:
        yield server


def compared(server: Server, target: Path) -> Compared:
    """Compare the rows in the started copy with the copied files."""
    with server.control(DATABASE) as conn:
        return compare(conn, target / "files")


def writable(server: Server) -> bool:
    """Whether the application could write."""
    try:
        with psycopg.connect(server.dsn(DATABASE, "app")) as conn:
            conn.execute("INSERT INTO documents (name, size, sha256) VALUES ('probe', 0, '')")
            conn.rollback()
    except psycopg.errors.ReadOnlySqlTransaction:
        return False
    return True
