"""What all rounds add up to: medians with their spread, and the targets that they are held to."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from benchmarks.procedures import Pooler
from benchmarks.rounds import Drain, Outage
from benchmarks.tables import Many
from pg_freeze import LOCK as BY_LOCKS

READ_GAP: Final = 0.5
READ_GAP_RATIO: Final = 10
WRITE_GAP_MARGIN: Final = 0.3
DRAIN_500: Final = 1.0
OVERHEAD: Final = 0.2
LOCK_READ_GAP: Final = 0.1
STRETCH: Final = 1.1
MARGIN: Final = 0.1
LOCKED: Final = 1.0
BEYOND: Final = 0.05
#: What the names of our procedures begin with.
PRODUCT: Final = "pg-freeze"
POOLER: Final = Pooler.name
LOCK: Final = f"{PRODUCT}, strategy={BY_LOCKS}"


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several measurements, with the smallest and the greatest."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Return the spread of *values*."""
        found = sorted(values)
        return cls(median(found), found[0], found[-1])

    def text(self, digits: int = 2, unit: str = " s") -> str:
        """Return it as text: median, and the range in brackets where there is one."""
        middle = f"{self.median:,.{digits}f}{unit}"
        low, high = f"{self.least:,.{digits}f}", f"{self.most:,.{digits}f}"
        return middle if low == high else f"{middle} ({low} to {high})"


@dataclass(frozen=True, slots=True)
class Target:
    """One promise, what was measured, and whether it was kept by the median of all rounds."""

    promise: str
    measured: str
    kept: bool


