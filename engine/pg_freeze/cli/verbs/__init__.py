"""Every verb, a module each, loaded only when it is called: to load all takes longer than most of them do."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Final

from pg_freeze.cli.verb import Verb

#: One line for each, in the order in which ``pg-freeze --help`` lists them.
SUMMARIES: Final[Mapping[str, str]] = {
    "preflight": "tell everything that would make a freeze fail or leak, each with its remedy",
    "pause": "freeze databases: refuse writes, and make the sessions go that may still write",
    "checkpoint": "write all that is in memory to the volume, and note where that stands",
    "attest": "record what state a snapshot is taken in: once before it, once after",
    "resume": "thaw: every write is possible again, with the settings that were there before",
    "run": "freeze for the time of a command",
    "status": "tell what is frozen, by whom, until when, who lingers, and what to type to thaw it",
    "history": "list past freezes: who, when, for how long, and what ended them",
    "verify-copy": "start PostgreSQL on a restored copy, thaw it there, and check it",
    "install": "create or upgrade the journal in the maintenance database, or forget old history",
    "uninstall": "remove the journal from the maintenance database, with its history",
    "guard": "thaw what has outlived its lease, on one server or many",
}


def load(name: str) -> Verb:
    """Return the verb that is called *name* on the command line."""
    verb: Verb = import_module(f"{__name__}.{name.replace('-', '_')}").VERB
    return verb
