"""What the core returns, as people read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pg_freeze import Backend, Doubt, Fate, Freeze, State, strategies
from pg_freeze.cli.target import Target
from pg_freeze.cli.words import command, moment, spoken
from pg_freeze.names import identifier, literal, visible

FATES: Mapping[Fate, str] = {
    Fate.IDLE: "ended at once: idle",
    Fate.AFTER_BARRIER: "ended at once: its transaction began after the barrier",
    Fate.WAITS: "may finish its transaction until the drain timeout; then terminated, or everything is undone",
    Fate.CANNOT_END: "cannot be ended by this role: may write on",
}


def names(databases: Iterable[str]) -> str:
    """Return database names for a sentence."""
    return ", ".join(map(visible, databases))


def pairs(rows: Mapping[str, str]) -> RenderableType:
    """Return names and values, one pair a line."""
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(Text(name, style="dim"), Text(visible(value), overflow="fold"))
    return Padding(grid, (0, 0, 0, 2), expand=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table whose cells are taken literally."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(visible("-" if cell is None or cell == "" else cell)) for cell in row))
    return made


def backends(those: Sequence[Backend], fates: Mapping[Fate, str] | None = FATES) -> Table:
    """Return the table of lingering backends, with what will happen to each, unless nothing will any more."""
    return table(
        (
            "pid",
            "database",
            "role",
            "application",
            "state",
            "in transaction",
            *(("what will happen",) if fates else ()),
        ),
        (
            (
                one.pid,
                one.database,
                one.role,
                one.application or one.backend_type,
                one.state or "hidden from this role",
                None if one.transaction_age is None else spoken(one.transaction_age),
                *((fates[one.fate],) if fates else ()),
            )
            for one in those
        ),
    )


def findings(those: Iterable[Mapping[str, str]]) -> list[RenderableType]:
    """Return what preflight found, each with its remedy below it."""
    shown: list[RenderableType] = []
    for one in those:
        refused = one["severity"] == "refuse"
        line = Text("refused  " if refused else "warning  ", style="bold red" if refused else "bold yellow")
        shown += [line.append(visible(one["message"]), style="default"), Text(f"         → {visible(one['remedy'])}")]
    return shown


def headline(freeze: Freeze) -> Text:
    """Return what a freeze is doing to its databases, in one line."""
    text, style = strategies.of(freeze.strategy).headline(freeze), "bold red" if freeze.holds else "bold green"
    if freeze.holds and freeze.state is State.DRAINING:
        style = "bold yellow"
    if freeze.left_over:
        text, style = "is thawed, but for what is left over", "bold red"
    elif len(freeze.dropped) == len(freeze.databases):
        text, style = "is no more: it was dropped while frozen", "bold green"
    if len(freeze.databases) > 1:
        text = text.replace("is ", "are ", 1)
    return Text(names(freeze.databases), style="bold").append(" ").append(text, style=style)


def details(freeze: Freeze, now: datetime | None) -> RenderableType:
    """Return who holds a freeze, since when, until when, and what ends it then."""
    rows = {"holder": freeze.holder, "strategy": freeze.strategy, "since": moment(freeze.requested_at, now)}
    if freeze.holds:
        overdue = now is not None and freeze.lease_until <= now
        rows["lease ends"] = moment(freeze.lease_until, now) + ("; OVERDUE: thaw it" if overdue else "")
    rows |= strategies.of(freeze.strategy).facts(freeze)
    if freeze.dropped:
        rows["dropped since"] = names(freeze.dropped)
    for number, one in enumerate(freeze.left_over, 1):
        rows[f"left over {number}"] = f"{one['what']}: {one['why']}"
    for number, one in enumerate(freeze.in_the_way, 1):
        who = f"pid {one['pid']} of {one['database']!r} ({one['role']}, {one['application'] or 'no name'})"
        rows[f"in the way {number}"] = f"{who if one['pid'] else 'a transaction'}: {one['why_not'] or 'was ended'}"
    if freeze.state is State.FROZEN:
        rows["frozen"] = moment(freeze.frozen_at, now)
        rows["checkpoint"] = freeze.checkpoint_lsn or "not yet"
        rows["ended"] = counted(freeze.terminated)
    return pairs(rows)


def counted(terminated: Mapping[str, object]) -> str:
    """Return how many sessions were ended, and why."""
    reasons = {
        "idle": "idle",
        "began-after-barrier": "began after the barrier",
        "drain-timeout": "at the drain timeout",
    }
    # A journal of another version, or a row that somebody else has written, may hold what is no number.
    numbers = {reason: n for reason, n in terminated.items() if isinstance(n, int)}
    said = ", ".join(f"{n} {reasons.get(reason, reason)}" for reason, n in numbers.items())
    return f"{sum(numbers.values())} session(s): {said}" if said else "no session"


def to_type(title: str, *lines: str) -> list[RenderableType]:
    """Return command lines that a person is to type next, each on a line of its own and never wrapped."""
    return [Text(f"\n{title}"), *(Text(f"  {line}", style="bold cyan", no_wrap=True) for line in lines)]


def thaw(freeze: Freeze, target: Target) -> list[RenderableType]:
    """Return the commands that thaw a freeze: with this program, and with psql alone."""
    shown = to_type("Thaw it with", command("resume", target.options, freeze.databases, freeze.holder))
    sql = f"CALL pgfreeze.thaw({literal(freeze.databases[0])});"
    where = strategies.of(freeze.strategy).journal_database(freeze)
    where = "the maintenance database" if where is None else visible(where)
    shown += to_type(f"or in psql, connected to {where}", sql)
    if target.needs_password:
        shown.append(Text("\nThe password is not repeated here: put it into PGPASSWORD or ~/.pgpass.", style="dim"))
    return shown


def unknown(those: Iterable[Doubt]) -> list[RenderableType]:
    """Return of which databases it is not known whether they are frozen, and what to do about each."""
    shown: list[RenderableType] = []
    for one in those:
        said = f"\nIt is not known whether {visible(one.database)} is frozen: {visible(one.why)}."
        shown += [Text(said, style="bold yellow"), Text(f"  → {visible(one.remedy)}")]
    return shown


def unexplained(databases: Iterable[str], doubts: Sequence[Doubt] = ()) -> list[RenderableType]:
    """Return what to do about databases that are closed or read-only without a freeze in the journal.

    :param doubts: what may explain them: then nothing is said that would undo a good freeze.
    """
    shown: list[RenderableType] = []
    for name in databases:
        said = f"\n{visible(name)} is closed or read-only by default, though this journal knows of no freeze of it."
        quoted = identifier(name)
        if doubts:
            shown += [Text(said, style="bold yellow"), Text("What is said above may explain that: look there first.")]
            continue
        shown += [
            Text(said, style="bold yellow"),
            Text("Is the journal in another --maintenance-database? docs/stuck.md says more."),
            *to_type(
                "If it is not meant to be so, in psql, connected to another database",
                f"ALTER DATABASE {quoted} WITH ALLOW_CONNECTIONS true;",
                f"ALTER DATABASE {quoted} RESET default_transaction_read_only;",
            ),
        ]
    return shown
