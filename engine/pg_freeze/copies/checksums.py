"""The checksum of each page of a copy, where the server has checksums."""

from __future__ import annotations

from pg_freeze.copies.relations import Findings
from pg_freeze.copies.server import Place, run


def check(where: Place, found: Findings) -> bool:
    """Check each page's checksum, and say whether all are right. The server was stopped cleanly."""
    program = where.programs / "pg_checksums"
    if not program.exists():
        found.unseen.append("checksums: pg_checksums is not installed beside postgres")
        return False
    said = list(run(where, "pg_checksums", "--check", "--pgdata", str(where.tree.data)))
    if any("not enabled" in line for line in said):
        found.unseen.append("checksums: the server has none, so a page that changed by itself is not recognised")
    elif any(line.startswith("Bad checksums:  0") for line in said):
        return True
    else:
        found.problems.append(f"pg_checksums: {' '.join(' '.join(said).split())[:2000]}")
    return False
