"""Whether a copy of rows and a copy of files are of the same moment: row by row, and file by file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg


@dataclass(frozen=True, slots=True)
class Compared:
    """What does not match between rows and files."""

    rows: int
    files: int
    without_file: int
    without_row: int
    different: int

    @property
    def mismatches(self) -> int:
        """How many rows and files do not match."""
        return self.without_file + self.without_row + self.different


def compare(conn: psycopg.Connection[Any], files: Path) -> Compared:
    """Compare every row with its file, by size and SHA-256, and every file with its row."""
    rows = {name: (size, digest) for name, size, digest in conn.execute("SELECT name, size, sha256 FROM documents")}
    found = {path.name: path for path in files.iterdir()}
    different = 0
    for name in rows.keys() & found.keys():
        body = found[name].read_bytes()
        different += (len(body), hashlib.sha256(body).hexdigest()) != rows[name]
    return Compared(len(rows), len(found), len(rows.keys() - found.keys()), len(found.keys() - rows.keys()), different)
