"""What task hops add to an outage: ``python -m benchmarks.airflow`` freezes in four tasks, and in one, with Airflow."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.procedures import APPLICATION, DATABASE
from benchmarks.results import BEYOND, Spread, Target
from benchmarks.rounds import SNAPSHOT, look, start_server, transfer
from benchmarks.tables import CLIENTS, NAP
from devtools.binaries import CHECKOUT, client, temp_root
from devtools.load import Group, Load
from devtools.pgserver import Server, password
from devtools.rights import FREEZER
from devtools.scheduler import Airflow, AirflowFailed
from pg_freeze import history
from pg_freeze.strategies import named

#: The DAGs, and what they are called.
FORMS: Final = {
    "four_tasks": "four tasks: pg_frozen",
    "one_task_read-only": "one task: @task.pg_frozen, strategy=read-only",
    "one_task_lock": "one task: @task.pg_frozen, strategy=lock",
    "hook": "one task: PgFreezeHook.frozen(), strategy=lock",
}
#: The forms that are held to the target.
SWIFT: Final = ("one_task_lock", "hook")
RUN_WITHIN: Final = 120.0
CALM: Final = 1.0
_CHECKPOINT: Final = re.compile(r"duration: ([\d.]+) ms  statement: CHECKPOINT$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Run:
    """What the application noticed of one run. Times in seconds.

    :param drain: how long the freeze waited for those who were at work, or ended them.
    """

    form: str
    write_gap: float
    read_gap: float
    errors: int
    drain: float
    final_checkpoint: float

    @property
    def beyond(self) -> float:
        """How much longer nobody could write than drain, final checkpoint and snapshot took."""
        return self.write_gap - self.drain - self.final_checkpoint - SNAPSHOT


def measure(rounds: int, console: Console) -> list[Run]:
    """Run every form *rounds* times, in turn."""
    with ExitStack() as stack:
        columns = TextColumn("{task.description}"), TimeElapsedColumn()
        progress = stack.enter_context(Progress(*columns, console=console, transient=True))
        task = progress.add_task("starting PostgreSQL", total=None)
        work = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="pgf-bench-", dir=temp_root(), ignore_cleanup_errors=True)
            )
        )
        server = stack.enter_context(start_server())
        # The only place where the time of a checkpoint stands, whoever asked for it.
        server.execute(f"ALTER ROLE {FREEZER} SET log_min_duration_statement = 0")
        uri = f"postgres://{FREEZER}:{quote(password(FREEZER), safe='')}@127.0.0.1:{server.port}/{DATABASE}"
        airflow = stack.enter_context(
            Airflow(
                stack.enter_context(Server(18)),
                workspace=work,
                dags=CHECKOUT / "benchmarks/dags",
                connections={"application": uri},
                variables={},
                path=client("psql", 18).parent,
            )
        )
        airflow.start(next(iter(FORMS)), lambda what: progress.update(task, description=f"starting Airflow: {what}"))
        runs = []
        for number in range(rounds + 1):
            for form, name in FORMS.items():
                progress.update(task, description=f"{name}, {number} of {rounds}")
                run = one(server, airflow, form)
                # The first of all installs the journal, and finds an API server that has yet to load half of itself.
                if number:
                    runs.append(run)
        return runs


def one(server: Server, airflow: Airflow, form: str) -> Run:
    """Run one form under a small load."""
    groups = [Group("write", CLIENTS[0], transfer, pause=NAP), Group("read", CLIENTS[1], look, pause=NAP)]
    logged = server.log.stat().st_size
    with Load(server.dsn(DATABASE, APPLICATION), groups) as load:
        begin = time.monotonic()
        time.sleep(CALM)
        run = airflow.trigger(form)
        deadline = time.monotonic() + RUN_WITHIN
        while (state := airflow.state(form, run)) not in {"success", "failed"} and time.monotonic() < deadline:
            time.sleep(0.1)
        if state != "success":
            raise AirflowFailed(f"the run of {form} is {state}\n{airflow.logs()}")
        time.sleep(CALM)
        end = time.monotonic()
    (freeze,) = history(server.connect_factory(FREEZER), limit=1)
    since = freeze.barrier_at if named(freeze.strategy).outlives else freeze.requested_at
    assert since is not None
    assert freeze.drained_at is not None
    with server.log.open(errors="replace") as log:
        log.seek(logged)
        checkpoints = _CHECKPOINT.findall(log.read())
    return Run(
        form,
        load.recorded.gap("write", begin, end).seconds,
        load.recorded.gap("read", begin, end).seconds,
        load.recorded.errors(begin, end),
        (freeze.drained_at - since).total_seconds(),
        float(checkpoints[-1]) / 1000,
    )


def targets(runs: Sequence[Run]) -> list[Target]:
    """Return each target and whether it was met."""
    found = []
    for form in SWIFT:
        beyond = Spread.of(run.beyond * 1000 for run in runs if run.form == form)
        promise = f"all but drain, checkpoint and snapshot less than {BEYOND * 1000:g} ms, {FORMS[form]}"
        found.append(Target(promise, beyond.text(0, " ms"), beyond.median < BEYOND * 1000))
    return found


def rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Return the table's rows, the headings first."""
    found: list[tuple[str, ...]] = [
        ("form", "write gap", "drain", "final checkpoint", "all else but the snapshot", "read gap", "client errors")
    ]
    for form, name in FORMS.items():
        ours = [run for run in runs if run.form == form]
        found.append(
            (
                name,
                Spread.of(run.write_gap for run in ours).text(),
                Spread.of(run.drain for run in ours).text(3),
                Spread.of(run.final_checkpoint for run in ours).text(3),
                Spread.of(run.beyond for run in ours).text(3),
                Spread.of(run.read_gap for run in ours).text(),
                Spread.of(run.errors for run in ours).text(0, ""),
            )
        )
    return found


