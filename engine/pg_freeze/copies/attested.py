"""The closed attestation from outside of a copy: in the copy itself that record is open still, or not of this copy.

Nobody signs it. It is taken for what it is given as, if it is of the very record that the copy has open.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pg_freeze import sizes
from pg_freeze.attestation import Attestation, Level
from pg_freeze.copies.frozen import Held
from pg_freeze.copies.lsn import is_lsn
from pg_freeze.copies.tree import read_small
from pg_freeze.errors import InvalidRequest

_LONGEST: Final = 2**28
# What was known already when the record was opened.
_SAME: Final = ("token", "holder", "databases", "before_at", "wal_from", "checkpoint_lsn")
_TEXTS: Final = ("token", "holder", "before_at", "wal_from", "wal_to", "level")


@dataclass(frozen=True, slots=True)
class Outside:
    """What the file says.

    :ivar record: the attestation, as its ``as_dict`` writes it.
    :ivar sizes: of the relations while they were frozen, if it has them.
    """

    record: dict[str, Any]
    sizes: sizes.Sizes | None

    @property
    def token(self) -> str:
        """Return the token of its freeze."""
        return str(self.record["token"])

    @property
    def until(self) -> str:
        """Return where in the WAL its second look was."""
        return str(self.record["wal_to"])

    @property
    def broken(self) -> str | None:
        """Return what it says against the copy, if it does."""
        if self.record["certified"]:
            return None
        what = "; ".join(str(one.get("what")) for one in self.record["violations"]) or self.record.get("advice")
        return f"the attestation says {self.record['level']}: {what or 'no reason is given'}"

    @property
    def unseen(self) -> list[str]:
        """Return what was not looked at while it was frozen."""
        return [f"by the attestation: {one}" for one in self.record.get("unseen") or ()]


def read(path: Path) -> Outside:
    """Read a file, as the command line and the operators write it.

    :raises InvalidRequest: if it is no closed attestation.
    """
    try:
        said = json.loads(read_small(path, _LONGEST, follow=True))
        record = said.get("attestation", said)
        return Outside(_checked(record), sizes.checked(said.get("sizes") or record.get("sizes")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__} {error}" if isinstance(error, LookupError | AttributeError) else error
        raise InvalidRequest(f"{path} is no closed attestation: {why}") from error


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    if record["level"] is None:
        raise ValueError("it is still open: it is closed by attest --after, or when the block ends")
    lists = (record["databases"], record["violations"], record.get("unseen") or [])
    if (
        not all(isinstance(record[name], str) for name in _TEXTS)
        or not all(isinstance(one, list) for one in lists)
        or not all(isinstance(one, dict) for one in record["violations"])
        or type(record["id"]) is not int
        or type(record["certified"]) is not bool
        or not all(is_lsn(record[name]) for name in ("wal_from", "wal_to"))
    ):
        raise ValueError("a field has another type")
    certified = Level(record["level"]) is not Level.CRASH_ONLY
    if record["certified"] is not certified or (certified and record["violations"]):
        raise ValueError("it contradicts itself: level, certified and violations do not go together")
    return record


def misfit(outside: Outside, held: Sequence[Held]) -> str | None:
    """Return why an attestation says nothing of this copy; None if it does."""
    own = {str(one.freeze.token): one.attestations for one in held}
    number = outside.record["id"]
    if outside.token not in own:
        return f"the attestation is of the freeze {outside.token}, in which the copy was not taken"
    mine: Attestation | None = next((one for one in own[outside.token] if one.id == number), None)
    if mine is None and own[outside.token]:
        # Taken before that record was opened, but after the first look of its freeze, from which they all count.
        mine = own[outside.token][0]
    elif mine is None:
        return f"the copy was taken before the first look of attestation {number}, which says nothing of that time"
    elif mine.level is not None:
        return f"the copy was taken after the second look of attestation {number}, which says nothing of that time"
    known = mine.as_dict()
    for name in _SAME:
        if outside.record.get(name) != known[name]:
            return (
                f"the attestation was altered, or is of another server: {name} is {outside.record.get(name)!r}, and in "
                f"the copy {known[name]!r}"
            )
    return None
