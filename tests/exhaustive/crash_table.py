"""Writes docs/crash-matrix.md from what a run of test_crash_matrix.py saw."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from devtools.wire import Moment
from tests.server.crash_lane import LONG, THE_TWO, Event, Outcome, is_poll

HEAD = """# Crash matrix

What becomes of a freeze when its process dies, at whichever statement. Written by `make crash-matrix`, on PostgreSQL
{version}, last on {today}. `make test` takes one case of each kind.

A real process runs `pause`, `checkpoint` or `resume` for two databases, or a block for the time of which they are
frozen by one of the strategies (by privileges one database), as `pg-freeze run` and `@task.pg_frozen` have one;
through a proxy that sees every statement. Just before the statement reaches the server, or just after its answer has
left it and before the client sees it,

- the process is **killed** (SIGKILL), or
- its network is **cut**: every connection closed, every new one refused, until all is over, or
- its sessions are **ended** with `pg_terminate_backend`; new connections work.

Then its holder resumes from elsewhere (first letter), or nobody does anything (second letter). The lease is then
{lease:g} s; but for locks, which need none, {long:g} s:

| letter | the freeze |
|---|---|
| · | never came to be |
| E | was thawed at the end of its block, which went on or was over |
| U | was undone by the pause, or the block, itself, as it failed |
| K | was thawed by the server at once, since the sessions that held the locks were gone; a resume may come before |
| D | was thawed by the resume under test, which was done already or went on over a new connection |
| R | was thawed by the resume from elsewhere |
| L | was thawed by the server when the lease ended |

In each of these {cells} cases, afterwards: `pg_database`, `pg_db_role_setting` and every ACL are as they were, the
application writes, in sessions that were open and in new ones, the journal is closed, the next pause works and stays
undisturbed by what is left of the first one, and no process said that a freeze stands which does not, or that a block
was frozen in which the application could write. A freeze that was left to its lease ended {late} after it at the
latest.
"""
COLUMNS = [(event, moment) for event in (Event.KILLED, Event.CUT, Event.TERMINATED) for moment in Moment]


def write(where: Path, outcomes: list[Outcome], version: str, lease: float) -> None:
    late = max((outcome.late for outcome in outcomes), default=timedelta(0))
    text = HEAD.format(
        version=version,
        today=datetime.now(UTC).date().isoformat(),
        cells=len(outcomes),
        late=f"{late / timedelta(milliseconds=1):.0f} ms",
        lease=lease,
        long=LONG,
    )
    for act in dict.fromkeys(outcome.cell.act for outcome in outcomes):
        text += f"\n## {act}\n\n| | statement | killed before | after | cut before | after | ended before | after |\n"
        text += "|" + "---|" * 8 + "\n"
        mine = [outcome for outcome in outcomes if outcome.cell.act == act]
        steps = dict.fromkeys(outcome.cell.step for outcome in mine if not is_poll(outcome.cell.step))
        for number, step in enumerate(steps, 1):
            row = [outcome for outcome in mine if outcome.cell.step == step]
            cells = [_cell(o for o in row if (o.cell.event, o.cell.moment) == column) for column in COLUMNS]
            text += f"| {number} | {_shown(step.text)} | {' | '.join(cells)} |\n"
    where.write_text(text)


def _cell(outcomes: Iterable[Outcome]) -> str:
    letters = {outcome.cell.aftermath: _letter(outcome) for outcome in outcomes}
    return "".join(letters.get(aftermath, "?") for aftermath in THE_TWO)


def _letter(outcome: Outcome) -> str:
    by = outcome.thawed_by
    if outcome.problems:
        return "**!**"
    if by is None:
        return "·"
    if by.startswith("undone"):
        return "U"
    if letter := {"lease ended": "L", "end of the block": "E", "lock session ended": "K"}.get(by):
        return letter
    # Both resumes are the same holder's, so the journal cannot tell them apart.
    return "D" if outcome.thawed_before else "R"


def _shown(text: str) -> str:
    """Return enough of a statement to know it by."""
    found = re.search(r"(?:^CALL|^SELECT|voided_at IS NULL FROM) pgfreeze\.(\w+)\(", text)
    if found:
        return f"`{found[1]}(…)`"
    short = text if len(text) <= 64 else f"{text[:36]} … {text[-26:]}"
    return f"`{short}`".replace("|", "\\|")
