"""The errors of a snapshot. The freeze's own are in :mod:`pg_freeze.errors`."""

from __future__ import annotations


class SnapshotFailed(Exception):
    """No complete set of snapshots was made. Trying again may help.

    :param left: what was made before it failed and is still there.
    """

    def __init__(self, message: str, left: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.left = left


class SnapshotRefused(SnapshotFailed):
    """Trying again will not help before somebody changes something: a right, a name, a program that is not there."""
