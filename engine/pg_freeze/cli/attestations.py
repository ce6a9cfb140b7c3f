"""An attestation, for people."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from pg_freeze.attestation import Attestation
from pg_freeze.cli import show
from pg_freeze.names import visible


def shown(found: Attestation) -> list[RenderableType]:
    """Return a closed attestation for people."""
    style = "bold green" if found.certified else "bold red"
    facts = {
        "token": str(found.token),
        "checkpoint": found.checkpoint_lsn or "none",
        "WAL": f"{found.wal_from} to {found.wal_to}, judged by {found.method}",
    }
    lines: list[RenderableType] = [
        Text(f"{show.names(found.databases)}: {found.level}", style=style),
        show.pairs(facts),
    ]
    if found.violations:
        rows = [(one.code, one.what, one.who, one.when) for one in found.violations]
        lines.append(show.table(("what breaks it", "", "who", "when"), rows))
    lines += [Text(visible(f"Keeps it from strict: {one}")) for one in found.sequences]
    lines += [Text(visible(f"Not looked at: {one}")) for one in found.unseen]
    lines += [Text(visible(f"To have better: {found.advice}"))] if found.advice is not None else []
    return lines
