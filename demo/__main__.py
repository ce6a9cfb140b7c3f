"""``make demo``: a busy application, and a copy of its rows and files that match, by way of a real Airflow."""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final
from urllib.parse import quote

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo import application, copies
from demo.check import Compared
from demo.picture import draw
from demo.story import MARGIN, Story
from devtools.binaries import CHECKOUT, client, temp_root
from devtools.load import Group, Load
from devtools.pgserver import Server, password
from devtools.rights import FREEZER, create_roles
from devtools.scheduler import Airflow, AirflowFailed, Task
from pg_freeze import history

DAG: Final = "local_snapshot"
RUN_WITHIN: Final = 300.0


class Screen:
    """Says what was done, and shows what is being done, with the application's pulse beside it."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._task = progress.add_task("", total=None, pulse="")
        self._load: Load | None = None
        self._seen = (0.0, 0, 0)
        self._started = time.monotonic()

    def watch(self, load: Load) -> None:
        """Show the pulse of this load from now on."""
        self._load = load

    def said(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(f"[dim]{time.monotonic() - self._started:6.1f} s[/]  {text}", highlight=False)

    def doing(self, text: str, nap: float = 0.1) -> None:
        """Show what is under way, for a moment."""
        now = time.monotonic()
        if self._load is not None and now - self._seen[0] >= 0.4:
            writes, reads = self._load.completed("write"), self._load.completed("read")
            since, w, r = self._seen
            pulse = f"{(writes - w) / (now - since):5.0f} writes/s {(reads - r) / (now - since):5.0f} reads/s"
            self._progress.update(self._task, pulse=pulse if since else "")
            self._seen = (now, writes, reads)
        self._progress.update(self._task, description=text)
        time.sleep(nap)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 1 unless everything was as it claims."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=CHECKOUT / "demo-out", help="where the picture goes (default: demo-out)"
    )
    options = parser.parse_args(arguments)
    # Clean up as after Ctrl-C when ended by others.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    os.umask(0o022)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("[cyan]{task.fields[pulse]}"),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            story, without, frozen = perform(Screen(console, progress))
    except KeyboardInterrupt:
        console.print("Interrupted; everything that was started is gone again.")
        return 130
    except AirflowFailed as error:
        console.print(str(error), markup=False)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "freeze.png"
    draw(story, picture)
    return report(console, story, without, frozen, picture)


def perform(screen: Screen) -> tuple[Story, Compared, Compared]:
    """Do it all, and return what happened, and how the copies without and with a freeze compare with their files."""
    with ExitStack() as stack:
        work = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="pgf-demo-", dir=temp_root(), ignore_cleanup_errors=True)
            )
        )
        work.chmod(0o711)
        files = work / "files"
        files.mkdir()
        screen.doing("starting PostgreSQL")
        server = stack.enter_context(Server(18, settings={"fsync": True}))
        create_roles(server)
        server.create_role(copies.REPLICATION, "LOGIN REPLICATION")
        dsn = application.create(server, files)
        screen.said(f"PostgreSQL 18 on 127.0.0.1:{server.port}, with a database of documents and a file for each")
        metadata = stack.enter_context(Server(18))
        airflow = stack.enter_context(_airflow(server, metadata, work, files))
        # As much as leaves room for an Airflow on two cores.
        writers = Group("write", 6, application.write, pause=0.05, settings=str(files))
        load = Load(dsn, [writers, Group("read", 4, application.read)])
        with load:
            screen.watch(load)
            screen.said("6 clients create, replace and delete documents, 4 read; they stop for nothing")

            copies.copy_without_freeze(
                server, files, work / "without", lambda: screen.doing("copying without a freeze")
            )
            with copies.started(work / "without") as copy:
                without = copies.compared(copy, work / "without")
            screen.said(f"Copied rows and files [bold]without a freeze[/]: {described(without)}")

            screen.said("Airflow starts, which takes half a minute on a fast machine")
            airflow.start(DAG, lambda what: screen.doing(f"starting Airflow: {what}"))
            screen.said(f"Airflow on 127.0.0.1:{airflow.port}: API server, scheduler and DAG processor")
            time.sleep(1)
            run, tasks = _run(airflow, screen)
            screen.said(f"Airflow ran {DAG}: " + ", ".join(task.rpartition(".")[2] for task in tasks))
            until = time.monotonic() + MARGIN + 0.5
            while time.monotonic() < until:
                screen.doing("watching the application go on")

        (freeze,) = history(server.connect_factory(FREEZER), limit=1)
        story = Story.of(load.recorded, freeze, [tasks[name] for name in ("frozen.cluster", "frozen.files")])
        target = work / "copies" / run
        screen.doing("checking the copy")
        with copies.started(target) as copy:
            frozen = copies.compared(copy, target)
            asleep = not copies.writable(copy)
            copy.execute("CALL pgfreeze.thaw_all()")
            awake = copies.writable(copy)
        screen.said(f"Copied rows and files [bold]with the freeze[/]: {described(frozen)}")
        if not (asleep and awake):
            raise AirflowFailed("the copy should have come up read-only, and writable once thawed")
        screen.said("The copy came up frozen, as it was taken; CALL pgfreeze.thaw_all() made it writable")
    return story, without, frozen


def _airflow(server: Server, metadata: Server, work: Path, files: Path) -> Airflow:
    dags = work / "dags"
    dags.mkdir()
    (dags / f"{DAG}.py").symlink_to(CHECKOUT / f"dags/{DAG}.py")
    uri = "postgres://{}:{}@127.0.0.1:{}/{}"
    return Airflow(
        metadata,
        workspace=work,
        dags=dags,
        connections={
            "postgres_default": uri.format(
                FREEZER, quote(password(FREEZER), safe=""), server.port, application.DATABASE
            ),
            "postgres_replication": uri.format(
                copies.REPLICATION, quote(password(copies.REPLICATION), safe=""), server.port, ""
            ),
        },
        variables={"snapshot_files": str(files), "snapshot_target": str(work / "copies")},
        path=client("pg_basebackup", 18).parent,
    )


def _run(airflow: Airflow, screen: Screen) -> tuple[str, dict[str, Task]]:
    run = airflow.trigger(DAG)
    deadline = time.monotonic() + RUN_WITHIN
    while (state := airflow.state(DAG, run)) not in {"success", "failed"} and time.monotonic() < deadline:
        tasks = airflow.tasks(DAG, run)
        running = [name.rpartition(".")[2] for name, task in tasks.items() if task.state == "running"]
        screen.doing(f"Airflow runs {DAG}: {', '.join(running)}")
    tasks = airflow.tasks(DAG, run)
    if state != "success":
        raise AirflowFailed(
            f"the run is {state}: {[(name, task.state) for name, task in tasks.items()]}\n{airflow.logs()}"
        )
    return run, tasks


def described(compared: Compared) -> str:
    """Return a comparison in words."""
    if not compared.mismatches:
        return (
            f"[bold green]all {compared.rows:,} rows match their files, and all {compared.files:,} files their rows[/]"
        )
    return (
        f"[bold red]{compared.mismatches:,} mismatches[/]: {compared.without_file} rows without their file, "
        f"{compared.without_row} files without a row, {compared.different} files with other content"
    )


def report(console: Console, story: Story, without: Compared, frozen: Compared, picture: Path) -> int:
    """Print timeline, figures and checks."""
    table = Table("s", "", title="The freeze, in seconds after the last write", title_justify="left", show_header=False)
    for after, said in story.timeline():
        table.add_row(f"{after:.2f}", said)
    console.print(table)
    for name, figure in story.figures():
        console.print(f"{name}: [bold]{figure}[/]", highlight=False)
    checks = story.checks(without, frozen)
    for claim, kept in checks:
        console.print(f"{'[green]ok  [/]' if kept else '[bold red]NOT [/]'} {claim}", highlight=False)
    console.print(f"Picture: {picture}", soft_wrap=True, highlight=False)
    console.print("The DAG that ran: dags/local_snapshot.py. One of your own: docs/airflow.md", highlight=False)
    return 0 if all(kept for _, kept in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
