"""Run one program on a copy so that nothing it does reaches anything but the copy.

A script of its own, started with one argument, a :class:`Plan` as JSON. It imports nothing of this package: it must run
with any working directory, and leave nothing of ours in the process that becomes the program.

What the program gets: a user id that nobody else has, no groups, no capabilities and no way to get any
(``no_new_privs``), no network, no processes, no shared memory and no keys of others, and a root directory with the
system's libraries, PostgreSQL's programs (all of that read-only) and the copy. It dies with whoever started it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any, Final, TypedDict

# <linux/sched.h>: mount, cgroup, uts, ipc, pid and net namespaces.
_UNSHARED: Final = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
# <sys/mount.h>
_READ_ONLY, _NO_SUID, _NO_DEV, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH: Final = 2
# <sys/prctl.h>
_SET_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES = 1, 38
# keyctl(2) has no function in libc: the number of the call, by machine.
_KEYCTL: Final = {"x86_64": 250, "aarch64": 219}
_JOIN_SESSION_KEYRING: Final = 1
SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache")
# <linux/sockios.h>, <linux/if.h>
_SET_INTERFACE_FLAGS, _UP = 0x8914, 0x1
_DEVICES: Final = ("null", "zero", "random", "urandom")
#: The exit code if the isolation cannot be had; nothing of the copy was run then.
CANNOT_ISOLATE: Final = 113

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Plan(TypedDict):
    """What to run and how. Paths are absolute, without symbolic links, and the same inside as outside."""

    argv: list[str]
    cwd: str
    environment: dict[str, str]
    isolated: bool
    parent: int
    uid: int | None
    gid: int | None
    root: str
    read_only: list[str]
    writable: list[str]


def main() -> None:
    """Become the program, or the process that waits for it."""
    plan: Plan = json.loads(sys.argv[1])
    _die_with_parent()
    if os.getppid() != plan["parent"]:
        os._exit(1)
    if not plan["isolated"]:
        _become(plan)
    try:
        _libc_call("unshare", _UNSHARED)
        _build_root(plan)
    except OSError as error:
        sys.stderr.write(f"{error.strerror or error}\n")
        os._exit(CANNOT_ISOLATE)
    alive, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(held)
        _become(plan, alive)
    os.close(alive)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, lambda one, _: os.kill(child, one))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _become(plan: Plan, alive: int | None = None) -> None:
    """Give up all rights, and run the program. It never returns."""
    try:
        number = _KEYCTL.get(os.uname().machine)
        if number is not None:
            _libc.syscall(number, _JOIN_SESSION_KEYRING, None)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if plan["uid"] is not None and plan["gid"] is not None:
            os.setgroups([])
            os.setresgid(plan["gid"], plan["gid"], plan["gid"])
            os.setresuid(plan["uid"], plan["uid"], plan["uid"])
        _libc_call("prctl", _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        # Changing the user id takes it away. Who died before this line closed the pipe.
        _die_with_parent()
        if alive is not None and select.select([alive], [], [], 0)[0]:
            os._exit(1)
        os.umask(0o077)
        os.chdir(plan["cwd"])
        os.execve(plan["argv"][0], plan["argv"], plan["environment"])  # noqa: S606
    except OSError as error:
        sys.stderr.write(f"{plan['argv'][0]}: {error.strerror}\n")
    finally:
        os._exit(127)


def _build_root(plan: Plan) -> None:
    """Make a root directory that holds what is needed and nothing else, and move into it."""
    root = plan["root"]
    os.umask(0o022)  # whoever called us may have a stricter one; the program runs as somebody else
    _mount(None, "/", _RECURSIVE | _PRIVATE)
    _mount("tmpfs", root, _NO_SUID | _NO_DEV, "tmpfs", "mode=755,size=64m")
    os.mkdir(root + "/etc")
    for path, size in (("/tmp", "64m"), ("/dev/shm", "1g")):  # noqa: S108 - of the new root
        os.makedirs(root + path, exist_ok=True)
        _mount("tmpfs", root + path, _NO_SUID | _NO_DEV, "tmpfs", f"mode=1777,size={size}")
    for path in (*SYSTEM, *plan["read_only"]):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path):
            _bind(path, root, _READ_ONLY | _NO_SUID | _NO_DEV)
    for path in (f"/dev/{name}" for name in _DEVICES):
        _bind(path, root, _READ_ONLY | _NO_SUID)
    # Before PostgreSQL 15 statistics are sent over the loopback device, here one of its own, found by its name.
    for name, text in (("hosts", "127.0.0.1 localhost\n"), ("nsswitch.conf", "hosts: files\n")):
        with open(f"{root}/etc/{name}", "w", encoding="ascii") as file:
            file.write(text)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SET_INTERFACE_FLAGS, struct.pack("16sH22x", b"lo", _UP))
    for path in plan["writable"]:
        _bind(path, root, _NO_SUID | _NO_DEV, recursive=True)
    os.chdir(root)
    # The new root on top of the old one, which then is taken away: pivot_root(2), "pivot_root(".", ".")".
    _libc_call("pivot_root", b".", b".")
    _libc_call("umount2", b".", _DETACH)
    os.chdir("/")


def _bind(path: str, root: str, flags: int, *, recursive: bool = False) -> None:
    """Show *path* at the same place below *root*."""
    inside = root + path
    if os.path.isdir(path):
        os.makedirs(inside, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        with open(inside, "a", encoding="utf-8"):
            pass
    _mount(path, inside, _BIND | (_RECURSIVE if recursive else 0))
    # The flags of a bind mount are only taken at the second call.
    _mount(None, inside, _BIND | _REMOUNT | flags)


def _mount(source: str | None, target: str, flags: int, kind: str | None = None, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    _libc_call("mount", *texts, ctypes.c_ulong(flags), None if data is None else data.encode())


def _die_with_parent() -> None:
    _libc_call("prctl", _SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)


def _libc_call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
