"""``make bench``: measure every procedure under the same load in the same run, print, draw, and check the targets."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track
from rich.table import Table

from benchmarks.picture import draw
from benchmarks.procedures import APPLICATION, BLOCKS, PgFreeze, Pooler, procedures
from benchmarks.results import Results, Target, drain_table, strategies_table, table, tables_table, written_table
from benchmarks.rounds import LONG_TRANSACTION, READERS, SNAPSHOT, WRITERS, Drain, Outage, drain, outage, start_server
from benchmarks.tables import CLIENTS, TABLES
from benchmarks.tables import measure as measure_tables
from devtools.binaries import CHECKOUT, BinariesMissing
from devtools.pgbouncer import PgBouncer
from devtools.pgserver import Server
from devtools.rights import FREEZER
from pg_freeze import Admit

#: Between these stands what was measured, in docs/strategies.md.
MEASURED = ("<!-- measured:begin -->", "<!-- measured:end -->")
IDLE_SESSIONS = (50, 200, 500)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of every measurement (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="one round with few clients: shows that it runs, proves nothing"
    )
    parser.add_argument(
        "--output", type=Path, help="where benchmarks.md and img/ go (default: docs; with --quick build/bench)"
    )
    parser.add_argument("--remark", default="", help="a sentence on the circumstances, for the page")
    options = parser.parse_args(arguments)
    output = options.output or CHECKOUT / ("build/bench" if options.quick else "docs")
    console = Console() if sys.stdout.isatty() else Console(width=140)
    results = measure(console, quick=options.quick, rounds=1 if options.quick else options.rounds)
    targets = results.targets(readers=_readers(results))
    show(console, results, targets)
    (output / "img").mkdir(parents=True, exist_ok=True)
    draw(results, output / "img/benchmarks.svg")
    (output / "benchmarks.md").write_text(markdown(results, targets, options.remark))
    strategies = output / "strategies.md"
    if strategies.exists():
        strategies.write_text(replaced(strategies.read_text(), measured(results)))
    console.print(f"Written: {output / 'benchmarks.md'}, {output / 'img/benchmarks.svg'}", soft_wrap=True)
    return 0 if options.quick or all(target.kept for target in targets) else 1


def measure(console: Console, *, quick: bool, rounds: int) -> Results:
    """Measure everything *rounds* times, in turn, so that what disturbs the machine disturbs all procedures alike."""
    clients = (4, 2) if quick else (WRITERS, READERS)
    counts = (5, 10) if quick else IDLE_SESSIONS
    loads = (False,) if quick else (False, True)
    tables = (5, 50) if quick else TABLES
    outages: list[Outage] = []
    drains: list[Drain] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        start_server() as server,
        in_front(server, console) as pgbouncer,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        every = procedures(server, pgbouncer)
        # Which readers are admitted makes no difference to idle sessions: these are measured for what they write.
        idle = [
            (procedure, count)
            for count in counts
            for procedure in every
            if count == counts[0] or not isinstance(procedure, PgFreeze) or procedure is every[1]
        ]
        task = progress.add_task("starting", total=rounds * (len(loads) * len(every) + len(idle)))
        for _ in range(rounds):
            for long in loads:
                for procedure in every:
                    progress.update(task, description=procedure.name + (", with 3 s transactions" if long else ""))
                    outages.append(outage(procedure, long_transaction=long, clients=clients))
                    progress.advance(task)
            for procedure, count in idle:
                progress.update(task, description=f"{procedure.name}, {count} idle sessions")
                drains.append(drain(server, procedure, count))
                progress.advance(task)
        where = _where(server)
    total = rounds * len(tables) * (1 + len(BLOCKS))
    many = track(measure_tables(tables, rounds), "many tables", total, console=console, transient=True)
    return Results(tuple(outages), tuple(drains), tuple(many), where, rounds, clients)


@contextmanager
def in_front(server: Server, console: Console) -> Iterator[PgBouncer | None]:
    """Have a PgBouncer in front of *server*, or say that it is left out."""
    try:
        # As many server sessions as there are clients, so that nobody waits for one.
        pgbouncer = PgBouncer(server, [FREEZER, APPLICATION], pool_mode="transaction", pool_size=WRITERS + READERS + 1)
    except BinariesMissing as error:
        console.print(f"{Pooler.name} is left out: {error}", soft_wrap=True)
        yield None
        return
    with pgbouncer:
        yield pgbouncer


def _where(server: Server) -> str:
    version = server.execute("SHOW server_version")[0][0].split()[0]
    return f"PostgreSQL {version}, fsync on, SCRAM passwords, loopback, {os.cpu_count()} cores shared with the clients"


def _readers(results: Results) -> str:
    wanted = f"admit={Admit.READERS.value}"
    return next(name for name in results.procedures if name.endswith(wanted))


def show(console: Console, results: Results, targets: Sequence[Target]) -> None:
    """Print tables, ratios and targets."""
    for title, rows in (
        ("Outage", table(results)),
        ("Drain", drain_table(results)),
        ("Written", written_table(results)),
        ("Tables", tables_table(results)),
    ):
        shown = Table(*rows[0], title=f"{title}: median of {results.rounds} round(s), least and most in brackets")
        for row in rows[1:]:
            shown.add_row(*row)
        console.print(shown)
    for line in ratios(results):
        console.print(line)
    for target in targets:
        console.print(f"[bold]{'[green]PASS' if target.kept else '[red]FAIL'}[/] {target.promise}: {target.measured}")


def ratios(results: Results) -> list[str]:
    """Return how much shorter the gaps are than the reference's, a line for each other procedure."""
    lines = []
    for procedure in results.procedures[1:]:
        for long in results.loads:
            said = []
            for name, what in (("write", lambda o: o.write_gap), ("read", lambda o: o.read_gap)):
                ours, theirs = (results.spread(p, long, what).median for p in (procedure, results.reference))
                said.append(f"{name} gap {theirs / ours:.1f} times shorter")
            load = "with 3 s transactions" if long else "short transactions"
            lines.append(f"{procedure}, {load}: {', '.join(said)} than the {results.reference}'s")
    return lines


