"""PostgreSQL on a copy: its programs run in isolation, with settings of ours, and every connection is to that server.

Nothing of the environment counts: neither our libpq's variables nor the server's.
"""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg.conninfo import make_conninfo

from pg_freeze.control import Control
from pg_freeze.copies import jail
from pg_freeze.copies.settings import command_line, config_file, session_options
from pg_freeze.copies.tree import Tree, unused_uid
from pg_freeze.errors import FreezeError, FreezeRefused

#: Opens a connection to the named database of a copy; with ``plain`` its own settings for read-only count.
Open = Callable[..., Control]

_LOOKS_FOR_PROGRAMS: Final = (
    "/usr/lib/postgresql/{version}/bin",
    "/usr/pgsql-{version}/bin",
    "/opt/homebrew/opt/postgresql@{version}/bin",
)
_LONGEST: Final = 60  # an AF_UNIX path holds 107 bytes
_PORT: Final = 5432
_STOP_WITHIN: Final = 300
_END_WITHIN: Final = 10
_environment_lock: Final = threading.Lock()


@dataclass(frozen=True, slots=True)
class Place:
    """Where programs run on a copy, and as whom.

    :ivar uid: the user id that they get; None: that of this process.
    """

    tree: Tree
    programs: Path
    version: int
    scratch: Path
    uid: int | None
    isolated: bool


def programs_of(version: int, given: Path | None) -> Path:
    """Return where the programs of a major version are.

    :param given: where somebody says that they are.
    :raises FreezeRefused: if they are not there, or nowhere.
    """
    found = shutil.which("postgres")
    candidates = [given] if given else [Path(found).parent] if found else []
    if given is None:
        candidates += [Path(place.format(version=version)) for place in _LOOKS_FOR_PROGRAMS]
    for candidate in candidates:
        with suppress(OSError):
            said = subprocess.run([candidate / "postgres", "--version"], capture_output=True, text=True, check=False)
            if re.search(rf"\) {version}\b", said.stdout):
                return (candidate / "postgres").resolve().parent
    looked = ", ".join(map(str, candidates))
    raise FreezeRefused(f"no postgres of version {version} in {looked}: install it, or name its place with --bin-dir")


def refuse_without_rights(*, trusted: bool) -> None:
    """Refuse what could not be isolated, before anything in the copy is touched.

    :raises FreezeRefused: if this is not root, and the copy is not trusted.
    """
    if os.geteuid() != 0 and not trusted:
        raise FreezeRefused(
            "code of the copy runs when it is verified, in the expressions of its indexes above all, and only root can "
            "keep it from everything else: run this as root. If you trust whoever could write in that database with "
            "all rights of this user: --trust-copy"
        )


@contextmanager
def place(tree: Tree, programs: Path, version: int, *, trusted: bool) -> Iterator[Place]:
    """Have a place to run programs on a copy.

    :param trusted: run them without isolation, as the owner of the copy.
    :raises FreezeRefused: if the rights for the isolation are missing.
    """
    owner = tree.data.stat().st_uid
    root = os.geteuid() == 0
    if trusted and root and owner == 0:
        raise FreezeRefused(
            f"{tree.data} belongs to root, as whom PostgreSQL does not run: chown -R postgres {tree.data}"
        )
    uid = (owner if trusted else unused_uid()) if root else None
    where = Path(tempfile.gettempdir()).resolve()
    if len(os.fsencode(where)) > _LONGEST or "," in str(where):
        where = Path("/tmp")  # noqa: S108
    with tempfile.TemporaryDirectory(prefix="pgv-", dir=where) as made:
        scratch = Path(made)
        scratch.chmod(0o711)
        for name, mode in (("root", 0o700), ("conf", 0o755), ("socket", 0o700)):
            (scratch / name).mkdir(mode=mode)
            (scratch / name).chmod(mode)
        found = Place(tree, programs, version, scratch, uid, not trusted)
        if not trusted:
            _try_isolation(found)
        yield found


