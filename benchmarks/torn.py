"""How many copies of two volumes are torn, without a freeze and with one: ``python -m benchmarks.torn``.

Two volumes are snapshotted one after the other, as by two commands or two API calls, while an application writes. Needs
root, loop devices and btrfs-progs: the volumes are real btrfs file systems.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import uuid4

import matplotlib as mpl
import psycopg
from rich.console import Console
from rich.progress import track
from rich.table import Table

mpl.use("svg")
from matplotlib import patches as mpatches
from matplotlib import pyplot as plt

from devtools import volumes
from devtools.binaries import CHECKOUT
from devtools.load import Client, Group, Load
from devtools.pgserver import SUPERUSER, Server, ServerFailed
from devtools.rights import create_application_database, create_roles
from pg_freeze import FreezeRequest, pause, resume
from pg_freeze.volumes import Naming, Volume, delete_snapshots, snapshot_volumes
from pg_freeze.volumes.commands import Commands

DATABASE: Final = "app"
ACCOUNTS: Final = 100_000
BALANCE: Final = 100
#: Seconds between the two snapshots. EBS wants 15 between two of one volume; two API calls are rarely closer than this.
GAP: Final = 0.5
CLIENTS: Final = 4


def photos(conn: psycopg.Connection[Any], client: Client) -> None:
    """Upload a photo: the file first, then its row; and delete one: the row first. So each row has its file."""
    files = Path(client.settings)
    number = int(time.monotonic_ns()) * 100 + client.number
    (files / str(number)).write_bytes(os.urandom(512))
    conn.execute("INSERT INTO photos VALUES (%s)", (number,))
    gone = conn.execute(
        """DELETE FROM photos WHERE id = (SELECT id FROM photos WHERE id %% 100 = %s ORDER BY id OFFSET 50 LIMIT 1)
           RETURNING id""",
        (client.number,),
    ).fetchone()
    if gone is not None:
        (files / str(gone[0])).unlink()


def transfers(conn: psycopg.Connection[Any], client: Client) -> None:
    """Move money between accounts: what they have together never changes."""
    with conn.transaction():
        for sign in (-1, 1):
            conn.execute(
                "UPDATE accounts SET balance = balance + %s WHERE id = %s", (sign, client.random.randrange(ACCOUNTS))
            )


class Case(Protocol):
    """Two volumes, an application on them, and what must hold in every copy."""

    name: str
    volumes: tuple[Path, Path]
    server: Server

    def group(self) -> Group:
        """Return the application."""

    def torn(self, first: Path, second: Path) -> str | None:
        """Return what is wrong with a copy, or None; its two parts are writable, and in the order of the volumes."""


class FilesCase:
    """The cluster on one volume, the files that its rows refer to on another."""

    name = "rows, and the files they refer to"

    def __init__(self, stack: ExitStack) -> None:
        data, files = (stack.enter_context(volumes.btrfs("it")) / "it" for _ in range(2))
        self.volumes = (data, files)
        (files / "files").mkdir()
        self.server = stack.enter_context(Server(data=data / "cluster", settings={"fsync": True}))
        prepare(self.server, "CREATE TABLE photos (id bigint PRIMARY KEY)")

    def group(self) -> Group:
        """Return the application."""
        return Group("photos", CLIENTS, photos, pause=0.002, settings=str(self.volumes[1] / "files"))

    def torn(self, first: Path, second: Path) -> str | None:
        """Look for rows whose file is missing."""
        with Server(data=first / "cluster") as copy:
            rows = {str(row[0]) for row in copy.execute("SELECT id FROM photos", DATABASE)}
        missing = rows - {path.name for path in (second / "files").iterdir()}
        return f"{len(missing)} of {len(rows)} rows without their file" if missing else None


class WalCase:
    """The cluster on one volume, its ``pg_wal`` on another."""

    name = "the cluster, and its pg_wal"

    def __init__(self, stack: ExitStack) -> None:
        data, wal = (stack.enter_context(volumes.btrfs("it", size="4G")) / "it" for _ in range(2))
        self.volumes = (data, wal)
        # Few buffers, so that pages reach the volume soon, as they do on a server that works on more than its memory.
        settings: dict[str, str | int | bool] = {
            "fsync": True,
            "shared_buffers": "1MB",
            "checkpoint_timeout": "30s",
            "max_wal_size": "64MB",
        }
        server = Server(data=data / "cluster", settings=settings)
        shutil.copystat(data / "cluster", wal)
        subprocess.run(["mv", str(data / "cluster/pg_wal"), str(wal / "pg_wal")], check=True)
        owner = (data / "cluster").stat()
        os.chown(wal, owner.st_uid, owner.st_gid)
        (data / "cluster/pg_wal").symlink_to(wal / "pg_wal")
        self.server = stack.enter_context(server)
        prepare(
            self.server,
            "CREATE TABLE accounts (id int PRIMARY KEY, balance int NOT NULL)",
            f"INSERT INTO accounts SELECT i, {BALANCE} FROM generate_series(0, {ACCOUNTS - 1}) i",
        )
        self.server.execute("CREATE EXTENSION amcheck", DATABASE)

    def group(self) -> Group:
        """Return the application."""
        return Group("transfers", CLIENTS, transfers, pause=0.0)

    def torn(self, first: Path, second: Path) -> str | None:
        """Start a server on the copy, and add up what the accounts have."""
        link = first / "cluster/pg_wal"
        link.unlink()
        link.symlink_to(second / "pg_wal")
        try:
            with Server(data=first / "cluster") as copy:
                # In a torn copy a row may belong to a transaction yet to come, and waiting for it has no end.
                inside = copy.connect_factory(SUPERUSER, DATABASE, options="-c statement_timeout=20s")
                with inside() as conn:
                    ((total, accounts),) = conn.execute("SELECT sum(balance), count(*) FROM accounts").fetchall()
                    conn.execute("SELECT bt_index_check('accounts_pkey', true)")
                copy.execute("CALL pgfreeze.thaw_all()")
                # Writes every page: one that is newer than the WAL cannot be.
                with inside() as conn:
                    conn.execute("UPDATE accounts SET balance = balance")
        except ServerFailed:
            return "the server does not start"
        except psycopg.Error as error:
            return f"the server says: {str(error).splitlines()[0]}"
        wrong = total - ACCOUNTS * BALANCE
        return None if not wrong and accounts == ACCOUNTS else f"the accounts are {wrong:+d} off"


def prepare(server: Server, *statements: str) -> None:
    """Start a server with the application's database in it."""
    server.start()
    create_roles(server)
    create_application_database(server, DATABASE)
    # The journal is there before the first freeze, so that each copy can be thawed in the same way.
    freeze(server)
    resume(server.connect_factory(), databases=[DATABASE], holder="bench")
    with psycopg.connect(server.dsn(DATABASE, "app"), autocommit=True) as conn:
        for statement in statements:
            conn.execute(statement.encode())