def markdown(results: Results, targets: Sequence[Target], remark: str = "") -> str:
    """Return docs/benchmarks.md; what stands between the markers is fit for the README."""
    parts = [
        "# Benchmarks",
        "`make bench` writes this page. It runs the script that this product replaces (its inconsistent database names "
        "corrected, everything else as published), pg-freeze and, where it is installed, PgBouncer's PAUSE and RESUME "
        "(the application connects through it; the same checkpoints), in turn, on one server, under the same load: "
        f"{results.clients[0]} writers and {results.clients[1]} readers that reconnect as applications do, "
        f"and a stand-in of {SNAPSHOT} s for the snapshot. "
        f"{results.where}. Median of {results.rounds} rounds, least and most in brackets. {remark}".rstrip(),
        "A *gap* is the longest time in which no client of all completed a write, or a read; the *median client's* is "
        "the median of each client's own longest time between two committed writes.",
        "<!-- benchmarks:begin -->",
        "![Write gap, read gap and drain time beside those of the script](img/benchmarks.svg)",
        _markdown_table(table(results)),
        "<!-- benchmarks:end -->",
        "## Shorter by",
        "\n".join(f"- {line}" for line in ratios(results)),
        "## Drain",
        "How long it took to end sessions that do nothing, or to see that nobody is at work.",
        _markdown_table(drain_table(results)),
        "## Written",
        "What the server wrote for one pause and resume while the application did nothing. Nearly all of the WAL are "
        "whole pages, since each is written as a whole when it first changes after a checkpoint.",
        _markdown_table(written_table(results)),
        "## Tables",
        "A pause of a database with so many tables: all of it on an idle server, checkpoints included, and what "
        f"{CLIENTS[0]} writers and {CLIENTS[1]} readers notice, with a stand-in of {SNAPSHOT} s for the snapshot.",
        _markdown_table(tables_table(results)),
        "## Targets",
        _markdown_table(
            [("target", "measured", ""), *((t.promise, t.measured, "PASS" if t.kept else "**FAIL**") for t in targets)]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def measured(results: Results) -> str:
    """Return what docs/strategies.md says of the measurement."""
    said = (
        f"{results.clients[0]} writers and {results.clients[1]} readers, a snapshot of {SNAPSHOT} s, medians of "
        f"{results.rounds} rounds; in brackets with a client that holds transactions of {LONG_TRANSACTION:g} s. WAL "
        "and catalogs: what the server writes for one pause and resume while nobody works.\n"
        "[The whole table](benchmarks.md) has the ranges, databases with more tables, and the targets."
    )
    return f"{said}\n\n{_markdown_table(strategies_table(results))}"


def replaced(page: str, text: str) -> str:
    """Return *page* with *text* between its two markers."""
    before, begin, rest = page.partition(MEASURED[0])
    _, end, after = rest.partition(MEASURED[1])
    if not (begin and end):
        raise ValueError(f"the page has no {MEASURED[0]} and {MEASURED[1]}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
