"""What a journal consists of, and which of two is the newer one.

Tables change by numbered migrations. Routines, views and triggers are made anew by each installation. So a version is
two numbers: that of the last migration, and that of the routines. Both only ever grow. A newer journal has at least one
greater number. ``digests.txt`` names each number together with the digest of its files. A test compares them, so nobody
can change a file and forget its number.

The version stands in the comment of the schema. Everybody can read that, and only the owner of the schema can write it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final, NamedTuple

from pg_freeze import __version__

#: The files of the routines, in the order in which they run.
ROUTINES: Final = ("install.sql", "rows.sql", "privileges.sql", "history.sql", "describe.sql")
_COMMENT: Final = re.compile(r"pg-freeze (\S+) journal (\d{1,6})\.(\d{1,6}) \(([0-9a-f]{16})\)")


class Version(NamedTuple):
    """The version of a journal, and of the program that has installed it.

    :param tables: the number of the last migration.
    :param routines: the number of the routines.
    :param digest: of the files of the routines. Two programs in development may have one number and other files.
    :param program: the version of the distribution pg-freeze.
    """

    tables: int
    routines: int
    digest: str
    program: str

    @classmethod
    def read(cls, comment: str) -> Version | None:
        """Return the version that the comment of a schema states; None for another text."""
        found = _COMMENT.fullmatch(comment)
        return None if found is None else cls(int(found[2]), int(found[3]), found[4], found[1])

    def comment(self) -> str:
        """Return the comment of the schema."""
        return f"pg-freeze {self.program} journal {self.tables}.{self.routines} ({self.digest})"

    def is_newer_than(self, other: Version) -> bool:
        """Whether there is anything here of which *other* cannot know."""
        return self.tables > other.tables or self.routines > other.routines

    def is_same_as(self, other: Version) -> bool:
        """Whether both have the same tables and routines, whatever program has installed them."""
        return self[:3] == other[:3]

    def __str__(self) -> str:
        """Return the two numbers."""
        return f"{self.tables}.{self.routines}"


@dataclass(frozen=True, slots=True)
class Definition:
    """All that makes a journal: the migrations in their order, and the routines."""

    migrations: tuple[str, ...]
    routines: str
    version: Version

    @classmethod
    def read(cls, directory: Traversable, program: str = __version__) -> Definition:
        """Read the definition in a *directory* that is laid out like this package.

        :raises ValueError: if the migrations are not numbered from 1 on without a gap.
        """
        there = directory / "journal" / "migrations"
        names = sorted(file.name for file in there.iterdir() if file.name.endswith(".sql"))
        if not names or names != [f"{number:04}.sql" for number in range(1, len(names) + 1)]:
            raise ValueError(f"migrations are numbered from 0001.sql on without a gap, and here are {names}")
        migrations = tuple((there / name).read_text(encoding="utf-8") for name in names)
        routines = "".join((directory / "sql" / name).read_text(encoding="utf-8") for name in ROUTINES)
        numbers = [int(line.split()[1]) for line in _lines(directory) if line.startswith("routines ")]
        return cls(migrations, routines, Version(len(names), max(numbers), digest(routines), program))

    def tables(self) -> frozenset[str]:
        """Return the names of all tables and views that any version up to this one has made."""
        made = re.findall(r"CREATE (?:TABLE|VIEW) pgfreeze\.(\w+)", "".join((*self.migrations, self.routines)))
        return frozenset(made)

    def digests(self) -> list[str]:
        """Return the lines of ``digests.txt`` that must be there for these files."""
        tables = [f"tables {number} {digest(text)}" for number, text in enumerate(self.migrations, 1)]
        return [*tables, f"routines {self.version.routines} {self.version.digest}"]


def digest(text: str) -> str:
    """Return the digest of a file, as ``digests.txt`` and the comment of the schema have it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _lines(directory: Traversable) -> list[str]:
    return (directory / "journal" / "digests.txt").read_text(encoding="utf-8").splitlines()


@cache
def ours() -> Definition:
    """Return what this program installs."""
    return Definition.read(files("pg_freeze"))
