"""From an Airflow connection to a psycopg connection to the maintenance database, which is all that the core needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Final

import psycopg
from airflow.providers.common.compat.sdk import AirflowFailException, mask_secret
from airflow.providers.postgres.hooks.postgres import PostgresHook

from pg_freeze import FreezeRefused, FreezeRequest, Hold, InvalidRequest, Progress, ServerLost, frozen
from pg_freeze.control import CONNECTION_DEFAULTS, Control, connected

#: The default holder of a freeze: the run. Rendered by Airflow, like every templated field.
RUN: Final = "{{ dag.dag_id }}/{{ run_id }}"
#: The default holder of a freeze that begins and ends in one task: the run and the task.
TASK: Final = RUN + "/{{ ti.task_id }}{{ '' if ti.map_index is none or ti.map_index < 0 else '/%d' % ti.map_index }}"

# RDS and Redshift accept a token for 15 minutes, Azure for longer.
_TOKEN_LIFE: Final = timedelta(minutes=10)
# psycopg.connect() takes these beside libpq's options; the core sets what it needs of them.
_NOT_FOR_LIBPQ: Final = frozenset({"autocommit", "context", "cursor_factory", "prepare_threshold", "row_factory"})


class PgFreezeHook(PostgresHook):
    """Connects to the maintenance database of a server, always with psycopg 3 and in autocommit.

    SSL, IAM tokens and the other extras of the Airflow connection work as they do for every PostgreSQL task. What
    the connection leaves open gets the core's time limits, so that a dead network cannot hold a freeze for minutes.

    The Airflow connection is looked up once, when it is first needed: neither an undo nor a signal handler asks for
    it again.

    :param postgres_conn_id: the Airflow connection, of type Postgres. Its schema is the database to freeze by
        default; it is not the database that this hook connects to.
    :param maintenance_database: the database to control the freeze from, which also holds the journal. A database
        cannot be closed to new sessions from inside, so it must be another one than those to freeze.
    """

    def __init__(
        self, postgres_conn_id: str = "postgres_default", *, maintenance_database: str = "postgres", **kwargs: Any
    ) -> None:
        super().__init__(postgres_conn_id=postgres_conn_id, **kwargs)
        self.maintenance_database = maintenance_database
        self._token: tuple[float, dict[str, Any]] | None = None

    def connect(self) -> Control:
        """Return a new connection to the maintenance database: a :data:`~pg_freeze.Connect`.

        :raises psycopg.Error: if the server does not let us in; otherwise as :meth:`connect_to`.
        """
        return self.connect_to(self.maintenance_database)

    def connect_to(self, database: str) -> Control:
        """Return a new connection to a database: a :data:`~pg_freeze.ConnectTo`.

        :raises InvalidRequest: for an extra that is no option of libpq.
        :raises ServerLost: if no IAM token can be had.
        :raises psycopg.Error: if the server does not let us in.
        """
        extra = self.connection.extra_dejson
        parameters: dict[str, Any] = {
            "host": self.connection.host,
            "port": self.connection.port,
            "user": self.connection.login,
            "password": self.connection.password,
            "options": self.options,
        }
        not_for_libpq = self.ignored_extra_options | _NOT_FOR_LIBPQ
        parameters |= {name: value for name, value in extra.items() if name not in not_for_libpq}
        if extra.get("iam", False):
            parameters |= self._credentials()
        parameters["dbname"] = database
        given = {name: value for name, value in parameters.items() if value is not None and value != ""}
        return connected(psycopg.conninfo.conninfo_to_dict(conninfo({**CONNECTION_DEFAULTS, **given})))

    def get_conn(self) -> Any:
        """Return :meth:`connect`'s connection, so that every method of :class:`PostgresHook` uses it."""
        return self.connect()

    def frozen(
        self,
        database: str | Sequence[str] | None = None,
        *,
        progress: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> AbstractContextManager[Hold]:
        """Freeze databases for the time of a ``with`` block: no task hop lies inside the outage.

        ::

            with PgFreezeHook("gitlab").frozen(holder="nightly", strategy="lock") as hold:
                take_the_snapshot()
            print(hold.attestation.level)

        :param database: the database or databases; by default the connection's schema.
        :param progress: called after each look at those who are waited for.
        :param options: as for :meth:`pg_freeze.FreezeRequest.for_block`: ``holder``, ``strategy``, ``lease`` …
        """
        request = FreezeRequest.for_block(self.databases(database), **options)
        return frozen(self.connect, self.connect_to, request, progress=progress)

    def databases(self, database: str | Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the databases that an operator's ``database`` means: by default, the connection's schema.

        :raises FreezeRefused: if neither names one.
        """
        if database is None or database == "":
            database = self.connection.schema
        if not database:
            raise FreezeRefused(
                f"no database was named, and the connection {self.get_conn_id()!r} has no schema: give database=…, or "
                "fill in the connection's Database field"
            )
        return (database,) if isinstance(database, str) else tuple(database)

    def _credentials(self) -> dict[str, Any]:
        """Return user, password and port by IAM. Tokens are kept for a while: an undo should not need the cloud."""
        now = time.monotonic()
        if self._token is None or now - self._token[0] > _TOKEN_LIFE.total_seconds():
            try:
                login, password, port = self.get_iam_token(self.connection)
            except Exception as error:
                raise ServerLost(f"no IAM token for {self.get_conn_id()!r}: {type(error).__name__}: {error}") from error
            mask_secret(password)
            self._token = now, {"user": login, "password": password, "port": port}
        return self._token[1]


def conninfo(parameters: dict[str, Any]) -> str:
    """Return *parameters* as a libpq connection string.

    :raises InvalidRequest: naming those that libpq does not know, without their values.
    """
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    unknown = sorted(set(parameters) - known)
    if unknown:
        raise InvalidRequest(f"the connection's extras {', '.join(map(repr, unknown))} are no options of libpq")
    return psycopg.conninfo.make_conninfo("", **parameters)


@contextmanager
def refused_fails_at_once() -> Iterator[None]:
    """Fail the task without retries for what no retry can cure.

    :raises AirflowFailException: for :class:`FreezeRefused`. Every other error goes on as it is, and is retried.
    """
    try:
        yield
    except FreezeRefused as error:
        raise AirflowFailException(str(error)) from error