def run(where: Place, program: str, *arguments: str, errors: list[str] | None = None) -> Iterator[str]:
    """Run a program on the copy to its end, and yield its lines.

    :param errors: gets the lines of its errors, as soon as it has ended; without it they are yielded as well.
    """
    with tempfile.TemporaryFile() as apart:
        process = _start(where, [str(where.programs / program), *arguments], None if errors is None else apart.fileno())
        assert process.stdout is not None
        try:
            with process.stdout as lines:
                for line in lines:
                    yield line.decode(errors="replace").rstrip("\n")
            # Its isolation ends a moment after it, and reaps what is left of it.
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_WITHIN)
        finally:
            process.kill()
            process.wait()
            if errors is not None:
                apart.seek(0)
                errors += apart.read(10_000).decode(errors="replace").splitlines()


@contextmanager
def server(where: Place, user: str, *, limit: timedelta) -> Iterator[Open]:
    """Have a server run on the copy.

    :param user: a superuser of it.
    :param limit: after this time the server is ended, whatever it does.
    :returns: what opens connections to it.
    :raises FreezeError: if it does not start, with the end of its log, or is not done in time.
    """
    own = where.uid is not None
    socket = where.scratch / "socket"
    socket.chmod(0o700)
    if where.uid is not None:
        os.chown(socket, where.uid, where.uid)
    conf = where.scratch / "conf"
    files = {
        "pg_hba.conf": "local all all trust\n",
        "pg_ident.conf": "",
        "postgresql.conf": config_file(keep_wal=True),
    }
    for name, text in files.items():
        (conf / name).write_text(text)
        (conf / name).chmod(0o644)  # whatever our umask is, somebody else reads them
    controlled = dict(line.split(":", 1) for line in run(where, "pg_controldata", str(where.tree.data)) if ":" in line)
    words = command_line(where.tree.data, where.version, controlled, conf=conf, socket=socket, port=_PORT)
    process = _start(where, [str(where.programs / "postgres"), *words])
    log: collections.deque[str] = collections.deque(maxlen=200)
    reader = threading.Thread(target=_keep, args=(process, log), daemon=True)
    reader.start()
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(limit.total_seconds(), expire)
    timer.daemon = True
    timer.start()
    parameters = {
        "host": str(socket), "port": str(_PORT), "user": user, "password": "-", "sslmode": "disable",
        "gssencmode": "disable", "connect_timeout": "60", "application_name": "pg-freeze verify-copy",
        "client_encoding": "UTF8",
    }  # fmt: skip

    def connect(database: str, *, plain: bool = False) -> Control:
        options = session_options(where.version, read_only_too=not plain)
        with _clean_environment():
            return psycopg.connect(autocommit=True, **{**parameters, "dbname": database, "options": options})  # type: ignore[arg-type]

    try:
        _wait(process, socket, parameters, log, own=own)
        try:
            yield connect
        except psycopg.OperationalError as error:
            if expired.is_set():
                raise FreezeError(f"the copy could not be verified within {limit}: --within allows more") from error
            if process.poll() is not None:
                raise FreezeError(f"PostgreSQL ended on the copy. {_end_of(log)}") from error
            raise
    finally:
        timer.cancel()
        process.send_signal(signal.SIGINT)  # a fast shutdown
        try:
            process.wait(_STOP_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(10)
        if where.isolated and where.uid is not None:
            wait_until_gone(where.uid)


def let_wal_go(where: Place, conn: Control) -> None:
    """Let the server recycle WAL again, once that of the copy was read."""
    (where.scratch / "conf" / "postgresql.conf").write_text(config_file(keep_wal=False))
    conn.execute("SELECT pg_reload_conf()")


def _try_isolation(where: Place) -> None:
    said = list(run(where, "postgres", "--version"))
    if not any(f") {where.version}" in line for line in said):
        raise FreezeRefused(
            f"a program cannot be isolated here ({'; '.join(said)}): code of the copy runs when it is verified. Run "
            "this as root, with CAP_SYS_ADMIN; or if you trust the copy: --trust-copy"
        )


def _start(where: Place, argv: Sequence[str], errors: int | None = None) -> subprocess.Popen[bytes]:
    libraries = _libraries(where.programs)
    plan: jail.Plan = {
        "argv": list(argv),
        "cwd": "/",
        # A program that finds its libraries relative to itself asks /proc, which is not there.
        "environment": {"LC_ALL": "C", "TZ": "UTC", "LD_LIBRARY_PATH": ":".join(libraries)},
        "isolated": where.isolated,
        "parent": os.getpid(),
        "uid": where.uid,
        "gid": where.tree.data.stat().st_gid if where.uid is not None and not where.isolated else where.uid,
        "root": str(where.scratch / "root"),
        "read_only": [*_installation(where.programs, libraries), str(where.scratch / "conf")],
        "writable": [*map(str, where.tree.roots), str(where.scratch / "socket")],
    }
    return subprocess.Popen(
        [sys.executable, "-I", "-S", jail.__file__, json.dumps(plan)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if errors is None else errors,
        start_new_session=True,
        cwd="/",
        env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C"},
    )


def _installation(programs: Path, libraries: Sequence[str]) -> list[str]:
    """Return the directories of PostgreSQL that a program needs, but for those of the system."""
    found = {programs, *(programs.parent / name for name in ("lib", "lib64", "share"))}
    return sorted({*libraries, *(str(one) for one in found if one.is_dir() and not _of_system(one))})


def _of_system(path: Path) -> bool:
    return any(path.is_relative_to(top) for top in jail.SYSTEM)


@cache
def _libraries(programs: Path) -> tuple[str, ...]:
    """Return the directories of the libraries that PostgreSQL's programs use, but for those of the system."""
    found: set[Path] = set()
    for name in ("postgres", "pg_waldump", "pg_checksums", "pg_controldata"):
        with suppress(OSError):
            said = subprocess.run(["ldd", programs / name], capture_output=True, text=True, check=False)  # noqa: S607
            for one in re.findall(r"(?:=> |^\t)(/\S+) \(0x", said.stdout, re.MULTILINE):
                # The name that the program was linked with, and where that leads: both are looked up.
                found |= {Path(os.path.normpath(one)).parent, Path(one).resolve().parent}
    return tuple(sorted(str(one) for one in found if not _of_system(one)))


def _keep(process: subprocess.Popen[bytes], log: collections.deque[str]) -> None:
    """Keep the last lines of what a server says: it may say very much."""
    assert process.stdout is not None
    while line := process.stdout.readline(4096):
        log.append(line.decode(errors="replace").rstrip("\n"))


def _end_of(log: Sequence[str]) -> str:
    return "Its log ends with: " + " | ".join(list(log)[-15:])


def _wait(
    process: subprocess.Popen[bytes], socket: Path, parameters: dict[str, Any], log: Sequence[str], *, own: bool
) -> None:
    """Wait until recovery is over, for as long as the server works on it."""
    path = socket / f".s.PGSQL.{_PORT}"
    while process.poll() is None and not path.exists():
        time.sleep(0.02)
    if process.poll() is None and own:
        # Before any code of the copy can run: nobody but us can put another socket in this one's place from now on.
        os.chown(socket, 0, 0)
        socket.chmod(0o711)
    info = make_conninfo("", **parameters, dbname="postgres").encode()
    while process.poll() is None:
        with _clean_environment():
            if psycopg.pq.PGconn.ping(info) == psycopg.pq.Ping.OK:
                return
        time.sleep(0.05)
    time.sleep(0.1)  # for the last lines
    raise FreezeError(f"PostgreSQL does not start on the copy. {_end_of(log)}")


@contextmanager
def _clean_environment() -> Iterator[None]:
    """Hide libpq's variables for a moment: PGSERVICE, PGOPTIONS and their like would lead elsewhere."""
    with _environment_lock:
        hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PG")}
        try:
            yield
        finally:
            os.environ.update(hidden)


def wait_until_gone(uid: int, within: float = 30) -> None:
    """Wait until nothing runs with the user id of the copy: its files are given back then.

    :param within: seconds.
    :raises FreezeError: if something still does.
    """
    deadline = time.monotonic() + within
    while any(_is_of(name, uid) for name in os.listdir("/proc") if name.isdigit()):
        if time.monotonic() > deadline:
            raise FreezeError(f"a process of the copy (user id {uid}) does not end")
        time.sleep(0.05)


def _is_of(pid: str, uid: int) -> bool:
    """Whether a process of that user id still runs. A zombie does not: where we are process 1 nobody else reaps it."""
    with suppress(OSError):
        if os.stat(f"/proc/{pid}").st_uid == uid:
            return any(_runs(f"/proc/{pid}/task/{thread}") for thread in os.listdir(f"/proc/{pid}/task"))
    return False


def _runs(thread: str) -> bool:
    with suppress(OSError):
        return Path(f"{thread}/stat").read_bytes().rpartition(b") ")[2][:1] not in {b"Z", b"X"}
    return False
