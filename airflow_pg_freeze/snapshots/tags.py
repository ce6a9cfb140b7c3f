"""Tags that tie a snapshot to its freeze, within the limits of AWS.

EC2 itself takes any character, other services that read the same tags do not: letters, digits, spaces and
``+ - = . _ : / @`` are safe everywhere. Whatever else a value holds is written as ``=XX``, one byte of UTF-8 each, and
so is ``=`` itself: :func:`decode` gives it back.
https://docs.aws.amazon.com/tag-editor/latest/userguide/best-practices-and-strats.html
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from pg_freeze import Freeze
from pg_freeze.model import iso
from pg_freeze.volumes.errors import SnapshotRefused

PREFIX: Final = "pg-freeze:"
TOKEN: Final = PREFIX + "token"
TASK: Final = PREFIX + "task"
DATABASES: Final = PREFIX + "databases"
LEFT_OUT: Final = PREFIX + "databases-left-out"
LEVEL: Final = PREFIX + "level"
CHECKPOINT_LSN: Final = PREFIX + "checkpoint-lsn"
#: The database server's time just before a snapshot was requested.
ASKED_AT: Final = PREFIX + "asked-at"
HOLDER: Final = PREFIX + "holder"
CERTIFIED: Final = "certified"

LONGEST_KEY: Final = 128
LONGEST_VALUE: Final = 256
MOST_TAGS: Final = 50
#: How many tags the names of databases may take; those left out are counted in one more.
MOST_DATABASE_TAGS: Final = 20
_SAFE: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-._:/@")
_DIGEST: Final = 32


def encode(text: str) -> str:
    """Return *text* with each other byte than ``A-Z a-z 0-9 + - . _ : / @`` as ``=XX``. Spaces separate names."""
    return "".join(chr(byte) if byte in _SAFE else f"={byte:02X}" for byte in text.encode())


def decode(value: str) -> str:
    """Return what :func:`encode` was given."""
    return re.sub(rb"=([0-9A-F]{2})", lambda hit: bytes([int(hit[1], 16)]), value.encode()).decode()


def bounded(text: str) -> str:
    """Return *text* encoded; where that is too long, its beginning, ``=-`` (no escape) and a digest of all of it."""
    value = encode(text)
    if len(value) <= LONGEST_VALUE:
        return value
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]
    kept = value[: LONGEST_VALUE - _DIGEST - 2]
    # Not in the middle of an escape.
    return re.sub(r"=.?$", "", kept) + "=-" + digest


def database_tags(databases: Sequence[str]) -> dict[str, str]:
    """Return the names of *databases*, separated by spaces, over as many tags as they need."""
    values: list[str] = []
    taken = 0
    for name in map(encode, databases):
        if values and len(values[-1]) + 1 + len(name) <= LONGEST_VALUE:
            values[-1] += " " + name
        elif len(values) < MOST_DATABASE_TAGS:
            values.append(name)
        else:
            break
        taken += 1
    tags = {DATABASES if number == 1 else f"{DATABASES}:{number}": value for number, value in enumerate(values, 1)}
    if taken < len(databases):
        tags[LEFT_OUT] = str(len(databases) - taken)
    return tags


def databases_of(tags: Mapping[str, str]) -> tuple[str, ...]:
    """Return the databases that :func:`database_tags` wrote."""
    return tuple(map(decode, _named(tags)))


def name_all(tags: Mapping[str, str], databases: Sequence[str]) -> bool:
    """Return whether *tags* are those of these databases, in any order. Those that were left out are only counted."""
    told, wanted = set(_named(tags)), set(map(encode, databases))
    left_out = tags.get(LEFT_OUT, "0")
    return told <= wanted and left_out.isdecimal() and len(told) + int(left_out) == len(wanted)


def _named(tags: Mapping[str, str]) -> list[str]:
    keys = [DATABASES, *(f"{DATABASES}:{number}" for number in range(2, MOST_DATABASE_TAGS + 1))]
    return [name for key in keys if key in tags for name in tags[key].split(" ")]


def freeze_tags(
    freeze: Freeze,
    *,
    task: str,
    level: str,
    origin: Mapping[str, str],
    own: Mapping[str, str],
    asked_at: datetime | None = None,
) -> dict[str, str]:
    """Return the tags of a snapshot that nobody has certified yet.

    :param task: names the task in its run, the same for each of its tries: what a retry looks for, beside the token.
    :param level: what is known about the freeze so far.
    :param origin: where it comes from, such as ``dag`` and ``run``; written under ``pg-freeze:``.
    :param own: the user's own tags, as they are.
    :param asked_at: the server's time just before the snapshot is requested.
    :raises SnapshotRefused: if the user's own break AWS's limits.
    """
    tags = {
        TOKEN: str(freeze.token),
        TASK: bounded(task),
        HOLDER: bounded(freeze.holder),
        **database_tags(freeze.databases),
        LEVEL: bounded(level),
        CERTIFIED: "false",
        **{PREFIX + name: bounded(value) for name, value in origin.items()},
    }
    if freeze.checkpoint_lsn is not None:
        tags[CHECKPOINT_LSN] = bounded(freeze.checkpoint_lsn)
    if asked_at is not None:
        tags[ASKED_AT] = bounded(str(iso(asked_at)))
    return {**checked(own, taken=len(tags)), **tags}


def checked(own: Mapping[str, str], taken: int = 0) -> dict[str, str]:
    """Return the user's own tags.

    :param taken: how many of the 50 are ours.
    :raises SnapshotRefused: naming the tag and the limit that it breaks.
    """
    wrong = [f"key {key!r} is longer than {LONGEST_KEY} characters" for key in own if len(key) > LONGEST_KEY]
    wrong += [
        f"value of {key!r} is longer than {LONGEST_VALUE} characters" for key in own if len(own[key]) > LONGEST_VALUE
    ]
    wrong += [f"key {key!r} begins with 'aws:', which is Amazon's" for key in own if key.lower().startswith("aws:")]
    wrong += [f"key {key!r} is written by this operator" for key in own if key.startswith(PREFIX) or key == CERTIFIED]
    wrong += ["a key is empty"] if "" in own else []
    if len(own) + taken > MOST_TAGS:
        wrong.append(f"{len(own)} tags and {taken} of this operator's are more than {MOST_TAGS}")
    if wrong:
        raise SnapshotRefused(f"tags that AWS does not take: {'; '.join(wrong)}. Change tags=")
    return dict(own)


def as_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Return *tags* as AWS wants them."""
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def as_dict(tags: Sequence[Mapping[str, Any]] | None) -> dict[str, str]:
    """Return *tags* from AWS's list."""
    return {tag["Key"]: tag["Value"] for tag in tags or ()}
