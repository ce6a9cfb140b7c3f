"""What of a copy is taken away while a server runs on it, and brought back afterwards.

A server reads these whatever its command line says: the settings of ALTER SYSTEM, the signal files, the lock file of
the server that was copied, and links. Where they are kept, ``.verify-copy`` in the data directory, also tells a later
run what one that was killed has left behind. A copy may bring such a directory along, and it may lie: so nothing that
it says leads out of the directories of the copy, and only files of a user id that nobody has are given back.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypedDict

from pg_freeze.copies.running import LOCK_FILE
from pg_freeze.copies.tree import ASIDE, Tree, give, resolved, unused_range
from pg_freeze.errors import FreezeError, FreezeRefused

#: Read by every server from its data directory.
READ_BY_EVERY_SERVER: Final = ("postgresql.auto.conf", "standby.signal", "recovery.signal", "recovery.conf")
# Written at each start, with the words of its command line, which `pg_ctl restart` would take up.
_WORDS: Final = "postmaster.opts"
_STATE: Final = "state.json"
_LONGEST: Final = 2**20
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class _State(TypedDict):
    """What was done to a copy: whom it belongs to, to whom its files were lent, and what was moved, by its number."""

    owner: list[int]
    lent_to: int | None
    moved: list[str]


@contextmanager
def alone(data: Path, others: Sequence[Path]) -> Iterator[None]:
    """Be the only one that verifies this copy, and bring back what an earlier one, that was killed, left aside.

    :param others: the other directories of the copy, for tablespaces and the WAL.
    :raises FreezeRefused: if another one is at work, or the directory cannot be read.
    """
    try:
        descriptor = os.open(data, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise FreezeRefused(f"{data} cannot be read: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FreezeRefused(f"another verify-copy is at work on {data}") from error
        _bring_back_left(data, descriptor, [data, *(resolved(one) for one in others)])
        yield
    finally:
        os.close(descriptor)


@contextmanager
def set_aside(tree: Tree, uid: int | None) -> Iterator[list[str]]:
    """Take away what a server of the copy is not to read, have its links lead to what was mapped, and undo that.

    :param uid: whom the copy is to belong to meanwhile; None: to whom it does.
    :returns: what was set aside that tells something about the copy.
    """
    owner = tree.data.stat()
    all_names = (*READ_BY_EVERY_SERVER, LOCK_FILE, _WORDS)
    names = [name for name in all_names if os.path.lexists(tree.data / name)]
    moved = [*names, *tree.needless, *(one.link for one in tree.mapped)]
    data = os.open(tree.data, _DIRECTORY)
    try:
        os.mkdir(ASIDE, 0o700, dir_fd=data)
        aside = os.open(ASIDE, _DIRECTORY, dir_fd=data)
        state: _State = {"owner": [owner.st_uid, owner.st_gid], "lent_to": uid, "moved": moved}
        _write_state(aside, state)
        try:
            for number, name in enumerate(moved):
                with _parent(data, name) as (parent, last):
                    os.rename(last, str(number), src_dir_fd=parent, dst_dir_fd=aside)
            for one in tree.mapped:
                with _parent(data, one.link) as (parent, last):
                    os.symlink(one.directory, last, dir_fd=parent)
            if uid is not None:
                give(tree.roots, owner.st_uid, uid, uid)
            yield names
            # A server has run on it, and was stopped: the lock file of the one that was copied is of no use any more.
            if LOCK_FILE in moved:
                os.unlink(str(moved.index(LOCK_FILE)), dir_fd=aside)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(_WORDS, dir_fd=data)
            _bring_back(data, aside, state, tree.roots)
            os.close(aside)
    finally:
        os.close(data)


def _bring_back_left(data: Path, descriptor: int, roots: Sequence[Path]) -> None:
    """Undo what a run that was killed has left."""
    try:
        aside = os.open(ASIDE, _DIRECTORY, dir_fd=descriptor)
    except FileNotFoundError:
        return
    except OSError as error:
        raise FreezeRefused(f"{data / ASIDE} is not ours: {error.strerror}. Remove it") from error
    try:
        status = os.fstat(aside)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise FreezeRefused(f"{data / ASIDE} was not made by this user: remove it, or be who made it")
        state: _State | None = None
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            with open(os.open(_STATE, flags, dir_fd=aside), encoding="utf-8") as file:
                state = _read(json.loads(file.read(_LONGEST)))
        except (OSError, ValueError, RecursionError):
            pass
        if state is None:
            if not set(os.listdir(aside)) <= {_STATE}:
                raise FreezeRefused(
                    f"{data / ASIDE} is not as verify-copy leaves it: look at what is in it, and remove it"
                )
            state = {"owner": [status.st_uid, status.st_gid], "lent_to": None, "moved": []}
        _bring_back(descriptor, aside, state, roots)
    finally:
        os.close(aside)


def _read(said: Any) -> _State | None:
    """Return what a state says; None for one that we would not have written."""
    if not isinstance(said, dict):
        return None
    owner, lent_to, moved = said.get("owner"), said.get("lent_to"), said.get("moved")
    if not (isinstance(owner, list) and len(owner) == 2 and all(_is_id(one) for one in owner)):
        return None
    if not (lent_to is None or (_is_id(lent_to) and _is_nobodys(lent_to))):
        return None
    if not (isinstance(moved, list) and all(isinstance(name, str) and _inside(name) for name in moved)):
        return None
    return {"owner": owner, "lent_to": lent_to, "moved": moved}


def _is_id(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**31


def _is_nobodys(uid: int) -> bool:
    low, high = unused_range()
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return uid > 1000 and low <= uid <= high
    return False


def _inside(name: str) -> bool:
    """Whether we would move what has this name: at the top of the directory, or a tablespace's link."""
    place, slash, last = name.rpartition("/")
    return last not in ("", ".", "..", ASIDE) and "\0" not in last and place == ("pg_tblspc" if slash else "")


def _bring_back(data: int, aside: int, state: _State, roots: Sequence[Path]) -> None:
    failed: list[str] = []
    if state["lent_to"] is not None:
        give(roots, state["lent_to"], *state["owner"])
    for number, name in enumerate(state["moved"]):
        try:
            os.stat(str(number), dir_fd=aside, follow_symlinks=False)
        except FileNotFoundError:
            continue  # it had not been taken away yet, or is of no use any more
        try:
            with _parent(data, name) as (parent, last):
                os.rename(str(number), last, src_dir_fd=aside, dst_dir_fd=parent)
        except OSError as error:
            failed.append(f"{name} ({error.strerror})")
    if failed:
        raise FreezeError(f"could not be put back from {ASIDE} into the copy: {', '.join(failed)}")
    with suppress(FileNotFoundError):
        os.unlink(_STATE, dir_fd=aside)
    os.rmdir(ASIDE, dir_fd=data)


def _write_state(aside: int, state: _State) -> None:
    descriptor = os.open(_STATE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=aside)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _parent(data: int, name: str) -> Iterator[tuple[int, str]]:
    """Yield a descriptor of the directory that holds *name*, and the last part of the name. No link is followed."""
    place, _, last = name.rpartition("/")
    if not place:
        yield data, last
        return
    parent = os.open(place, _DIRECTORY, dir_fd=data)
    try:
        yield parent, last
    finally:
        os.close(parent)
