"""The one door into a database that others own: shut where entering would run their code, and every wait bounded."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, Self

import psycopg

from pg_freeze import trust
from pg_freeze.control import STATEMENT_TIMEOUT, ConnectTo, Control, open_control
from pg_freeze.errors import FreezeError, translated
from pg_freeze.names import visible

# Nobody can write while we look around.
_WAIT: Final = "1s"


def enter(
    outside: Control,
    connect_to: ConnectTo,
    name: str,
    application_name: str = "pg-freeze",
    *,
    lock_timeout: str = "10s",
    statement_timeout: str = STATEMENT_TIMEOUT,
) -> Control:
    """Return a session in the database *name*, which the caller closes.

    :param outside: a control connection to another database of the server, made with the same options.
    :param connect_to: returns a new connection to the named database.
    :param lock_timeout: how long a statement may wait for a lock, as PostgreSQL writes it.
    :param statement_timeout: how long a statement may take, likewise.
    :raises FreezeRefused: if a login trigger would run with our rights.
    :raises psycopg.Error: if the server does not let us in.
    """
    trust.check_login(outside, name)
    return open_control(
        lambda: connect_to(name), application_name, lock_timeout=lock_timeout, statement_timeout=statement_timeout
    )


@contextmanager
def entered(outside: Control, connect_to: ConnectTo, name: str, doing: str, **how: Any) -> Iterator[Control]:
    """:func:`enter` for a ``with`` block.

    :param doing: what is being done, for the message of an error.
    :raises FreezeError: whatever goes wrong.
    """
    with translated(doing):
        inside = enter(outside, connect_to, name, **how)
        try:
            yield inside
        finally:
            inside.close()


class Entrances:
    """Sessions in databases that are frozen, to look around there, kept from the first look to the last.

    To connect takes longer than to look. So where nobody is ended for having connected before the freeze, the sessions
    are opened before it.
    """

    def __init__(self, outside: Control, connect_to: ConnectTo | None, names: Sequence[str]) -> None:
        """Open nothing yet.

        :param outside: a control connection.
        :param connect_to: returns a new connection to the named database; None: there is no way into it.
        """
        self.names = tuple(names)
        self._outside = outside
        self._connect_to = connect_to
        self._sessions: dict[str, Control] = {}
        self._abandoned: list[Control] = []
        #: Whoever uses the sessions beside us.
        self.busy: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the sessions."""
        self.close()

    def open(self) -> None:
        """Connect to what lets us in. What does not says why when it is looked at."""
        for name in self.names:
            with suppress(psycopg.Error, FreezeError):
                self.session(name)

    def session(self, name: str) -> Control:
        """Return the session in a database. Somebody may have ended one that was idle: then it is a new one.

        :raises FreezeError: if there is no way in.
        :raises psycopg.Error: if the server does not let us in.
        """
        there = self._sessions.get(name)
        if there is not None and not there.closed:
            with suppress(psycopg.OperationalError):
                there.execute("")
        if there is None or there.closed:
            if self._connect_to is None:
                raise FreezeError("no way into it was given")
            there = enter(self._outside, self._connect_to, name, "pg-freeze look", lock_timeout=_WAIT)
            self._sessions[name] = there
        return there

    def beside(self) -> Control:
        """Return a session that sees the databases from outside, for the same thread as the others.

        Without a way in, that is the control connection.

        :raises FreezeError: if there is no way in.
        :raises psycopg.Error: if the server does not let us in.
        """
        return self._outside if self._connect_to is None else self.session(self._outside.info.dbname)

    def abandon(self) -> None:
        """Cancel what the sessions are doing for another thread, and use new ones from now on."""
        for session in self._sessions.values():
            with suppress(psycopg.Error):
                session.cancel_safe(timeout=1)
        self._abandoned += self._sessions.values()
        self._sessions.clear()

    def close(self) -> None:
        """End the sessions, and what another thread does in them."""
        if self.busy is not None and self.busy.is_alive():
            self.abandon()
            self.busy.join(2)
        for session in (*self._sessions.values(), *self._abandoned):
            session.close()
        self._sessions.clear()
        self._abandoned.clear()


def in_a_line(error: Exception) -> str:
    """Return the last line of an error, which says what the server said."""
    return visible((str(error).strip().splitlines() or [type(error).__name__])[-1].strip())