def markdown(runs: Sequence[Run], kept: Sequence[Target], rounds: int, remark: str = "") -> str:
    """Return the page."""
    heading, *body = rows(runs)
    lines = "\n".join(f"| {' | '.join(row)} |" for row in [heading, tuple("---" for _ in heading), *body])
    verdicts = "\n".join(f"| {t.promise} | {t.measured} | {'PASS' if t.kept else '**FAIL**'} |" for t in kept)
    circumstances = f"Median of {rounds} runs, least and most in brackets.\n{remark}".rstrip()
    return f"""# What task hops cost

The same freeze as [four tasks](airflow.md) (pause, checkpoint, snapshot, resume) and as [one](taskflow.md), run by a
real Airflow with LocalExecutor whose scheduler looks for work every 0.05 s, around a stand-in of {SNAPSHOT} s for the
snapshot, while {CLIENTS[0]} clients write and {CLIENTS[1]} read. {circumstances}

{lines}

| target | measured | |
|---|---|---|
{verdicts}

`python -m benchmarks.airflow` measures it again.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the page; return 1 if a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.airflow", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of every form (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="one round: shows that it runs, and fails for no missed target"
    )
    parser.add_argument("--output", type=Path, help="where hops.md goes (default: docs; with --quick build/bench)")
    parser.add_argument("--remark", default="", help="a sentence on the circumstances, for the page")
    options = parser.parse_args(arguments)
    output = options.output or CHECKOUT / ("build/bench" if options.quick else "docs")
    rounds = 1 if options.quick else options.rounds
    console = Console() if sys.stdout.isatty() else Console(width=140)
    runs = measure(rounds, console)
    heading, *body = rows(runs)
    table = Table(*heading, title=f"median of {rounds} run(s), least and most in brackets")
    for row in body:
        table.add_row(*row)
    console.print(table)
    kept = targets(runs)
    for target in kept:
        console.print(f"[bold]{'[green]PASS' if target.kept else '[red]FAIL'}[/] {target.promise}: {target.measured}")
    output.mkdir(parents=True, exist_ok=True)
    (output / "hops.md").write_text(markdown(runs, kept, rounds, options.remark))
    console.print(f"Written: {output / 'hops.md'}", soft_wrap=True)
    return 0 if options.quick or all(target.kept for target in kept) else 1


if __name__ == "__main__":
    sys.exit(main())
