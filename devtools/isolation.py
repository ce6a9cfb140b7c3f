"""Whether programs can be isolated here, as ``pg-freeze verify-copy`` does: with namespaces of their own."""

from __future__ import annotations

import os
import subprocess
from functools import cache


@cache
def missing() -> str | None:
    """Return what is missing, in a sentence; None if nothing is."""
    if os.geteuid() != 0:
        return "only root may have a program run with a user id of its own"
    command = ["unshare", "--net", "--pid", "--mount", "--ipc", "--fork", "true"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return f"namespaces cannot be made: {done.stderr.strip()}" if done.returncode else None
