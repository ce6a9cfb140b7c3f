"""Every verb, in the order in which ``pg-freeze --help`` lists them."""

from __future__ import annotations

from typing import Final

from airflow_pg_freeze.cli.freezing import CHECKPOINT, PAUSE, RESUME
from airflow_pg_freeze.cli.keeping import GUARD, INSTALL
from airflow_pg_freeze.cli.looking import HISTORY, PREFLIGHT, STATUS
from airflow_pg_freeze.cli.proving import ATTEST, VERIFY_COPY
from airflow_pg_freeze.cli.running import RUN
from airflow_pg_freeze.cli.verb import Verb

VERBS: Final[tuple[Verb, ...]] = (
    PREFLIGHT,
    PAUSE,
    CHECKPOINT,
    ATTEST,
    RESUME,
    RUN,
    STATUS,
    HISTORY,
    VERIFY_COPY,
    INSTALL,
    GUARD,
)
