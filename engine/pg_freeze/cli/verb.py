"""What a verb of the command line is, what it is called with, and what it gives back.

To add one: write a module in ``cli/verbs/`` that ends in a :class:`Verb`, and name it there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the parser needs none of these, and they take long to load
    from rich.console import RenderableType

    from pg_freeze import Connect
    from pg_freeze.cli.output import Voice
    from pg_freeze.cli.signals import Signals
    from pg_freeze.cli.target import Target


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a verb.

    :param args: the verb's own options.
    :param targets: the servers; exactly one, unless the verb takes several.
    :param voice: where messages for people go. Silent with ``--json``.
    :param signals: to settle, once what was done must not be interrupted any more.
    :param environment: as it was given to us: Airflow, once loaded, has set variables of its own.
    """

    args: argparse.Namespace
    targets: tuple[Target, ...]
    voice: Voice
    signals: Signals
    environment: Mapping[str, str]

    @property
    def target(self) -> Target:
        """The server."""
        return self.targets[0]

    @property
    def connect(self) -> Connect:
        """Opens a connection to the maintenance database, as the core wants it."""
        return self.targets[0].connect


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a verb gives back: one JSON object, the same for people, and the exit code.

    :param undo: called when the outcome cannot be written: nobody would know of what was done.
    """

    document: dict[str, Any]
    shown: tuple[RenderableType, ...] = ()
    exit_code: int = 0
    undo: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb.

    :param description: for the verb's own help.
    :param examples: command lines without the ``pg-freeze``.
    :param arguments: adds the verb's own options to a parser; those for the connection are there already.
    :param run: does it. Errors of the core are left to :func:`pg_freeze.cli.main`.
    :param interrupted: what a person is told when a signal has ended it.
    :param several: whether more than one server may be named.
    :param server: whether it works on a server at all.
    :param takes_command: whether a command follows, after ``--``: then ``command`` is its words.
    :param exit_codes: those of this verb, where the common ones do not say it.
    """

    description: str
    examples: tuple[str, ...]
    arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[Call], Outcome]
    interrupted: str = "stopped; nothing was changed"
    several: bool = field(default=False)
    server: bool = field(default=True)
    takes_command: bool = field(default=False)
    exit_codes: Mapping[str, str] = field(default_factory=dict)
