"""The names that others' attacks, scripts and pages rest on, in one place."""

from typing import Final

SCHEMA: Final = "pgfreeze"
READ_ONLY: Final = "read-only"
LOCK: Final = "lock"
PRIVILEGES: Final = "privileges"
STRICT: Final = "strict"
QUIESCED: Final = "quiesced"
CRASH_ONLY: Final = "crash-only"
#: The mark of a freeze from inside, which anybody may set for himself.
MARK: Final = "pg-freeze inside 00000000-0000-0000-0000-000000000000"
