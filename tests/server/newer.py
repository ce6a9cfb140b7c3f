"""A newer program: a copy of ours with one migration more, other routines, and greater numbers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pg_freeze
from devtools.environment import without
from pg_freeze.journal.definition import Definition

#: What the next version might change: a column of each kind, a value more in a CHECK, a table, an index.
MIGRATION: Final = """
ALTER TABLE pgfreeze.freezes ADD COLUMN seen_by text, ADD COLUMN weight integer NOT NULL DEFAULT 7;
ALTER TABLE pgfreeze.freezes DROP CONSTRAINT freezes_strategy_check;
ALTER TABLE pgfreeze.freezes ADD CONSTRAINT freezes_strategy_check
    CHECK (strategy IN ('read-only', 'lock', 'privileges', 'another'));
ALTER TABLE pgfreeze.tickets ADD COLUMN note text NOT NULL DEFAULT 'none';
ALTER TABLE pgfreeze.frozen_databases ADD COLUMN note text;
ALTER TABLE pgfreeze.blockers ADD COLUMN note text;
CREATE TABLE pgfreeze.notes (token uuid NOT NULL REFERENCES pgfreeze.freezes, note text);
CREATE INDEX freezes_seen_by ON pgfreeze.freezes (seen_by);
"""
#: A routine that is new, and one that an old switch calls: it says that it was the new one.
NEW_ROUTINE: Final = """
CREATE FUNCTION pgfreeze.newly_made() RETURNS integer LANGUAGE sql SET search_path = pg_catalog, pg_temp AS 'SELECT 2';
"""
_RESTORE: Final = re.compile(
    r"(CREATE OR REPLACE FUNCTION pgfreeze\.restore_settings\(.*?)(\n    RETURN failed;\nEND \$\$;)", re.DOTALL
)
_SEEN: Final = "\n    UPDATE pgfreeze.freezes SET seen_by = 'version 2' WHERE token = the_token;"


def program(place: Path) -> Path:
    """Make a newer program in *place*, which is to come first in PYTHONPATH; return its package."""
    package = place / "pg_freeze"
    shutil.copytree(Path(pg_freeze.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    ours = Definition.read(package)
    (package / f"journal/migrations/{ours.version.tables + 1:04}.sql").write_text(MIGRATION)
    script = package / "sql/install.sql"
    changed, times = _RESTORE.subn(lambda found: found[1] + _SEEN + found[2], script.read_text())
    assert times == 1
    script.write_text(changed)
    (package / "sql/history.sql").write_text((package / "sql/history.sql").read_text() + NEW_ROUTINE)
    with (package / "journal/digests.txt").open("a") as digests:
        digests.write(f"routines {ours.version.routines + 1} ...\n")
    start = package / "__init__.py"
    start.write_text(start.read_text().replace('__version__ = "0.1.0"', '__version__ = "0.2.0"'))
    return package


def run(package: Path, dsn: str, *words: str) -> tuple[int, str]:
    """Run the command line of the program in *package*, and return its exit code and what it said."""
    environment = {**without("PG", "PYTHON"), "PG_FREEZE_DSN": dsn, "PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-B", "-m", "pg_freeze", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout + done.stderr
