"""The control connection: to the maintenance database, direct, autocommit, and never waiting for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, LiteralString, TypeAlias

import psycopg

from airflow_pg_freeze.core.errors import FreezeError, FreezeRefused, InvalidRequest, ServerLost, translate, translated

Control: TypeAlias = "psycopg.Connection[Any]"
#: Returns a new connection to the maintenance database, each time it is called.
Connect: TypeAlias = Callable[[], Control]
#: Returns a new connection to the named database.
ConnectTo: TypeAlias = Callable[[str], Control]

OLDEST_VERSION: Final = 140000
# libpq's own defaults would let a dead network hold a drain for many minutes.
CONNECTION_DEFAULTS: Final[Mapping[str, str]] = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
    "application_name": "pg-freeze",
}

# The role may have defaults of its own for any of these. Only errors are sent: the client of a dead-man switch is gone,
# and the server ends a session that cannot send a warning. Commits do not wait for synchronous standbys: with one of
# them away neither a freeze nor, worse, a thaw would ever end. A limit that the server does not know yet is left out.
_SETTINGS: Final[LiteralString] = """
    SELECT pg_catalog.set_config(s.name, v.value, false)
      FROM (VALUES ('application_name', %(application_name)s),
                   ('default_transaction_read_only', 'off'),
                   ('default_transaction_isolation', 'read committed'),
                   ('default_transaction_deferrable', 'off'),
                   ('synchronous_commit', 'local'),
                   ('plan_cache_mode', 'force_generic_plan'),
                   ('search_path', 'pg_catalog, pg_temp'),
                   ('DateStyle', 'ISO'),
                   ('IntervalStyle', 'postgres'),
                   ('client_encoding', 'UTF8'),
                   ('client_min_messages', 'error'),
                   ('lock_timeout', %(lock_timeout)s),
                   ('statement_timeout', '0'),
                   ('transaction_timeout', '0'),
                   ('idle_session_timeout', '0'),
                   ('idle_in_transaction_session_timeout', '10s'),
                   ('client_connection_check_interval', '0')) AS v (name, value)
      JOIN pg_catalog.pg_settings s ON lower(s.name) = lower(v.name)"""
_FACTS: Final[LiteralString] = "SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_is_in_recovery()"


def connector(dsn: str) -> Connect:
    """Return a :data:`Connect` for a libpq connection string or URI; its database is the maintenance database.

    :raises InvalidRequest: if *dsn* is not a connection string.
    """
    try:
        given = psycopg.conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        # Not chained: libpq's message quotes parts of the string, and a part may be the password.
        raise InvalidRequest(
            "the connection string cannot be parsed: use postgresql://USER@HOST:PORT/DATABASE"
        ) from None
    if any(char in (str(given.get("host") or "")) for char in "=; "):
        # Another program's format, of which libpq takes all the rest for the host, and shows it in its messages.
        raise InvalidRequest("the host of the connection string holds = or ;, use postgresql://USER@HOST:PORT/DATABASE")
    given.setdefault("dbname", "postgres")
    parameters: dict[str, Any] = {**CONNECTION_DEFAULTS, **given}
    return lambda: psycopg.connect(autocommit=True, **parameters)


@contextmanager
def control(connect: Connect, doing: str, application_name: str = "pg-freeze") -> Iterator[Control]:
    """Open a control connection, check that it can be one, and close it in the end.

    :param doing: what is being done, for the message of an error.
    :raises FreezeRefused: for a pooled connection, a standby, or a server older than PostgreSQL 14.
    :raises ServerLost: if the server cannot be reached or goes away.
    """
    with translated(doing):
        connection = open_control(connect, application_name)
        try:
            yield connection
        finally:
            connection.close()


def open_control(connect: Connect, application_name: str = "pg-freeze", lock_timeout: str = "10s") -> Control:
    """Return a checked and prepared control connection, which the caller closes."""
    connection = connect()
    try:
        connection.autocommit = True
        if connection.info.server_version < OLDEST_VERSION:
            raise FreezeRefused(
                f"the server is PostgreSQL {connection.info.parameter_status('server_version')}; 14 or newer is needed"
            )
        # A pooler hands out server sessions of its own, whose pid is not the one that libpq was told: settings, the
        # dead-man switch and the end of a session would land anywhere.
        row = connection.execute(_FACTS).fetchone()
        if row is None or row[0] != connection.info.backend_pid:
            raise FreezeRefused(
                "the control connection goes through a connection pooler (the server's pid is "
                f"{row and row[0]}, the connection's {connection.info.backend_pid}): connect to PostgreSQL itself"
            )
        if row[1]:
            raise FreezeRefused("the server is a standby (in recovery), which cannot be frozen: connect to the primary")
        connection.execute(_SETTINGS, {"application_name": application_name, "lock_timeout": lock_timeout})
    except BaseException:
        connection.close()
        raise
    return connection


def reworded(error: BaseException, doing: str) -> FreezeError:
    """Return *error* as a :class:`FreezeError`."""
    if isinstance(error, FreezeError):
        return error
    if isinstance(error, psycopg.Error):
        return translate(error, doing)
    return ServerLost(f"{doing}: {error}") if isinstance(error, OSError) else FreezeError(f"{doing}: {error}")
