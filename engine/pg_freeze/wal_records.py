"""What each record of the WAL says about the rows of a database, for PostgreSQL 14 to 18.

A type is harmless here only if it can be written without a row having changed, and if every change of a row writes
another record as well that is not harmless. What is not in this table counts as a change: types of later versions,
and resource managers of extensions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class Means(StrEnum):
    """What a record means for a database that it concerns."""

    NOTHING = "nothing"
    CHANGE = "change"
    #: Full pages: only those of a relation's main fork can hold rows.
    PAGE = "page"
    SEQUENCE = "sequence"
    #: The server was stopped, or crashed: unlogged tables may have been emptied.
    RESTART = "restart"
    #: Files of the database that the description names.
    FILES = "files"


def _all(types: str, means: Means, why: str) -> dict[str, tuple[Means, str]]:
    return dict.fromkeys(types.split(), (means, why))


_INDEX: Final = "an index follows its table, whose rows have records of their own; building one logs whole pages"

#: Resource manager, as pg_get_wal_resource_managers() names it, and record type without "+INIT".
RECORDS: Final[Mapping[str, Mapping[str, tuple[Means, str]]]] = MappingProxyType(
    {
        "XLOG": {
            **_all("CHECKPOINT_ONLINE CHECKPOINT_REDO", Means.NOTHING, "a checkpoint writes out what is there"),
            **_all("CHECKPOINT_SHUTDOWN END_OF_RECOVERY OVERWRITE_CONTRECORD PARAMETER_CHANGE", Means.RESTART,
                   "written when a server stops, starts or has recovered"),
            **_all("NOOP NEXTOID SWITCH BACKUP_END RESTORE_POINT FPW_CHANGE", Means.NOTHING, "about the WAL itself"),
            **_all("FPI_FOR_HINT", Means.NOTHING, "hint bits and free space maps"),
            **_all("FPI", Means.PAGE, "pg_surgery, a rewrite or an index build; in other forks, maps"),
        },
        "Transaction": {
            **_all("COMMIT ABORT PREPARE COMMIT_PREPARED ABORT_PREPARED", Means.NOTHING,
                   "what became of the transactions is asked of the server, by their ids"),
            **_all("ASSIGNMENT INVALIDATION", Means.NOTHING, "said of rows that have records of their own"),
        },
        "Storage": {
            **_all("CREATE", Means.FILES, "a new file: a table made, truncated or rewritten"),
            **_all("TRUNCATE", Means.NOTHING, "vacuum gives back empty pages; TRUNCATE changes pg_class, too"),
        },
        "CLOG": _all("ZEROPAGE TRUNCATE", Means.NOTHING, "room for the state of transactions"),
        "Database": _all("CREATE CREATE_FILE_COPY CREATE_WAL_LOG DROP", Means.FILES,
                         "CREATE, DROP, and ALTER DATABASE SET TABLESPACE"),
        "Tablespace": _all("CREATE DROP", Means.NOTHING, "an empty directory; what moves into it is logged"),
        "MultiXact": _all("ZERO_OFF_PAGE ZERO_MEM_PAGE CREATE_ID TRUNCATE_ID", Means.NOTHING, "who locks a row"),
        "RelMap": _all("UPDATE", Means.FILES, "a catalog was rewritten"),
        "Standby": _all("LOCK RUNNING_XACTS INVALIDATIONS", Means.NOTHING, "for standbys"),
        "Heap2": {
            **_all("MULTI_INSERT", Means.CHANGE, "COPY, and catalogs"),
            **_all("PRUNE PRUNE_ON_ACCESS PRUNE_VACUUM_SCAN PRUNE_VACUUM_CLEANUP VACUUM FREEZE_PAGE VISIBLE",
                   Means.NOTHING, "vacuum and pruning take away what nobody can see"),
            **_all("LOCK_UPDATED", Means.NOTHING, "a row lock"),
            **_all("NEW_CID REWRITE", Means.NOTHING, "for logical decoding, beside the rows"),
        },
        "Heap": {
            **_all("INSERT DELETE UPDATE HOT_UPDATE HEAP_CONFIRM", Means.CHANGE, "rows"),
            **_all("TRUNCATE", Means.NOTHING, "for logical decoding, beside the new files and pg_class"),
            **_all("LOCK", Means.NOTHING, "a row lock"),
            **_all("INPLACE", Means.NOTHING, "statistics in pg_class and pg_database"),
        },
        "Btree": _all("INSERT_LEAF INSERT_UPPER INSERT_META SPLIT_L SPLIT_R INSERT_POST DEDUP VACUUM DELETE "
                      "MARK_PAGE_HALFDEAD UNLINK_PAGE UNLINK_PAGE_META NEWROOT REUSE_PAGE META_CLEANUP",
                      Means.NOTHING, _INDEX),
        "Hash": _all("INIT_META_PAGE INIT_BITMAP_PAGE INSERT ADD_OVFL_PAGE SPLIT_ALLOCATE_PAGE SPLIT_PAGE "
                     "SPLIT_COMPLETE MOVE_PAGE_CONTENTS SQUEEZE_PAGE DELETE SPLIT_CLEANUP UPDATE_META_PAGE "
                     "VACUUM_ONE_PAGE", Means.NOTHING, _INDEX),
        "Gin": _all("CREATE_PTREE INSERT SPLIT VACUUM_PAGE VACUUM_DATA_LEAF_PAGE DELETE_PAGE UPDATE_META_PAGE "
                    "INSERT_LISTPAGE DELETE_LISTPAGE", Means.NOTHING, _INDEX),
        "Gist": _all("PAGE_UPDATE DELETE PAGE_REUSE PAGE_SPLIT PAGE_DELETE", Means.NOTHING, _INDEX),
        "Sequence": _all("LOG", Means.SEQUENCE, "nextval, every 32nd time, or setval"),
        "SPGist": _all("ADD_LEAF MOVE_LEAFS ADD_NODE SPLIT_TUPLE PICKSPLIT VACUUM_LEAF VACUUM_ROOT VACUUM_REDIRECT",
                       Means.NOTHING, _INDEX),
        "BRIN": _all("CREATE_INDEX INSERT UPDATE SAMEPAGE_UPDATE REVMAP_EXTEND DESUMMARIZE", Means.NOTHING, _INDEX),
        "CommitTs": _all("ZEROPAGE TRUNCATE SETTS", Means.NOTHING, "when transactions were committed"),
        "ReplicationOrigin": _all("SET DROP", Means.NOTHING, "how far an apply worker came; its rows are logged"),
        "Generic": _all("Generic", Means.CHANGE, "an access method of an extension: perhaps a table's"),
        "LogicalMessage": _all("MESSAGE", Means.NOTHING, "pg_logical_emit_message: in no table"),
    }
)  # fmt: skip

_DATABASES: Final = {
    "Storage": re.compile(r"(?:base|PG_\w+)/(\d+)/\d+"),
    "Database": re.compile(r"(?:^create dir |^dir | to | )\d+/(\d+)(?=$| )"),
    "RelMap": re.compile(r"^database (\d+) "),
}
_COPY: Final = re.compile(r"^copy dir \d+/\d+ to \d+/(\d+)$")


def meaning(manager: str, kind: str, fork: str | None = None) -> Means:
    """Return what a record means for the database whose block it has, or which it does not name.

    :param fork: of the block: ``main``, ``fsm``, ``vm`` or ``init``; None for a record without blocks.
    """
    means, _ = RECORDS.get(manager, {}).get(kind.removesuffix("+INIT"), (Means.CHANGE, "not known"))
    if means is Means.PAGE:
        return Means.CHANGE if fork in (None, "main") else Means.NOTHING
    return means


def databases_in(manager: str, description: str) -> Iterator[int] | None:
    """Yield the OIDs of the databases whose files a record of :attr:`Means.FILES` is about; None if it cannot be read.

    A database that is only copied from is not changed.
    """
    copied = _COPY.match(description) if manager == "Database" else None
    found = [copied[1]] if copied else _DATABASES[manager].findall(description)
    return iter(int(one) for one in found) if found or description.startswith("global/") else None
