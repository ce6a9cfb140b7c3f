"""The errors of a freeze.

::

    FreezeError                  something failed; the database is as it was
    ├── FreezeRefused            nothing was changed, and a retry would not help (rights, version, held by another)
    │   └── InvalidRequest       the request itself makes no sense (no database, a negative time)
    ├── DrainTimeout             sessions did not go in time; the freeze was undone
    ├── LeaseLost                the freeze is no longer ours: resumed, expired, or taken over by a newer attempt
    │   └── Overtaken            that happened before this attempt had begun
    ├── ServerLost               the server cannot be reached, or went away midway
    └── ThawFailed               the database is STILL FROZEN, until its lease ends

Each message says what failed, the value seen, and the next thing to do. PostgreSQL's errors are told apart by SQLSTATE,
never by their text, which depends on the server's language.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg

from pg_freeze.names import visible

if TYPE_CHECKING:
    from pg_freeze.model import Backend, Finding


class FreezeError(Exception):
    """A freeze, or a part of it, failed; whatever had been changed was undone.

    Its text is one line in which nothing acts: others choose the names in it, and it goes to logs and terminals.
    """

    def __str__(self) -> str:
        """Return the message."""
        return visible(super().__str__())


class FreezeRefused(FreezeError):
    """Nothing was changed, and trying again will not help before somebody changes something.

    :param findings: what preflight found, where that is the reason.
    """

    def __init__(self, message: str, findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(message)
        self.findings = findings


class InvalidRequest(FreezeRefused, ValueError):
    """The request makes no sense in itself: no database, an empty name, a zero or negative time."""


class DrainTimeout(FreezeError):
    """Sessions that may still write did not go within the drain timeout; the freeze was undone.

    :param backends: the sessions that were left.
    """

    def __init__(self, message: str, backends: tuple[Backend, ...] = ()) -> None:
        super().__init__(message)
        self.backends = backends


class LeaseLost(FreezeError):
    """The freeze is gone or belongs to a newer attempt: resumed by somebody, or its lease ended."""


class Overtaken(LeaseLost):
    """The freeze that was to be adopted was thawed, or this attempt resumed, at the moment it was about to begin."""


class ServerLost(FreezeError):
    """The server cannot be reached, takes no connection now, or went away midway."""


class ThawFailed(FreezeError):
    """The database is still frozen. The dead-man switch thaws it when the lease ends; people may want it sooner."""


# https://www.postgresql.org/docs/current/errcodes-appendix.html
_LOST_CLASSES = ("08",)
_LOST_STATES = ("57P01", "57P02", "57P03", "57P05", "25P03", "25P04")
TICKET_VOID, HELD, NO_DEAD_MAN, NO_SUCH_DATABASE = "PF001", "PF002", "PF003", "PF004"
NOT_ALL_THAWED, THAWED, LOCKS_LOST, NOT_REVOCABLE = "PF005", "PF006", "PF007", "PF008"


def is_server_lost(error: BaseException) -> bool:
    """Whether the connection is gone, rather than one statement refused."""
    if isinstance(error, ServerLost):
        return True
    if not isinstance(error, psycopg.Error):
        return False
    state = error.sqlstate
    if state is None:
        return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
    return state[:2] in _LOST_CLASSES or state in _LOST_STATES


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise psycopg's errors as ours, saying what was being done.

    :raises ServerLost: for a lost connection.
    :raises FreezeRefused: for a missing right (SQLSTATE 42501) or a wrong password (class 28).
    :raises FreezeError: for any other error of the server.
    """
    try:
        yield
    except psycopg.Error as error:
        raise translate(error, doing) from error


def translate(error: psycopg.Error, doing: str) -> FreezeError:
    """Return our error for one of psycopg's."""
    said = " ".join(str(error).split()) or type(error).__name__
    if error.sqlstate == "42501":
        return FreezeRefused(f"{doing}: {said}. Run `pg-freeze preflight` to see every right that is missing.")
    if (error.sqlstate or "")[:2] == "28":
        return FreezeRefused(f"{doing}: the server refused: {said}. Check the user, the password and pg_hba.conf.")
    if error.sqlstate == "3D000":
        return FreezeRefused(
            f"{doing}: the server refused: {said}. psql -l lists the databases: name one that is there"
        )
    if is_server_lost(error):
        return ServerLost(f"{doing}: no connection to the server: {said}")
    state = f" (SQLSTATE {error.sqlstate})" if error.sqlstate else ""
    return FreezeError(f"{doing}: {said}{state}")