@dataclass(frozen=True, slots=True)
class Results:
    """Every round."""

    outages: tuple[Outage, ...]
    drains: tuple[Drain, ...]
    many: tuple[Many, ...]
    where: str
    rounds: int
    clients: tuple[int, int]

    @property
    def procedures(self) -> tuple[str, ...]:
        """The procedures, in the order in which they were first measured."""
        return tuple(dict.fromkeys(outage.procedure for outage in self.outages))

    @property
    def reference(self) -> str:
        """The procedure that all others are compared with."""
        return self.procedures[0]

    @property
    def ours(self) -> tuple[str, ...]:
        """Those of this product."""
        return tuple(procedure for procedure in self.procedures if procedure.startswith(PRODUCT))

    @property
    def loads(self) -> tuple[bool, ...]:
        """Whether a client held transactions: the loads under which was measured."""
        return tuple(sorted({outage.long_transaction for outage in self.outages}))

    @property
    def session_counts(self) -> tuple[int, ...]:
        """The numbers of idle sessions that were drained."""
        return tuple(sorted({drain.sessions for drain in self.drains}))

    @property
    def drained_throughout(self) -> tuple[str, ...]:
        """The procedures that were measured with every number of idle sessions."""
        most = max(self.session_counts)
        return tuple(dict.fromkeys(drain.procedure for drain in self.drains if drain.sessions == most))

    @property
    def table_counts(self) -> tuple[int, ...]:
        """The numbers of tables of the databases that were frozen."""
        return tuple(sorted({one.tables for one in self.many}))

    def of_tables(self, procedure: str, tables: int, what: Callable[[Many], float]) -> Spread:
        """Return the spread of one figure for a number of tables."""
        return Spread.of(what(one) for one in self.many if one.procedure == procedure and one.tables == tables)

    def of(self, procedure: str, *, long_transaction: bool) -> list[Outage]:
        """Return the rounds of one procedure, with or without the client that holds transactions."""
        return [o for o in self.outages if o.procedure == procedure and o.long_transaction is long_transaction]

    def spread(self, procedure: str, long_transaction: bool, what: Callable[[Outage], float]) -> Spread:
        """Return the spread of one figure."""
        return Spread.of(what(outage) for outage in self.of(procedure, long_transaction=long_transaction))

    def drained(self, procedure: str, sessions: int) -> Spread:
        """Return how long the drain of idle sessions took."""
        return Spread.of(d.seconds for d in self.drains if d.procedure == procedure and d.sessions == sessions)

    def overhead_under_load(self) -> Spread:
        """Return what pause and resume take but for drain and checkpoints while every client reconnects."""
        return Spread.of(o.overhead for o in self.outages if o.overhead is not None)

    def targets(self, readers: str) -> tuple[Target, ...]:
        """Return each target and whether it was met; *readers* is the procedure that admits readers throughout."""
        found: list[Target] = []
        for long in self.loads:
            load = "with 3 s transactions" if long else "short transactions only"
            ours = self.spread(readers, long, lambda o: o.read_gap)
            theirs = self.spread(self.reference, long, lambda o: o.read_gap)
            ratio = theirs.median / ours.median
            found.append(
                Target(f"read gap at most {READ_GAP} s, admit=readers, {load}", ours.text(), ours.median <= READ_GAP)
            )
            found.append(
                Target(
                    f"… and at least {READ_GAP_RATIO} times shorter than the {self.reference}",
                    f"{ratio:.0f} times ({theirs.text()})",
                    ratio >= READ_GAP_RATIO,
                )
            )
        found.extend(self._write_gap_targets())
        drained = self.drained(readers, max(self.session_counts))
        found.append(
            Target(
                f"{max(self.session_counts)} idle sessions drained in less than {DRAIN_500:g} s",
                drained.text(),
                drained.median < DRAIN_500,
            )
        )
        overhead = Spread.of(d.overhead for d in self.drains if d.overhead is not None)
        found.append(
            Target(
                f"everything else in pause + resume (not drain, not checkpoints) less than {OVERHEAD} s",
                f"{overhead.text()}; under the load {self.overhead_under_load().text()}",
                overhead.median < OVERHEAD,
            )
        )
        found.extend(self._lock_targets())
        found.extend(self._table_targets())
        return tuple(found)

    def _lock_targets(self) -> Iterable[Target]:
        for long in self.loads:
            load = "with 3 s transactions" if long else "short transactions only"
            ended = Spread.of(o.errors + o.reconnects for o in self.of(LOCK, long_transaction=long))
            promise = f"strategy=lock, {load}: no client error, no reconnection in any round"
            yield Target(promise, ended.text(0, ""), ended.most == 0)
            gap = self.spread(LOCK, long, lambda o: o.read_gap)
            yield Target(f"… read gap less than {LOCK_READ_GAP} s", gap.text(), gap.median < LOCK_READ_GAP)
            spare = Spread.of(
                STRETCH * o.write_bound + MARGIN - o.write_gap
                for o in self.of(LOCK, long_transaction=long)
                if o.write_bound is not None
            )
            yield Target(
                f"… write gap at most {STRETCH} times (open transaction + final checkpoint + snapshot) + {MARGIN} s",
                f"{spare.median:.2f} s to spare ({spare.least:.2f} to {spare.most:.2f})",
                spare.median >= 0,
            )
            if POOLER in self.procedures:
                ours, theirs = (self.spread(name, long, lambda o: o.write_gap) for name in (LOCK, POOLER))
                promise = f"… write gap no longer than by {POOLER}"
                yield Target(promise, f"{ours.text()}; there {theirs.text()}", ours.median <= theirs.median)

    def _table_targets(self) -> Iterable[Target]:
        least, most = min(self.table_counts), max(self.table_counts)
        paused = self.of_tables(LOCK, most, lambda one: one.paused)
        promise = f"{most:,} tables locked in less than {LOCKED:g} s on an idle server, checkpoints and all"
        yield Target(promise, paused.text(), paused.median < LOCKED)
        beyond = Spread.of(
            one.outage.unaccounted * 1000
            for one in self.many
            if one.procedure == LOCK and one.tables == least and one.outage.unaccounted is not None
        )
        busy = Spread.of(
            o.unaccounted * 1000 for o in self.outages if o.procedure == LOCK and o.unaccounted is not None
        )
        yield Target(
            f"a block with strategy=lock, from the first write that waits to the first that goes on: all but drain, "
            f"checkpoint and snapshot less than {BEYOND * 1000:g} ms",
            f"{beyond.text(0, ' ms')}; under the load {busy.text(0, ' ms')}",
            beyond.median < BEYOND * 1000,
        )

    def _write_gap_targets(self) -> Iterable[Target]:
        # The strategy lock has a stricter limit of its own.
        for procedure in (name for name in self.ours if name != LOCK):
            over = [
                o.write_gap - o.write_bound
                for o in self.outages
                if o.procedure == procedure and o.write_bound is not None
            ]
            beyond = Spread.of(over)
            yield Target(
                f"write gap at most open transaction + final checkpoint + snapshot + {WRITE_GAP_MARGIN} s, {procedure}",
                f"{beyond.median:+.2f} s beyond those three ({beyond.least:+.2f} to {beyond.most:+.2f})",
                beyond.median <= WRITE_GAP_MARGIN,
            )


