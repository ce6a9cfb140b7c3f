"""The verb that installs the journal, and forgets old history: install."""

from __future__ import annotations

import argparse
from typing import Any, Final

from rich.text import Text

import pg_freeze as core
from pg_freeze.cli import show
from pg_freeze.cli.verb import Call, Outcome, Verb
from pg_freeze.cli.words import age, spoken
from pg_freeze.durations import written

#: Why a freeze is kept although it is old enough.
_KEPT: Final = {
    "still_open": "something of them is not thawed: see pg-freeze status",
    "leased": "their lease has not ended yet, and the dead-man switch may still read them",
    "attested": "they were attested since",
}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--grant", action="append", default=[], metavar="ROLE", help="let this role use the journal; may be repeated"
    )
    parser.add_argument(
        "--retain",
        type=age,
        metavar="AGE",
        help="forget, now and once, the freezes that were thawed longer ago than this, with their attestations. "
        "The age has a unit: 90d",
    )


def _run(call: Call) -> Outcome:
    if "" in call.args.grant:
        raise core.InvalidRequest("--grant needs the name of a role, and got an empty one")
    typed = ["install", *(word for role in call.args.grant for word in ("--grant", role))]
    if call.args.retain is not None:
        typed += ["--retain", written(call.args.retain)]
    changed = core.install(call.connect, grant=call.args.grant, typed=typed)
    said = "The journal is installed." if changed else "The journal was there already, in this version."
    if call.args.grant:
        said += f" Granted to {show.names(call.args.grant)}."
    document: dict[str, Any] = {"installed": changed, "granted": call.args.grant}
    if call.args.retain is not None:
        found = core.forget(call.connect, age=call.args.retain, typed=typed)
        kept = {why: number for why in _KEPT if (number := getattr(found, why))}
        document |= {"forgotten": found.freezes, "kept": kept}
        said += f" Forgot {found.freezes} freeze(s) that were thawed more than {spoken(call.args.retain)} ago"
        said += "".join(f"; kept {number}, because {_KEPT[why]}" for why, number in kept.items()) + "."
    return Outcome(document, (Text(said),))


VERB = Verb(
    description=(
        "Create or upgrade the journal in the maintenance database, also while databases are frozen. Run this as a "
        "superuser, who then owns it and whom everybody may trust; to upgrade, as its owner or another superuser. The "
        "first pause creates it too, where its role may CREATE there; but then no superuser uses that journal, whose "
        "code its owner can change. A pause never upgrades it."
    ),
    examples=("install", "install --grant freezer", "install --retain 90d"),
    arguments=_arguments,
    run=_run,
    interrupted="stopped; run it again",
)
