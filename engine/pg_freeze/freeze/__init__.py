"""Pause, checkpoint and resume: observe, decide, apply, until done.

Truth lives in the server: an act begins by reading the journal, and is safe to repeat. The invariants:

1. The journal row and every changed setting commit in one transaction. On disk a database is frozen and journalled,
   or neither.
2. A freeze is committed only while a dead-man switch watches its token, and only with a valid ticket. A ticket is void
   once its holder has resumed, or has made a newer attempt; the freezing transaction locks it, so a resume either
   comes first (and nothing freezes) or waits, and thaws what it finds.
3. Between barrier and ``frozen`` each round trip asks whether the freeze is still this ticket's, and stops if not:
   sessions of a database that somebody has thawed meanwhile are left alone.
4. Success is reported only after the journal said, after the last change, that the freeze stands under this ticket.
5. Whatever ends a pause early (an error, a signal, a timeout, the interpreter's end) voids its ticket and thaws its
   freeze, over a fresh connection, before the error goes on. If even that fails, the error is ``ThawFailed`` and the
   dead-man switch remains. A newer attempt's freeze is never undone by an older one.
6. Only the server's procedure thaws: ``CALL pgfreeze.thaw(…)``.
"""

from __future__ import annotations

from pg_freeze.freeze.checkpoint import checkpoint, held
from pg_freeze.freeze.pause import pause
from pg_freeze.freeze.steps import Seen, Step, next_step
from pg_freeze.freeze.thaw import resume

__all__ = ["Seen", "Step", "checkpoint", "held", "next_step", "pause", "resume"]
