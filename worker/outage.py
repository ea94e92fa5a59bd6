"""Living through an outage of Postgres: what counts as one, how long to wait between tries, and when to give up.

An outage must cost no work: the engine trains on, its journal is a file, and a lease that has run out but was not
reaped may be renewed. So a write that meets an outage is tried again until the database is back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

T = TypeVar("T")

OUTAGES = (OperationalError, InterfaceError, InternalError, PoolTimeoutError)
"""Refused or broken connections, timeouts, a server that starts or stops, a standby that only reads."""

NOT_READY = (*OUTAGES, ProgrammingError)
"""These, and a database whose schema is not there yet: a worker may be started before the migration has run. Only for
what is repeated for ever anyway; elsewhere a wrong statement is a defect and has to be seen."""

_FIRST_DELAY_S = 0.2  # a restart of Postgres takes about a second
_MAX_DELAY_S = 5.0  # as the reaper's interval: a longer wait would delay what the return of the database allows
STOP_PATIENCE_S = 4.0  # with the journal's rest and the job's end it keeps the stop below 60 s, see `stop_grace_s`

log = structlog.get_logger(__name__)


class StillAwayError(Exception):
    """The worker stops while the database is away: the job's lease will run out, and the next worker goes on."""


class Backoff:
    """Waits that double from try to try, with one log line at the outage's begin and one at its end."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._failures = 0
        self._since = 0.0

    def failed(self, error: Exception) -> float:
        """Note a failed try. Returns the seconds to wait before the next one."""
        if self._failures == 0:
            self._since = time.monotonic()
            log.warning("database_unreachable", during=self._what, error=first_line(error))
        self._failures += 1
        return float(min(_FIRST_DELAY_S * 2 ** min(self._failures - 1, 10), _MAX_DELAY_S))

    def worked(self) -> None:
        """Note a try that worked."""
        if self._failures:
            log.info("database_back", during=self._what, after_s=round(time.monotonic() - self._since, 1))
        self._failures = 0


def persist(
    write: Callable[[], T],
    *,
    what: str,
    stopping: threading.Event,
    outages: tuple[type[Exception], ...] = OUTAGES,
) -> T:
    """Call `write` until the database takes it. Once the worker is `stopping`, for 4 s more at the most.

    Raises:
        StillAwayError: the worker stops and the database did not come back.
    """
    backoff, deadline = Backoff(what), None
    pause = threading.Event()
    while True:
        try:
            result = write()
        except outages as error:
            delay_s = backoff.failed(error)
            if stopping.is_set():
                deadline = deadline or time.monotonic() + STOP_PATIENCE_S
                if time.monotonic() + delay_s > deadline:
                    raise StillAwayError(f"gave up {what}: {first_line(error)}") from error
                pause.wait(delay_s)
            else:
                stopping.wait(delay_s)
        else:
            backoff.worked()
            return result


def first_line(error: Exception) -> str:
    """The part of a database error that is for people: SQLAlchemy adds the statement and its parameters below it."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
