"""The control connection: to the maintenance database, direct, autocommit, and never waiting for ever."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, LiteralString, TypeAlias

import psycopg

from pg_freeze.errors import FreezeError, FreezeRefused, InvalidRequest, ServerLost, translate, translated
from pg_freeze.refusal import refusal

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

#: How long a statement of ours may take, in a session that is not told otherwise: what others have put into a database
#: can make any of them slow. What may rightly take longer is :func:`unhurried`.
STATEMENT_TIMEOUT: Final[LiteralString] = "60s"

# In the startup packet these come before anything that the owner of a database, or a role, has set for its sessions: a
# search_path with operators of his, a role or a library. The role may be chosen, by whoever connects.
_BEFORE: Final = "-c role=none"
_STARTUP: Final = " ".join(
    f"-c {setting}"
    for setting in (
        "search_path=pg_catalog,pg_temp",
        f"statement_timeout={STATEMENT_TIMEOUT}",
        "lock_timeout=10s",
        "idle_session_timeout=0",
        "default_transaction_read_only=off",
        "default_transaction_isolation=read\\ committed",
        "default_transaction_deferrable=off",
        "local_preload_libraries=",
    )
)
# A server refuses a setting that it does not know: this one is named only to those that are known to be 17 or newer.
_NEWER: Final = " -c transaction_timeout=0"
_KNOWN_AS_NEWER: Final[set[tuple[str, ...]]] = set()
# The same for a connection that somebody else opened: before we know that it is one to the server itself, nothing is
# asked that looks up a name or, with SERIALIZABLE READ ONLY DEFERRABLE as a default, would wait for others.
_HURRIED: Final[LiteralString] = f"SET statement_timeout = '{STATEMENT_TIMEOUT}'"
_SAFE: Final[LiteralString] = f"""
    SET search_path = pg_catalog, pg_temp; {_HURRIED}; SET default_transaction_read_only = off;
    SET default_transaction_isolation = 'read committed'; SET default_transaction_deferrable = off;
    SET standard_conforming_strings = on; SET transform_null_equals = off; SET quote_all_identifiers = off"""

# The owner of a database may set defaults for its sessions, and a role for its own: exit_on_error, for example, ends a
# dead-man switch at its first error. So every default that was set that way is put back to PostgreSQL's own one. Only
# those stay that format times and numbers, and those that only superusers may set: superusers are trusted, and may want
# to log what we do. session_replication_role does not stay: some managed servers hand on the right to set it.
#
# Only errors are sent: the client of a dead-man switch is gone, and the server ends a session that cannot send a
# warning. Commits do not wait for synchronous standbys: with one of them away neither a freeze nor, worse, a thaw would
# ever end. A limit that the server does not know yet is left out.
_SETTINGS: Final[LiteralString] = """
    WITH known AS (
    SELECT s.name, COALESCE(v.value, s.boot_val, '') AS value
      FROM pg_catalog.pg_settings s
      LEFT JOIN (VALUES ('application_name', %(application_name)s),
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
                   ('statement_timeout', %(statement_timeout)s),
                   ('restrict_nonsystem_relation_kind', ''),
                   ('transaction_timeout', '0'),
                   ('idle_session_timeout', '0'),
                   ('idle_in_transaction_session_timeout', '10s'),
                   ('client_connection_check_interval', '0')) AS v (name, value)
        ON pg_catalog.lower(s.name) OPERATOR(pg_catalog.=) pg_catalog.lower(v.name)
     WHERE v.name IS NOT NULL
        OR s.source OPERATOR(pg_catalog.=) ANY ('{database,user,database user}'::pg_catalog.text[])
           AND (s.context OPERATOR(pg_catalog.=) 'user'
                OR s.name OPERATOR(pg_catalog.=) 'session_replication_role'
                   AND pg_catalog.current_setting('is_superuser') OPERATOR(pg_catalog.=) 'on')
           AND s.name OPERATOR(pg_catalog.<>) ALL (
               '{TimeZone,timezone_abbreviations,lc_monetary,lc_numeric,lc_time}'::pg_catalog.text[])
     UNION ALL  -- not known yet to a session that has run nothing in PL/pgSQL
    VALUES ('plpgsql.check_asserts', 'on'), ('plpgsql.extra_errors', 'none'), ('plpgsql.extra_warnings', 'none'),
           ('plpgsql.print_strict_params', 'off'))
    SELECT pg_catalog.set_config(known.name, known.value, false) FROM known"""
_FACTS: Final[LiteralString] = """
    BEGIN ISOLATION LEVEL READ COMMITTED;
    SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_is_in_recovery(), session_user::pg_catalog.text;
    COMMIT"""


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
    return lambda: connected(parameters)


def connected(parameters: Mapping[str, Any]) -> Control:
    """Return a new connection, in which nothing that others have set for their databases runs code of theirs.

    :param parameters: libpq's. What ``options`` (or PGOPTIONS) says is kept, but for what our safety rests on.
    :raises FreezeRefused: by a connection pooler.
    :raises psycopg.Error: if the server does not let us in; with a SQLSTATE if no retry can cure that.
    """
    given = parameters.get("options") or os.environ.get("PGOPTIONS", "")
    where = tuple(str(parameters.get(name)) for name in ("service", "host", "hostaddr", "port"))
    wanted = {"client_encoding": "UTF8", "options": f"{_BEFORE} {given} {_STARTUP}"}
    newer = wanted | {"options": wanted["options"] + _NEWER}
    try:
        if where in _KNOWN_AS_NEWER:
            return psycopg.connect(autocommit=True, **{**parameters, **newer})
        connection = psycopg.connect(autocommit=True, **{**parameters, **wanted})
        if connection.info.server_version >= 170000:
            _KNOWN_AS_NEWER.add(where)
            if not _is_unlimited(connection):
                return psycopg.connect(autocommit=True, **{**parameters, **newer})
    except psycopg.OperationalError as error:
        _KNOWN_AS_NEWER.discard(where)
        # libpq keeps no SQLSTATE of a connection that failed. PgBouncer's words, which it does not translate.
        if "startup parameter" in str(error):
            raise FreezeRefused(
                f"the control connection goes through a connection pooler ({str(error).strip()}): "
                "connect to PostgreSQL itself"
            ) from error
        raise refusal({**parameters, **wanted}, error) from error
    return connection


def _is_unlimited(connection: Control) -> bool:
    """Whether transactions may take their time in this session; if not, it is closed."""
    with suppress(psycopg.OperationalError):
        if connection.execute("SHOW transaction_timeout").fetchone() == ("0",):
            return True
    connection.close()
    return False


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


def open_control(
    connect: Connect,
    application_name: str = "pg-freeze",
    *,
    lock_timeout: str = "10s",
    statement_timeout: str = STATEMENT_TIMEOUT,
) -> Control:
    """Return a checked and prepared control connection, which the caller closes.

    :param lock_timeout: how long a statement may wait for a lock, as PostgreSQL writes it; ``0`` for ever.
    :param statement_timeout: how long a statement may take, likewise.
    """
    connection = connect()
    try:
        connection.autocommit = True
        if connection.info.server_version < OLDEST_VERSION:
            raise FreezeRefused(
                f"the server is PostgreSQL {connection.info.parameter_status('server_version')}; 14 or newer is needed"
            )
        # A pooler hands out server sessions of its own, whose pid is not the one that libpq was told: settings, the
        # dead-man switch and the end of a session would land anywhere.
        facts = connection.execute(_FACTS)
        facts.nextset()
        row = facts.fetchone()
        if row is None or row[0] != connection.info.backend_pid:
            raise FreezeRefused(
                "the control connection goes through a connection pooler (the server's pid is "
                f"{row and row[0]}, the connection's {connection.info.backend_pid}): connect to PostgreSQL itself"
            )
        # Not before: a setting would stay with the pooler's session.
        connection.execute(_SAFE)
        if row[2] != connection.info.user:
            raise FreezeRefused(
                f"a setting of database {connection.info.dbname!r} makes this a session of role {row[2]!r}: as its "
                f"owner or a superuser, ALTER DATABASE … RESET session_authorization"
            )
        if row[1]:
            raise FreezeRefused("the server is a standby (in recovery), which cannot be frozen: connect to the primary")
        given = {"lock_timeout": lock_timeout, "statement_timeout": statement_timeout}
        connection.execute(_SETTINGS, {"application_name": application_name, **given})
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def unhurried(conn: Control) -> Iterator[None]:
    """Let the statements of this block take as long as they need: a checkpoint, a thaw, the reading of much WAL."""
    conn.execute("SET statement_timeout = 0")
    try:
        yield
    finally:
        with suppress(psycopg.Error):  # of a connection that was lost in the block
            conn.execute(_HURRIED)


def reworded(error: BaseException, doing: str) -> FreezeError:
    """Return *error* as a :class:`FreezeError`."""
    if isinstance(error, FreezeError):
        return error
    if isinstance(error, psycopg.Error):
        return translate(error, doing)
    return ServerLost(f"{doing}: {error}") if isinstance(error, OSError) else FreezeError(f"{doing}: {error}")