def freeze(server: Server) -> None:
    """Freeze the application's database."""
    pause(server.connect_factory(), FreezeRequest.of([DATABASE], "bench", checkpoint=True))


@contextmanager
def frozen(case: Case, wanted: bool) -> Iterator[None]:
    """Freeze, if *wanted*."""
    if not wanted:
        yield
        return
    freeze(case.server)
    try:
        yield
    finally:
        resume(case.server.connect_factory(), databases=[DATABASE], holder="bench")


def copy(case: Case, *, with_freeze: bool, backwards: bool) -> str | None:
    """Make one copy of both volumes while the application works, and return what is wrong with it."""
    sources = [Volume.parse(f"btrfs:{path}") for path in case.volumes]
    naming = Naming(uuid4())
    commands = Commands(time.monotonic() + 120)
    made = {}
    with frozen(case, with_freeze):
        for number, source in enumerate(reversed(sources) if backwards else sources):
            if number:
                time.sleep(GAP)
            (made[source],) = snapshot_volumes([source], naming, commands)
    copies = [volumes.writable(Path(made[source].name), f"copy-{naming.token}") for source in sources]
    try:
        return case.torn(*copies)
    finally:
        delete_snapshots(made.values(), commands)
        for path in copies:
            subprocess.run(["btrfs", "subvolume", "delete", str(path)], check=True, capture_output=True)


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table."""

    case: str
    with_freeze: bool
    copies: int
    torn: tuple[str, ...]


def measure(copies: int, console: Console) -> list[Cell]:
    """Make *copies* copies in each way; which volume comes first takes turns."""
    cells = []
    cases: tuple[Callable[[ExitStack], Case], ...] = (FilesCase, WalCase)
    for make in cases:
        with ExitStack() as stack:
            case = make(stack)
            stack.enter_context(Load(case.server.dsn(DATABASE, "app"), [case.group()]))
            found: dict[bool, list[str]] = {False: [], True: []}
            for number in track(range(copies), case.name, console=console, transient=True):
                for with_freeze, wrong in found.items():
                    time.sleep(0.5)
                    said = copy(case, with_freeze=with_freeze, backwards=number % 2 == 1)
                    if said is not None:
                        wrong.append(said)
            cells += [Cell(case.name, with_freeze, copies, tuple(wrong)) for with_freeze, wrong in found.items()]
    return cells


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw each copy as a square: torn ones are red."""
    with plt.rc_context({"svg.hashsalt": "pg-freeze", "font.size": 9, "font.family": "DejaVu Sans"}):
        figure, axes = plt.subplots(figsize=(8, 0.45 * len(cells) + 0.7), layout="constrained", facecolor="white")
        for y, cell in enumerate(cells):
            for x in range(cell.copies):
                colour = "#c8312b" if x < len(cell.torn) else "#1f5fa8"
                axes.add_patch(mpatches.Rectangle((x + 0.1, y + 0.15), 0.8, 0.7, color=colour))
            axes.text(cell.copies + 0.3, y + 0.5, f"{len(cell.torn)} of {cell.copies} torn", va="center")
        labels = [f"{cell.case}, {'frozen' if cell.with_freeze else 'not frozen'}" for cell in cells]
        axes.set_yticks([y + 0.5 for y in range(len(cells))], labels)
        axes.set_xlim(0, max(cell.copies for cell in cells) + 3.5)
        axes.set_ylim(len(cells), 0)
        axes.set_xticks([])
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def rows(cells: Sequence[Cell]) -> list[tuple[str, str, str, str]]:
    """Return the table's rows."""
    return [
        (
            cell.case,
            "frozen" if cell.with_freeze else "not frozen",
            f"{len(cell.torn)} of {cell.copies}",
            "; ".join(sorted(set(cell.torn))[:2]) or "-",
        )
        for cell in cells
    ]


