"""Calls to AWS while a database stands still: every wait is bounded, and what failed is told apart by its code."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final, TypeVar

from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
)

from pg_freeze.volumes.errors import SnapshotFailed, SnapshotRefused

log = logging.getLogger(__name__)

# botocore repeats a request whose connection broke, and with it the creation of a snapshot: here nobody repeats but us.
ONE_TRY: Final = Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30)
FIRST_WAIT: Final = 0.5
LONGEST_WAIT: Final = 15.0
#: Amazon's own limit: so many seconds between two snapshots of one volume.
SAME_VOLUME: Final = 15.0

THROTTLED: Final = frozenset(
    {"RequestLimitExceeded", "Throttling", "ThrottlingException", "RequestThrottled", "RequestThrottledException"}
)
BUSY: Final = frozenset(
    {"InvalidDBInstanceState", "InvalidDBClusterStateFault", "ConcurrentSnapshotLimitExceeded", "IncorrectState"}
)
DENIED: Final = frozenset(
    {
        "UnauthorizedOperation",
        "AccessDenied",
        "AccessDeniedException",
        "AuthFailure",
        "InvalidClientTokenId",
        "UnrecognizedClientException",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "ExpiredTokenException",
        "RequestExpired",
        "OptInRequired",
        "Blocked",
    }
)

Result = TypeVar("Result")


class Verdict(StrEnum):
    """What a failed call means."""

    NOT_DONE = "not done: may be repeated"
    UNKNOWN = "perhaps done: look before it is repeated"
    REFUSED = "not done, and would not be if repeated"


def code_of(error: Exception) -> str:
    """Return AWS's code of an error, or the name of botocore's exception."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", "Unknown"))
    return type(error).__name__


def judge(error: ClientError | BotoCoreError) -> Verdict:
    """Tell what a failed call means for a repetition."""
    if isinstance(error, ClientError):
        code = code_of(error)
        if code in THROTTLED or code in BUSY or code == "SnapshotCreationPerVolumeRateExceeded":
            return Verdict.NOT_DONE
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return Verdict.UNKNOWN if status >= 500 else Verdict.REFUSED
    if isinstance(error, EndpointConnectionError | ConnectTimeoutError):
        return Verdict.NOT_DONE
    return Verdict.UNKNOWN if isinstance(error, HTTPClientError) else Verdict.REFUSED


def reworded(error: ClientError | BotoCoreError, doing: str) -> SnapshotFailed:
    """Return our error for one of AWS's: what was being done, the code, AWS's own words, and the next step."""
    code = code_of(error)
    said = (
        str(error.response.get("Error", {}).get("Message") or error) if isinstance(error, ClientError) else str(error)
    )
    text = f"{doing}: {code}: {' '.join(said.split())}"
    if code in DENIED:
        action = error.operation_name if isinstance(error, ClientError) else ""
        return SnapshotRefused(
            f"{text}. Allow {action} to the identity of this Airflow connection, or give it other credentials"
        )
    if code in ("NoCredentialsError", "PartialCredentialsError", "NoRegionError", "ProfileNotFound"):
        return SnapshotRefused(f"{text}. Give the Airflow connection credentials and a region, or the worker a role")
    if judge(error) is Verdict.REFUSED:
        return SnapshotRefused(f"{text}. Nothing that a retry would cure")
    return SnapshotFailed(f"{text}. Try again")


def patiently(
    call: Callable[[], Result],
    *,
    doing: str,
    deadline: float,
    unknown: Callable[[], Result | None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """Return what *call* returns; repeat it, with growing pauses, while AWS is throttling, busy or failing.

    :param deadline: on the monotonic clock. No pause ends later: it fails instead, at once.
    :param unknown: looks whether a call that perhaps was carried out was, and returns its result, or None. Without it
        the call is one that may always be repeated.
    :raises SnapshotRefused: for what a repetition does not cure.
    :raises SnapshotFailed: when the time is up.
    """
    wait = FIRST_WAIT
    while True:
        try:
            return call()
        except (ClientError, BotoCoreError) as error:
            verdict = judge(error)
            if verdict is Verdict.REFUSED:
                raise reworded(error, doing) from error
            pause = wait + random.uniform(0, wait / 2)  # noqa: S311 — jitter, so that many tasks do not come back at once
            if code_of(error) == "SnapshotCreationPerVolumeRateExceeded":
                pause = SAME_VOLUME
            elif verdict is Verdict.UNKNOWN and unknown is not None:
                found = unknown()
                if found is not None:
                    return found
                pause = 0.0 if time.monotonic() < deadline else wait
            if time.monotonic() + pause >= deadline:
                failed = reworded(error, doing)
                raise SnapshotFailed(
                    f"{failed} later: no time is left to wait for it now, since the database stands still"
                ) from error
            log.warning("%s: %s (%s); again in %.1f s", doing, code_of(error), verdict, pause)
            sleep(pause)
            wait = min(wait * 2, LONGEST_WAIT)