def table(results: Results) -> Sequence[tuple[str, ...]]:
    """Return the outages as rows of text, the headings first."""
    rows = [
        ("procedure", "3 s transactions", "write gap", "median client's", "read gap", "client errors", "sessions ended")
    ]
    for long in results.loads:
        for procedure in results.procedures:

            def figure(what: Callable[[Outage], float], digits: int = 2, unit: str = " s") -> str:
                return results.spread(procedure, long, what).text(digits, unit)  # noqa: B023 - called at once

            rows.append(
                (
                    procedure,
                    "yes" if long else "no",
                    figure(lambda o: o.write_gap),
                    figure(lambda o: o.client_write_gap),
                    figure(lambda o: o.read_gap),
                    figure(lambda o: o.errors, 0, ""),
                    figure(lambda o: o.sessions_ended, 0, ""),
                )
            )
    return rows


def drain_table(results: Results) -> Sequence[tuple[str, ...]]:
    """Return the drains as rows of text, the headings first."""
    drained = results.drained_throughout
    rows = [
        (str(count), *(results.drained(name, count).text() for name in drained)) for count in results.session_counts
    ]
    return [("idle sessions", *drained), *rows]


def written_table(results: Results) -> Sequence[tuple[str, ...]]:
    """Return what the server wrote for one pause and resume as rows of text, the headings first."""
    rows: list[tuple[str, ...]] = [("procedure", "WAL", "rows of catalogs", "rows of the journal")]
    for procedure in results.procedures:
        found = [drain.written for drain in results.drains if drain.procedure == procedure]
        if found:
            rows.append(
                (
                    procedure,
                    Spread.of(written.wal / 1024 for written in found).text(1, " kB"),
                    Spread.of(written.catalogs for written in found).text(0, ""),
                    Spread.of(written.journal for written in found).text(0, ""),
                )
            )
    return rows


def tables_table(results: Results) -> Sequence[tuple[str, ...]]:
    """Return what the number of tables does as rows of text, the headings first."""
    rows: list[tuple[str, ...]] = [("tables", "procedure", "paused in", "of this, drain", "write gap", "read gap")]
    for count in results.table_counts:
        for procedure in dict.fromkeys(one.procedure for one in results.many):
            figures: tuple[Callable[[Many], float], ...] = (
                lambda one: one.paused,
                lambda one: one.drain,
                lambda one: one.outage.write_gap,
                lambda one: one.outage.read_gap,
            )
            texts = [results.of_tables(procedure, count, figure).text() for figure in figures]
            rows.append((f"{count:,}", procedure, *texts))
    return rows


def strategies_table(results: Results) -> Sequence[tuple[str, ...]]:
    """Return the medians for the page that compares the strategies, the headings first; other loads in brackets."""
    rows: list[tuple[str, ...]] = [
        ("", "write gap", "read gap", "client errors", "sessions ended", "WAL", "rows of catalogs")
    ]
    figures: tuple[tuple[Callable[[Outage], float], str, str], ...] = (
        (lambda o: o.write_gap, ".2f", " s"),
        (lambda o: o.read_gap, ".2f", " s"),
        (lambda o: o.errors, ",.0f", ""),
        (lambda o: o.sessions_ended, ",.0f", ""),
    )
    for procedure in results.procedures:
        cells = []
        for what, form, unit in figures:
            least, *more = (f"{results.spread(procedure, long, what).median:{form}}{unit}" for long in results.loads)
            cells.append(" ".join([least, *(f"({one})" for one in more)]))
        written = [drain.written for drain in results.drains if drain.procedure == procedure]
        rows.append(
            (
                procedure,
                *cells,
                f"{median(one.wal for one in written) / 1024:.0f} kB",
                f"{median(one.catalogs for one in written):.0f}",
            )
        )
    return rows
