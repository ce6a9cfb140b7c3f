"""`python -m pg_freeze` is `pg-freeze`."""

from __future__ import annotations

import sys

from pg_freeze.cli import main

if __name__ == "__main__":
    sys.exit(main())
