"""One scenario: a database of its own, a run of a DAG, and what a person or a crash does to it."""

from __future__ import annotations

import itertools
import json
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Self

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from tests.e2e.processes import SLOWNESS, Airflow, eventually

#: How long anything may take on a busy machine.
PATIENCE: Final = 120 * SLOWNESS
#: A lease that a test waits for: long enough to get from the pause to the snapshot.
SHORT_LEASE: Final = 30 * SLOWNESS
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Row:
    """What the table says about one scenario."""

    event: str
    wiring: str
    writable: str
    run: str
    snapshot: str


class Scene:
    """A run of a DAG on a database of its own.

    :param dag_id: of ``dags/freezes.py``.
    :param event: what happens, in the words of the table.
    :param conf: the run's configuration, beside database and stage.
    """

    def __init__(self, airflow: Airflow, superuser: str, app: str, dag_id: str, event: str, **conf: Any) -> None:
        self.airflow, self.superuser, self.app = airflow, superuser, app
        self.dag_id, self.event = dag_id, event
        self.run_id = f"scene_{os.getpid()}_{next(_numbers)}"
        self.database = conf.pop("database", self.run_id)
        # A freeze by privileges is journalled in the database itself.
        self.journal = self.database if dag_id.startswith("privileges") else "postgres"
        self.stage = airflow.home / self.run_id
        self.stage.mkdir()
        self.happened: datetime | None = None
        self.since = ""
        self.conf = {
            "lease": 600 * SLOWNESS,
            "drain_timeout": 5,
            "on_drain_timeout": "terminate",
            "reader_grace": 0,
            **conf,
        }
        self._open: list[psycopg.Connection[Any]] = []
        if self.database != self.run_id:
            return
        with psycopg.connect(superuser, autocommit=True) as conn:
            conn.execute(sql.SQL("CREATE DATABASE {} OWNER app_owner").format(sql.Identifier(self.database)))
        with psycopg.connect(superuser, dbname=self.database, autocommit=True) as conn:
            conn.execute("CREATE TABLE written (at timestamptz DEFAULT clock_timestamp())")
            # Of the role whose member the freezer is: who locks a table needs a right on it.
            conn.execute("ALTER TABLE written OWNER TO app_owner")
            conn.execute("GRANT SELECT, INSERT ON written TO app")
            if self.journal == self.database:
                # Other scenes write to the same server meanwhile: only the WAL tells that nobody wrote here.
                conn.execute("CREATE EXTENSION pg_walinspect SCHEMA pg_catalog")
                conn.execute("GRANT EXECUTE ON FUNCTION pg_get_wal_block_info, pg_get_wal_records_info TO freezer")

    def close(self) -> None:
        """Let go of the database."""
        for conn in self._open:
            conn.close()

    # -- what goes on in the application

    def session(self) -> psycopg.Connection[Any]:
        """Return an autocommit session of the application's."""
        conn: psycopg.Connection[Any] = psycopg.connect(self.app, dbname=self.database, autocommit=True)
        self._open.append(conn)
        return conn

    def writer_in_transaction(self) -> psycopg.Connection[Any]:
        """Return a session with an open transaction, for which a pause waits as long as its drain timeout allows."""
        conn = self.session()
        conn.execute("BEGIN")
        conn.execute("INSERT INTO written DEFAULT VALUES")
        return conn

    def reader_at_work(self) -> psycopg.Connection[Any]:
        """Return a session with a long query, for which a resume waits as long as its reader grace allows."""
        conn = self.session()
        conn.pgconn.send_query(b"SELECT pg_sleep(300)")
        return conn

    def can_write(self) -> bool:
        """Whether a new session of the application's can write now."""
        try:
            options = "-c lock_timeout=300ms"
            with psycopg.connect(self.app, dbname=self.database, autocommit=True, options=options) as conn:
                conn.execute("INSERT INTO written DEFAULT VALUES")
        except (
            psycopg.errors.ReadOnlySqlTransaction,
            psycopg.errors.InsufficientPrivilege,
            psycopg.OperationalError,
        ):
            return False
        return True

    # -- what goes on in Airflow

    @property
    def path(self) -> str:
        """The run's REST path."""
        return f"/dags/{self.dag_id}/dagRuns/{self.run_id}"

    def id_of(self, task: str) -> str:
        """Return the task's id in this DAG."""
        return f"frozen.{task}" if self.dag_id.startswith("frozen") else task

    def start(self) -> Self:
        """Trigger the run."""
        conf = {**self.conf, "database": self.database, "stage": str(self.stage)}
        body = {"dag_run_id": self.run_id, "logical_date": None, "conf": conf}
        self.airflow.call("POST", f"/dags/{self.dag_id}/dagRuns", body)
        return self

    def order(self, what: str) -> None:
        """Tell the snapshot, this one and later ones, what to do."""
        unfinished = self.stage / "unfinished"
        unfinished.write_text(what)
        unfinished.rename(self.stage / "orders")

    def countermand(self) -> None:
        """Let the next snapshot wait again."""
        (self.stage / "orders").unlink()

    def found(self) -> list[str]:
        """Return what each snapshot so far found: ``frozen`` or ``writable``."""
        began = self.stage / "began"
        return began.read_text().split() if began.exists() else []

    def until_snapshot(self, count: int = 1) -> None:
        """Wait until the snapshot has begun."""
        eventually(lambda: len(self.found()) >= count or self.over(), f"snapshot {count} of {self}", PATIENCE)
        assert len(self.found()) >= count, f"{self} ended before its snapshot began"

    def until_draining(self) -> None:
        """Wait until the pause waits for a transaction."""
        eventually(lambda: [f for f in self.freezes() if f["barrier_at"]], f"the barrier of {self}", PATIENCE)

    def until(self, task: str, *states: str, tries: int = 1) -> None:
        """Wait until a task is in one of *states*."""

        def there() -> bool:
            ti = self.task(task)
            return ti["state"] in states and ti["try_number"] >= tries

        eventually(there, f"{task} of {self} to be {' or '.join(states)}", PATIENCE, every=0.3)

    def task(self, task: str) -> dict[str, Any]:
        """Return state, try_number and pid of a task."""
        return next(ti for ti in self.tasks() if ti["task_id"] == self.id_of(task))

    def tasks(self) -> list[dict[str, Any]]:
        """Return state, try_number and pid of each task."""
        return self.airflow.look(
            "SELECT task_id, state, try_number, pid FROM task_instance WHERE dag_id = %s AND run_id = %s",
            self.dag_id,
            self.run_id,
        )

    def states(self) -> dict[str, str | None]:
        """Return the state of each task."""
        return {ti["task_id"].rpartition(".")[2]: ti["state"] for ti in self.tasks()}

    def run_state(self) -> str:
        """Return the state of the run, which may be ``deleted``."""
        found = self.airflow.look(
            "SELECT state FROM dag_run WHERE dag_id = %s AND run_id = %s", self.dag_id, self.run_id
        )
        return found[0]["state"] if found else "deleted"

    def over(self) -> bool:
        """Whether the run has ended, with all its tasks."""
        if self.run_state() not in ("success", "failed"):
            return False
        return not set(self.states().values()) & {
            "running",
            "queued",
            "scheduled",
            "up_for_retry",
            "restarting",
            "deferred",
        }

    def event_now(self, since: str = "") -> None:
        """Note the time of the event, by the server's clock; *since* names it in the table, if it is not the event."""
        self.since = since
        with psycopg.connect(self.superuser, autocommit=True) as conn:
            row = conn.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        self.happened = row[0]

    def mark_run(self, state: str) -> None:
        """Mark the run failed or success, as a person does."""
        self.event_now()
        self.airflow.call("PATCH", self.path, {"state": state})

    def mark_task(self, task: str, state: str) -> None:
        """Mark a task failed or success, as a person does."""
        self.event_now()
        self.airflow.call("PATCH", f"{self.path}/taskInstances/{self.id_of(task)}", {"new_state": state})

    def clear(self, task: str, index: int | None = None) -> None:
        """Clear a task, or one index of it, and nothing up- or downstream of it, as a person does."""
        self.event_now()
        what = self.id_of(task) if index is None else [self.id_of(task), index]
        body = {"dry_run": False, "dag_run_id": self.run_id, "task_ids": [what], "only_failed": False}
        self.airflow.call("POST", f"/dags/{self.dag_id}/clearTaskInstances", body)

    def clear_failed(self) -> None:
        """Clear what failed in the run, as a person does."""
        self.event_now()
        self.airflow.call("POST", f"{self.path}/clear", {"dry_run": False, "only_failed": True})

    def pause_dag(self, paused: bool) -> None:
        """Pause the DAG, or let it go on."""
        if paused:
            self.event_now()
        self.airflow.call("PATCH", f"/dags/{self.dag_id}", {"is_paused": paused})

    def delete_run(self) -> None:
        """Delete the run, as a person does."""
        self.event_now()
        self.airflow.call("DELETE", self.path)

    def kill(self, task: str, *, supervisor: bool = False) -> int:
        """End a running task's process, or its supervisor alone, with SIGKILL; return the process of the task."""
        pid = int(eventually(lambda: self.task(task)["pid"], f"the process of {task}", PATIENCE))
        victim = _parent(pid) if supervisor else pid
        self.event_now()
        os.kill(victim, signal.SIGKILL)
        return pid

    # -- what became of it

    def freezes(self) -> list[dict[str, Any]]:
        """Return the freezes of this database, as the journal has them, oldest first."""
        with psycopg.connect(self.superuser, dbname=self.journal, autocommit=True, row_factory=dict_row) as conn:
            with suppress(psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
                return conn.execute(
                    "SELECT * FROM pgfreeze.freezes WHERE databases = %s ORDER BY requested_at",
                    ([self.database],),
                ).fetchall()
        return []

    def thawed_by(self) -> str | None:
        """Return what ended the last freeze."""
        freezes = self.freezes()
        return freezes[-1]["thawed_by"] if freezes else None

    def end(self) -> str:
        """Wait for the run's end and return its state; the database must be writable then, or when the lease ends."""
        eventually(self.over, f"the end of {self}", PATIENCE, every=0.5)
        return self.run_state()

    def writable(self, within: float = PATIENCE) -> bool:
        """Wait until the application can write."""
        with suppress(TimeoutError):
            return eventually(self.can_write, f"{self} to be writable", within, every=0.3)
        return False

    def row(self) -> Row:
        """Return what the table is to say; in bold what nobody would want."""
        freezes = self.freezes()
        if not freezes:
            writable = "was never frozen"
        elif self.happened is None or freezes[-1]["restored_at"] is None:
            writable = "yes" if self.can_write() else "NO"
        else:
            by = " ".join(freezes[-1]["thawed_by"].split()[:2])
            ways = {"lease ended": "the lease", "resume by": "resume", "lock session": "the server"}
            how = ways.get(by, "pause itself" if self.dag_id.startswith(("frozen", "plain")) else "the task itself")
            after = (freezes[-1]["restored_at"] - self.happened).total_seconds()
            writable = f"{after:.1f} s{self.since}, by {how}" if after > 0 else "was not frozen again"
            if self.dag_id.startswith("plain") and after > 0 and by == "lease ended":
                writable = f"**{writable}**"
        colour = {"success": "green", "failed": "red"}
        run = colour.get(self.run_state(), self.run_state())
        found = ", ".join(self.found()).replace("writable", "**writable**") or "was not made"
        return Row(self.event, self.dag_id.partition("_")[0], writable, run, found)

    def __str__(self) -> str:
        """Name the scenario for messages."""
        return f"{self.dag_id}/{self.run_id} ({self.event})"

    def report(self) -> str:
        """Return what is known, for a failed test."""
        lines = [str(self)]
        with suppress(Exception):
            lines.append(f"run {self.run_state()}, tasks {self.states()}")
        lines += [json.dumps(freeze, default=str) for freeze in self.freezes()]
        for path in sorted(self.airflow.home.glob(f"logs/dag_id={self.dag_id}/run_id={self.run_id}/**/*.log")):
            lines.append(f"--- {'/'.join(path.parts[-2:])}")
            for line in path.read_text(errors="replace").splitlines():
                with suppress(ValueError):
                    said: dict[str, Any] = json.loads(line)
                    errors = [f"{e.get('exc_type')}: {e.get('exc_value')}" for e in said.get("error_detail") or ()]
                    lines.append(f"{said.get('timestamp', '')[11:23]} {str(said.get('event'))[:300]} {errors or ''}")
        return "\n".join(lines)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    """Whether a process still runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> None:
    """Wait until a process has ended."""
    eventually(lambda: not alive(pid), f"process {pid} to end", PATIENCE)