def markdown(cells: Sequence[Cell]) -> str:
    """Return the page."""
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows(cells))
    return f"""# Torn copies of two volumes

Two btrfs volumes are snapshotted one after the other, {GAP:g} s apart, while {CLIENTS} clients write. Which volume
comes first takes turns. Each copy is then examined on its own: a server is started on it.

- *Rows, and the files they refer to*: the application writes a file before its row, and deletes the row before its
  file, so that at any moment each row has its file. A copy is torn if one has not.
- *The cluster, and its pg_wal*: transfers between {ACCOUNTS:,} accounts. A copy is torn if the server does not start
  on it, if what the accounts have together has changed, or if an index does not match its table.

![Each copy as a square](img/torn.svg)

| volumes | database | torn | for instance |
|---|---|---|---|
{lines}

`python -m benchmarks.torn` measures it again, as root on a machine with loop devices and btrfs-progs; it fails if
a copy is torn in spite of the freeze. Snapshots of one moment over all volumes, such as EBS's CreateSnapshots of one
instance, are not torn in this way either; they are for volumes of one instance, on one provider, only.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the page; return 1 if a frozen copy is torn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torn", description=__doc__)
    parser.add_argument("--copies", type=int, default=20, help="in each way (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "docs", help="where torn.md and img/ go")
    options = parser.parse_args(arguments)
    if volumes.missing():
        print(f"This needs real volumes: {volumes.missing()}", file=sys.stderr)
        return 2
    console = Console() if sys.stdout.isatty() else Console(width=140)
    cells = measure(options.copies, console)
    table = Table("volumes", "database", "torn", "for instance")
    for row in rows(cells):
        table.add_row(*row)
    console.print(table)
    (options.output / "img").mkdir(parents=True, exist_ok=True)
    draw(cells, options.output / "img/torn.svg")
    (options.output / "torn.md").write_text(markdown(cells))
    return 1 if any(cell.torn for cell in cells if cell.with_freeze) else 0


if __name__ == "__main__":
    sys.exit(main())
