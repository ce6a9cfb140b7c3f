"""The verb that installs the journal."""

from __future__ import annotations

import argparse

from rich.text import Text

import pg_freeze as core
from pg_freeze.cli import show
from pg_freeze.cli.verb import Call, Outcome, Verb


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--grant", action="append", default=[], metavar="ROLE", help="let this role use the journal; may be repeated"
    )


def _run(call: Call) -> Outcome:
    if "" in call.args.grant:
        raise core.InvalidRequest("--grant needs the name of a role, and got an empty one")
    changed = core.install(call.connect, grant=call.args.grant)
    said = "The journal is installed." if changed else "The journal was there already, in this version."
    granted = f" Granted to {show.names(call.args.grant)}." if call.args.grant else ""
    return Outcome({"installed": changed, "granted": call.args.grant}, (Text(said + granted),))


VERB = Verb(
    description=(
        "Create or upgrade the journal in the maintenance database; run this as a superuser, who then owns it and whom "
        "everybody may trust. The first pause does this too, where its role may CREATE there; but then no superuser "
        "uses that journal, whose code its owner can change."
    ),
    examples=("install", "install --grant freezer"),
    arguments=_arguments,
    run=_run,
    interrupted="stopped; nothing was installed",
)
