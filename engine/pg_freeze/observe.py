"""Reading without acting: preflight, status and history."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Final, LiteralString
from uuid import UUID

from pg_freeze import findings, journal
from pg_freeze.backends import lingering
from pg_freeze.control import Connect, ConnectTo, Control, control
from pg_freeze.errors import FreezeError, FreezeRefused, InvalidRequest, LeaseLost, ServerLost
from pg_freeze.freeze import held
from pg_freeze.journal import schema
from pg_freeze.journals import in_each_journal, journal_of
from pg_freeze.model import Backend, Freeze, Status
from pg_freeze.preflight_checks import Preflight, examine
from pg_freeze.request import NO_TIME, FreezeRequest, check_known, names_of
from pg_freeze.strategies import named
from pg_freeze.unknown import doubtful

# A database that is closed or read-only by default though no freeze says so: left by hand, or the journal is gone.
_UNEXPLAINED: Final[LiteralString] = """
    SELECT d.datname::text FROM pg_database d
     WHERE (%(names)s::text[] IS NULL OR d.datname::text = ANY (%(names)s))
       AND d.datname::text <> ALL (%(explained)s)
       -- A template is closed with a reason.
       AND (NOT d.datallowconn AND NOT d.datistemplate OR EXISTS (
            SELECT FROM pg_db_role_setting s, unnest(s.setconfig) AS c (entry)
             WHERE s.setdatabase = d.oid AND s.setrole = 0
               AND split_part(c.entry, '=', 1) = 'default_transaction_read_only'
               AND split_part(c.entry, '=', 2)::boolean))
     ORDER BY 1"""


def preflight(connect: Connect, request: FreezeRequest, *, connect_to: ConnectTo | None = None) -> Preflight:
    """Return everything that would make this freeze fail or leak, each finding with its remedy. Changes nothing.

    :param connect_to: returns a new connection to the named database, for a strategy that works from inside.
    """
    strategy = named(request.strategy)
    if strategy.own_journal:
        with control(connect, "preflight") as conn:
            closed = tuple(findings.not_enterable(conn, request.databases))
        if closed:
            return Preflight(request.databases, closed)
    with control(strategy.journal(connect, connect_to, request), "preflight") as conn:
        return examine(conn, connect_to, request)


def status(connect: Connect, *, databases: Sequence[str] | None = None, connect_to: ConnectTo | None = None) -> Status:
    """Return what is frozen now (all, or those of *databases*), who lingers, and what is closed without a freeze.

    :param connect_to: returns a new connection to the named database, to look at what is frozen from inside.
    :raises FreezeRefused: for a database that the server does not have; and where a journal may not be read, or is not
        to be trusted: then it is not known what is frozen.
    """
    names = None if databases is None else list(names_of(databases, "anybody"))
    with control(connect, "status") as conn:
        try:
            places = in_each_journal(conn, connect_to, names, _frozen, doing="look")
        except ServerLost:
            raise
        except FreezeError as error:
            raise _unknown(conn, names, error) from error
        freezes = tuple(freeze for place, _ in places for freeze in place)
        backends = tuple(backend for _, place in places for backend in place)
        if names is not None and not freezes:
            check_known(conn, names)
        explained = [name for freeze in freezes for name in freeze.databases if name not in freeze.dropped]
        unexplained = _unexplained(conn, names, explained)
        unknown = doubtful(conn, connect_to, names)
        now = conn.execute("SELECT clock_timestamp()").fetchone()
        assert now is not None
        return Status(freezes, backends, unexplained, now[0], unknown)


def _unexplained(conn: Control, names: Sequence[str] | None, explained: Sequence[str]) -> tuple[str, ...]:
    rows = conn.execute(_UNEXPLAINED, {"names": names, "explained": list(explained)})
    return tuple(name for (name,) in rows)


def _unknown(conn: Control, names: Sequence[str] | None, error: FreezeError) -> FreezeError:
    """Return what to say where a journal tells nothing: the catalog still tells what is closed or read-only."""
    kind = FreezeRefused if isinstance(error, FreezeRefused) else FreezeError
    seen = ", ".join(map(repr, _unexplained(conn, names, ())))
    also = f". Closed or read-only by default: {seen}" if seen else ""
    return kind(f"it is not known what is frozen: {error}{also}")


def _frozen(conn: Control, names: Sequence[str] | None) -> tuple[tuple[Freeze, ...], tuple[Backend, ...]]:
    freezes = journal.active(conn, names) if schema.require(conn) else ()
    backends: list[Backend] = []
    found = schema.installed(conn) if freezes else None
    for freeze in freezes:
        # Who lingers is asked of the tables. Those of another version we do not know.
        if freeze.holds and freeze.barrier_at is not None and found is not None and found.current:
            try:
                backends += lingering(conn, freeze)
            except LeaseLost:
                continue  # thawed since it was read: nothing lingers any more
    return freezes, tuple(backends)


def lingering_of(
    connect: Connect, *, databases: Sequence[str], holder: str, connect_to: ConnectTo | None = None
) -> tuple[Backend, ...]:
    """Return the lingering backends of the freeze that *holder* has of these databases. Ends nobody.

    :param connect_to: returns a new connection to the named database, for one that is frozen from inside.
    :raises LeaseLost: if there is no such freeze: "nobody lingers" would then mean nothing.
    """
    names = names_of(databases, holder)
    with journal_of(connect, connect_to, names, "look for lingering backends") as conn:
        return lingering(conn, held(conn, names, holder))


def standing(
    connect: Connect,
    *,
    databases: Sequence[str],
    holder: str,
    lease_left: timedelta = NO_TIME,
    token: UUID | None = None,
    connect_to: ConnectTo | None = None,
) -> Freeze:
    """Return the freeze that *holder* has of these databases, if it stands now: what a snapshot asks, before and after.

    :param lease_left: how much of its lease must be left.
    :param token: which freeze it must be; by default any of this holder's.
    :param connect_to: returns a new connection to the named database, for one that is frozen from inside.
    :raises LeaseLost: if there is none, it is another one, or too little of its lease is left.
    """
    names = names_of(databases, holder)
    with journal_of(connect, connect_to, names, "look for the freeze") as conn:
        freeze = held(conn, names, holder)
        row = conn.execute("SELECT %s::timestamptz - clock_timestamp()", (freeze.lease_until,)).fetchone()
    assert row is not None
    left: timedelta = row[0]
    if left <= NO_TIME:
        raise LeaseLost(f"the lease of {holder!r} ended {-left.total_seconds():.1f} s ago: the freeze no longer counts")
    if left < lease_left:
        raise LeaseLost(
            f"only {left.total_seconds():.1f} s are left of the lease of {holder!r}; {lease_left.total_seconds():g} "
            "s are needed. Pause again, which extends it, or give a longer lease"
        )
    if token is not None and freeze.token != token:
        raise LeaseLost(
            f"{holder!r} has another freeze now ({freeze.token}); the one that it had ({token}) is over, and "
            "writes were possible in between"
        )
    return freeze


def history(connect: Connect, *, limit: int = 20) -> tuple[Freeze, ...]:
    """Return the last *limit* freezes, newest first; none where there is no journal yet.

    :raises InvalidRequest: if *limit* is not positive.
    """
    if limit <= 0:
        raise InvalidRequest(f"limit is {limit}: it must be more than zero")
    with control(connect, "history") as conn:
        return journal.newest(conn, limit) if schema.require_current(conn) else ()


def has_journal(connect: Connect) -> bool:
    """Return whether there is a journal."""
    with control(connect, "look for the journal") as conn:
        return schema.require_current(conn)
