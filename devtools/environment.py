"""The environment for a process that is to find nothing of ours in it."""

import os


def without(*prefixes: str) -> dict[str, str]:
    """Return our environment but for the variables that begin so."""
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
