"""What happened around the freeze, from the clients' records, the journal and Airflow: told, and checked."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from demo.check import Compared
from devtools.load import Gap, Recorded
from devtools.scheduler import Task
from pg_freeze import Freeze

#: Seconds of ordinary work before the pause and after the resume that belong to the picture.
MARGIN = 3.0


@dataclass(frozen=True, slots=True)
class Story:
    """The freeze as the application saw it. Moments are those of the monotonic clock."""

    recorded: Recorded
    requested: float
    barrier: float
    drained: float
    checkpointed: float
    copy: tuple[float, float]
    restored: float
    terminated: Mapping[str, int]
    readers_ended: int
    checkpoint_lsn: str
    admit: str

    @classmethod
    def of(cls, recorded: Recorded, freeze: Freeze, copies: list[Task]) -> "Story":
        """Bring the three sources together.

        :param copies: the task instances that copied.
        """
        moments = (freeze.barrier_at, freeze.drained_at, freeze.checkpoint_at, freeze.restored_at)
        barrier, drained, checkpointed, restored = (_monotonic(moment) for moment in moments if moment is not None)
        return cls(
            recorded=recorded,
            requested=_monotonic(freeze.requested_at),
            barrier=barrier,
            drained=drained,
            checkpointed=checkpointed,
            copy=(
                min(_monotonic(task.start_date) for task in copies if task.start_date is not None),
                max(_monotonic(task.end_date) for task in copies if task.end_date is not None),
            ),
            restored=restored,
            terminated=freeze.terminated,
            readers_ended=freeze.readers_ended,
            checkpoint_lsn=freeze.checkpoint_lsn or "",
            admit=freeze.admit.value,
        )

    @property
    def begin(self) -> float:
        """Where the picture begins."""
        return self.requested - MARGIN

    @property
    def end(self) -> float:
        """Where the picture ends."""
        return self.restored + MARGIN

    def gap(self, group: str) -> Gap:
        """Return the longest time without a write, or without a read."""
        return self.recorded.gap(group, self.begin, self.end)

    def timeline(self) -> list[tuple[float, str]]:
        """Return what happened, in order: seconds after the last write, and the words for it."""
        write = self.gap("write")
        ended = sum(self.terminated.values())
        events = [
            (write.begin, "last write before the freeze"),
            (self.barrier, "barrier: sessions that begin now cannot write"),
            (
                self.drained,
                f"drained: {ended} sessions ended, no open transaction cut off"
                if not self.cut_off
                else f"drained: {ended} sessions ended",
            ),
            (self.checkpointed, f"checkpoint at {self.checkpoint_lsn}"),
            (self.copy[0], "copy of cluster and files begins"),
            (self.copy[1], "copy done"),
            (self.restored, "thawed"),
            (write.end, "first write after the freeze"),
        ]
        return sorted((at - write.begin, said) for at, said in events)

    @property
    def cut_off(self) -> int:
        """How many transactions that were open at the barrier had to be ended."""
        return self.terminated.get("drain-timeout", 0)

    def figures(self) -> list[tuple[str, str]]:
        """Return what the application noticed."""
        recorded, begin, end = self.recorded, self.begin, self.end
        copying = self.copy[1] - self.copy[0]
        return [
            (
                "longest time without a write",
                f"{self.gap('write').seconds:.2f} s, {copying:.2f} s of it copying; the rest is mostly Airflow's steps "
                "from task to task, which a DAG of one task has not (docs/taskflow.md)",
            ),
            (f"longest time without a read (admit={self.admit})", f"{self.gap('read').seconds:.2f} s"),
            (
                "sessions ended by the freeze and by the thaw, and opened again",
                f"{recorded.sessions_ended(begin, end)}, {recorded.reconnects(begin, end)}",
            ),
            ("errors that clients saw, refused writes included", str(recorded.errors(begin, end))),
        ]

    def checks(self, without: Compared, with_freeze: Compared) -> list[tuple[str, bool]]:
        """Return what must be true for the demo to have shown what it claims."""
        write, read = self.gap("write"), self.gap("read")
        while_frozen = sum(
            begin > self.drained and end < self.restored
            for record in self.recorded.group("write")
            for begin, end in record.done
        )
        return [
            ("the copy without a freeze does not match its files", without.mismatches > 0),
            ("the copy with a freeze matches its files", with_freeze.mismatches == 0 and with_freeze.rows > 0),
            ("no write was committed while frozen", while_frozen == 0),
            ("writes went on before and after", write.begin > self.begin and write.end < self.end),
            ("the copy was taken within the freeze", self.checkpointed < self.copy[0] <= self.copy[1] < self.restored),
            ("reads went on meanwhile", read.seconds < write.seconds),
        ]


def _monotonic(moment: datetime) -> float:
    return time.monotonic() - (time.time() - moment.timestamp())
