"""An attestation: the record of what was checked around one snapshot, and the level that follows."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from pg_freeze.errors import FreezeError, InvalidRequest
from pg_freeze.model import Admit, iso
from pg_freeze.names import visible
from pg_freeze.strategies import named


class Level(StrEnum):
    """How much a snapshot can be trusted."""

    STRICT = "strict"
    QUIESCED = "quiesced"
    CRASH_ONLY = "crash-only"


_ORDER: Final = (Level.CRASH_ONLY, Level.QUIESCED, Level.STRICT)


class Method(StrEnum):
    """How it was proved that no row changed, or that none was.

    ``wal``: every record of the WAL was looked at. ``transaction-ids``: the server gave out none but ours, without
    which nothing is written, and what had one before was rolled back. ``none``: neither could be had.
    """

    WAL = "wal"
    TRANSACTION_IDS = "transaction-ids"
    NONE = "none"


#: What may be required of a snapshot.
ENOUGH: Final = (Level.QUIESCED, Level.STRICT)


def required(require: Level | str | None, strategy: str, admit: Admit | str) -> Level | None:
    """Return the level that is required of a snapshot; None if any will do.

    :raises InvalidRequest: for one that cannot be reached.
    """
    if require is None:
        return None
    if require not in ENOUGH:
        raise InvalidRequest(f"require is {require!r}: it must be one of {', '.join(ENOUGH)}, or None")
    level = Level(require)
    if level is Level.STRICT and not ("admit" in named(str(strategy)).options and admit == Admit.NOBODY):
        raise InvalidRequest(
            f"strict means that nobody can connect, but strategy is {strategy!s} and admit {admit!s}: "
            "give strategy=read-only and admit=nobody, or require=quiesced"
        )
    return level


def check_writable(path: Path | None) -> None:
    """Make sure that an attestation can be written there, before anything is frozen for it.

    :raises InvalidRequest: if it cannot.
    """
    if path is not None and (not os.access(path.parent, os.W_OK | os.X_OK) or path.is_dir()):
        raise InvalidRequest(f"the attestation cannot be written to {path}; nothing was frozen")


@dataclass(frozen=True, slots=True)
class Violation:
    """What breaks an attestation: who, what, when (server time, as exact as it is known)."""

    code: str
    what: str
    who: str | None
    when: str | None

    def __str__(self) -> str:
        """Return one line for logs."""
        return visible(f"{self.code}: {self.what} ({self.who or 'unknown'}, {self.when or 'time unknown'})")

    def as_dict(self) -> dict[str, str | None]:
        """Return the violation as JSON-ready values."""
        return {"code": self.code, "what": self.what, "who": self.who, "when": self.when}


@dataclass(frozen=True, slots=True)
class Attestation:
    """One record: open (no level yet) after the first check, closed after the second.

    :ivar sequences: those that ran ahead, which keeps a copy from ``strict``, but makes no row wrong.
    :ivar unseen: what was not looked at, and why.
    :ivar advice: what would make the level better, in one line.
    :ivar sizes: of the relations while they were frozen, for ``verify-copy``.
    """

    id: int
    token: UUID
    holder: str
    databases: tuple[str, ...]
    before_at: datetime
    after_at: datetime | None
    wal_from: str
    wal_to: str | None
    checkpoint_lsn: str | None
    method: Method | None
    level: Level | None
    violations: tuple[Violation, ...]
    sequences: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    advice: str | None = None
    sizes: dict[str, Any] | None = None

    @property
    def certified(self) -> bool:
        """Whether the snapshot between the two checks is consistent."""
        return self.level in (Level.STRICT, Level.QUIESCED)

    def reaches(self, level: Level) -> bool:
        """Whether the snapshot can be trusted as much as *level* says."""
        return self.level is not None and _ORDER.index(self.level) >= _ORDER.index(level)

    @property
    def reasons(self) -> str:
        """What breaks the attestation or keeps it from ``strict``, and what to do about it, in one line."""
        broken = [f"{one.what} ({one.who or 'unknown'}, {one.when or 'time unknown'})" for one in self.violations]
        return "; ".join([*broken, *self.sequences, *([] if self.advice is None else [self.advice])])

    def write(self, path: Path) -> None:
        """Write the attestation and the sizes to a file, for ``verify-copy``: in a copy it is still open.

        Others may write to that directory, and know the names of our files. So it is a new file under a name of chance,
        which only its owner may read, that takes the place of the one that was there, even if that is a link.

        :raises FreezeError: if that cannot be done; a file that was there before is then as it was.
        """
        text = json.dumps({"attestation": self.as_dict(), "sizes": self.sizes}) + "\n"
        try:
            number, name = tempfile.mkstemp(prefix=".", dir=path.parent)
            beside = Path(name)
            try:
                with os.fdopen(number, "w", encoding="utf-8") as file:
                    file.write(text)
                beside.replace(path)
            except BaseException:
                beside.unlink()
                raise
        except (OSError, ValueError) as error:
            raise FreezeError(f"the attestation, {self.level}, could not be written to {path}: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """Return the attestation as JSON-ready values, without the sizes."""
        return {
            "id": self.id,
            "token": str(self.token),
            "holder": self.holder,
            "databases": list(self.databases),
            "before_at": iso(self.before_at),
            "after_at": iso(self.after_at),
            "wal_from": self.wal_from,
            "wal_to": self.wal_to,
            "checkpoint_lsn": self.checkpoint_lsn,
            "method": None if self.method is None else self.method.value,
            "level": None if self.level is None else self.level.value,
            "certified": self.certified,
            "violations": [violation.as_dict() for violation in self.violations],
            "sequences": list(self.sequences),
            "unseen": list(self.unseen),
            "advice": self.advice,
        }
