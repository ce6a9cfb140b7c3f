"""The settings of a server on a copy: ours, and of the copy's only those without which it could not recover."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

# What recovery needs at least as large as it was ("Administrator's Overview" of hot standby in the manual), by its name
# in pg_controldata; and what is taken where pg_controldata is not installed.
_LIMITS: Final[Mapping[str, tuple[str, int]]] = {
    "max_connections setting": ("max_connections", 100),
    "max_worker_processes setting": ("max_worker_processes", 8),
    "max_wal_senders setting": ("max_wal_senders", 10),
    "max_prepared_xacts setting": ("max_prepared_transactions", 1000),
    "max_locks_per_xact setting": ("max_locks_per_transaction", 256),
}
_MOST: Final = 262_143  # PostgreSQL's own limit for the first four
_OURS: Final[Mapping[str, str]] = {
    "listen_addresses": "",
    "autovacuum": "off",
    "logging_collector": "off",
    "log_destination": "stderr",
    "max_logical_replication_workers": "0",
    "restart_after_crash": "off",
    "jit": "off",
    # Slots of the copy are read at the start, and refused with less.
    "wal_level": "logical",
    "max_replication_slots": "1000",
}
_SESSION: Final[Mapping[str, str]] = {
    "role": "none",
    "search_path": "pg_catalog,pg_temp",
    "session_preload_libraries": "",
    "local_preload_libraries": "",
    # Ordinary triggers, rules and event triggers do not fire.
    "session_replication_role": "replica",
    "statement_timeout": "0",
    "lock_timeout": "60s",
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "default_transaction_isolation": r"read\ committed",
    "default_transaction_deferrable": "off",
    "synchronous_commit": "off",
    "client_min_messages": "error",
    "standard_conforming_strings": "on",
    "quote_all_identifiers": "off",
    "track_counts": "on",
    "zero_damaged_pages": "off",
    "ignore_checksum_failure": "off",
    "vacuum_cost_delay": "0",
    "vacuum_failsafe_age": "2100000000",
    "max_parallel_workers_per_gather": "0",
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
}


def config_file(*, keep_wal: bool) -> str:
    """Return the server's configuration file, which it may read again."""
    return f"wal_keep_size = {2**31 - 1 if keep_wal else 0}\n"


def command_line(
    data: Path, version: int, controlled: Mapping[str, str], *, conf: Path, socket: Path, port: int
) -> list[str]:
    """Return the words after ``postgres``. What is on the command line outranks every file.

    :param controlled: what pg_controldata says, by its own names.
    """
    limits = {
        setting: str(min(int(said), _MOST)) if (said := controlled.get(name, "").strip()).isdigit() else str(otherwise)
        for name, (setting, otherwise) in _LIMITS.items()
    }
    settings = {
        **_OURS,
        **limits,
        "config_file": str(conf / "postgresql.conf"),
        "hba_file": str(conf / "pg_hba.conf"),
        "ident_file": str(conf / "pg_ident.conf"),
        "unix_socket_directories": str(socket),
        "port": str(port),
    }
    slots = data / "pg_replslot"
    if slots.is_dir():
        settings["max_replication_slots"] = str(min(_MOST, 1000 + len(os.listdir(slots))))
    if version >= 18:
        settings["max_active_replication_origins"] = settings["max_replication_slots"]
    return ["-D", str(data), *(word for name, value in settings.items() for word in ("-c", f"{name}={value}"))]


def session_options(version: int, *, read_only_too: bool = True) -> str:
    """Return the options of a session, which outrank what its database or role has for settings.

    :param read_only_too: whether that is so for default_transaction_read_only, too.
    """
    settings = dict(_SESSION)
    if version >= 17:
        settings |= {"event_triggers": "off", "transaction_timeout": "0"}
    if read_only_too:
        settings["default_transaction_read_only"] = "off"
    return " ".join(f"-c {name}={value}" for name, value in settings.items())
