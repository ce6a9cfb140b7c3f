"""The server to work on: from ``--dsn``, the environment or ``--conn-id`` to a function that connects."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pg_freeze import Connect, ConnectTo, FreezeError, InvalidRequest, __version__, connector
from pg_freeze.cli.parser import ENVIRONMENT

#: The group of entry points of which ``--conn-id`` loads the one there is. Called with an id and a maintenance database
#: (or None), it returns a function that connects to a named database, or for None to the maintenance database.
CONNECTIONS: Final = "pg_freeze.connections"
#: With one of these set, libpq knows where the server is.
_LIBPQ: Final = ("PGHOST", "PGHOSTADDR", "PGSERVICE")
_SCHEMES: Final = ("postgresql://", "postgres://")


@dataclass(frozen=True, slots=True)
class Target:
    """One server.

    :param name: for people; holds no secret.
    :param connect: opens a connection to the maintenance database.
    :param connect_to: opens one to a named database.
    :param options: the words that name it again on a command line; hold no secret.
    :param needs_password: whether a password was left out of *options*.
    """

    name: str
    connect: Connect
    connect_to: ConnectTo
    options: tuple[str, ...]
    needs_password: bool = False


def targets(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> tuple[Target, ...]:
    """Return the servers that the options name.

    :raises InvalidRequest: if none is named, or one of them is not a connection string.
    """
    dsns: Sequence[str] = args.dsn or ()
    conn_ids: Sequence[str] = args.conn_id or ()
    maintenance: str | None = args.maintenance_database
    if not dsns and not conn_ids:
        if environment.get(ENVIRONMENT):
            return (_by_dsn(environment[ENVIRONMENT], maintenance, given=False),)
        if any(name in environment for name in _LIBPQ):
            return (_by_dsn("", maintenance, given=False),)
        raise InvalidRequest(
            f"which server? Give --dsn postgresql://USER@HOST:PORT, set {ENVIRONMENT} (or PGHOST and the like), or "
            "give the --conn-id of an Airflow connection"
        )
    return (
        *(_by_dsn(dsn, maintenance, given=True) for dsn in dsns),
        *(_by_conn_id(conn_id, maintenance) for conn_id in conn_ids),
    )


def _override(maintenance: str | None) -> tuple[str, ...]:
    return () if maintenance is None else (f"--maintenance-database={maintenance}",)


def _by_dsn(dsn: str, maintenance: str | None, *, given: bool) -> Target:
    _check_uri(dsn)
    connector(dsn)  # says what is wrong with it, without quoting it
    parameters: dict[str, Any] = conninfo_to_dict(dsn)
    if maintenance is not None:
        parameters["dbname"] = maintenance
    public = {key: value for key, value in parameters.items() if key not in _secrets()}
    host = public.get("host") or public.get("hostaddr") or os.environ.get("PGHOST") or "the local socket"
    port = public.get("port") or os.environ.get("PGPORT") or "5432"
    again = make_conninfo("", **{key: value for key, value in public.items() if key != "dbname" or maintenance is None})
    hidden = len(public) != len(parameters)
    return Target(
        f"{host}:{port}",
        connector(make_conninfo("", **parameters)),
        lambda database: connector(make_conninfo("", **{**parameters, "dbname": database}))(),
        (*((f"--dsn={again if hidden else dsn}",) if given else ()), *_override(maintenance)),
        needs_password=given and hidden,
    )


def _check_uri(dsn: str) -> None:
    """Refuse a URI whose password holds an unencoded ``@`` or ``/``.

    libpq would take a part of it for the host, and its message would show that.
    """
    scheme = next((scheme for scheme in _SCHEMES if dsn.startswith(scheme)), None)
    if scheme is None:
        return
    place = dsn.removeprefix(scheme).partition("?")[0]
    user, at, rest = place.partition("@")
    ports = (place if not at else rest).partition("/")[0].rpartition("]")[2].split(",")
    sound = all(port.rpartition(":")[2].isdecimal() or port.partition(":")[2] == "" for port in ports)
    if "@" in rest or "/" in user.partition("@")[0] * bool(at) or not sound:
        raise InvalidRequest(
            "the connection URI is ambiguous: write @ as %40, / as %2F, : as %3A and ? as %3F in its user and password"
        )


def _secrets() -> frozenset[str]:
    # libpq marks what a login dialog should not show; the keys derived from a password it calls debug options.
    marked = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults() if option.dispchar == b"*"}
    return frozenset(marked | {"password", "scram_client_key", "scram_server_key"})


def _by_conn_id(conn_id: str, maintenance: str | None) -> Target:
    # Looked for only now: it takes time, and what is found is loaded, which takes seconds.
    found = tuple(entry_points(group=CONNECTIONS))
    if not found:
        raise InvalidRequest(
            "--conn-id names a connection of Airflow, and airflow-provider-pg-freeze is not installed here: "
            f"pip install ./engine . in a checkout of version {__version__} or newer; --dsn does without"
        )
    try:
        connect = found[0].load()(conn_id, maintenance)
    except ImportError as error:
        raise FreezeError(f"--conn-id needs Airflow, which cannot be loaded ({error}); --dsn does without") from error
    return Target(
        f"connection {conn_id!r}",
        lambda: connect(None),
        connect,
        (f"--conn-id={conn_id}", *_override(maintenance)),
    )
