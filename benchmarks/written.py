"""What a procedure itself writes to the server: WAL, and rows of the catalogs and of the journal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, LiteralString, Self

from benchmarks.procedures import APPLICATION, DATABASE
from devtools.pgserver import Server

SETTLED_WITHIN: Final = 10.0

# What a session has counted is there for others once it has ended, at the latest.
_WORKING: Final[LiteralString] = f"""
    SELECT count(*) FROM pg_stat_activity
     WHERE backend_type = 'client backend' AND usename <> '{APPLICATION}' AND pid <> pg_backend_pid()"""
_WAL: Final[LiteralString] = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"
# What autoanalyze writes comes from the application's work before. Catalogs that all databases share are counted once.
_CATALOGS: Final[LiteralString] = """
    SELECT COALESCE(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::bigint
      FROM pg_stat_sys_tables s JOIN pg_class c ON c.oid = s.relid
     WHERE s.schemaname = 'pg_catalog' AND s.relname <> 'pg_statistic'
       AND (NOT c.relisshared OR current_database() = 'postgres')"""
_JOURNAL: Final[LiteralString] = """
    SELECT COALESCE(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::bigint
      FROM pg_stat_user_tables WHERE schemaname = 'pgfreeze'"""


@dataclass(frozen=True, slots=True)
class Written:
    """How much was written: bytes of WAL, rows of system catalogs, rows of the journal."""

    wal: int
    catalogs: int
    journal: int

    @classmethod
    def so_far(cls, server: Server) -> Self:
        """Return what has been written since the server was made, when nobody but the application is connected.

        :raises TimeoutError: if somebody stays.
        """
        deadline = time.monotonic() + SETTLED_WITHIN
        with server.control() as conn:
            while conn.execute(_WORKING).fetchall() != [(0,)]:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"somebody is still connected after {SETTLED_WITHIN:g} s")
                time.sleep(0.02)
            ((wal,),) = conn.execute(_WAL).fetchall()
            ((journal,),) = conn.execute(_JOURNAL).fetchall()
            ((shared,),) = conn.execute(_CATALOGS).fetchall()
        ((own,),) = server.execute(_CATALOGS, DATABASE)
        return cls(wal, shared + own, journal)

    def since(self, before: Written) -> Written:
        """Return what was written in between."""
        return Written(self.wal - before.wal, self.catalogs - before.catalogs, self.journal - before.journal)
