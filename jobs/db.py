"""The connection to Postgres, and the only place that commits.

A transaction is opened at the edge (one request, one lifecycle call) and never held across a subprocess, a network
call or a file copy. Timeouts bound every wait, so that a hung database becomes an error and not a hung service.

A round trip to Postgres costs some 0.1 ms on each side, as much as the work of a small statement. So reads are not
wrapped into BEGIN and ROLLBACK, and a connection is tested before its use by a look at its socket and not by a query:
together 0.3 of the 0.65 ms that reading one job took.
"""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import create_engine, event
from sqlalchemy.exc import DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

# What a database that does not answer raises, or answers too late, or has no connection left for the caller.
UNREACHABLE = (
    OperationalError,
    InterfaceError,
    PoolTimeoutError,
    # Of `jobs.async_reads`; a pool's time-out is one of the first kind.
    psycopg.OperationalError,
    psycopg.InterfaceError,
)

# Seconds to connect; milliseconds for one statement, for a lock, and for a transaction left idle. A heartbeat is due
# every 10 s, so a statement that takes longer than 5 s is of no use to anybody.
CONNECT_ARGS: dict[str, Any] = {
    "connect_timeout": 3,
    "options": "-c statement_timeout=5000 -c lock_timeout=2000 -c idle_in_transaction_session_timeout=30000",
}


class Database:
    """A pool of connections; `transaction()` commits at its end, `read()` never does."""

    def __init__(self, url: str, *, pool_size: int = 5) -> None:
        self.url = url
        self._engine = create_engine(
            url,
            pool_size=pool_size,
            max_overflow=5,
            pool_timeout=5,
            connect_args=CONNECT_ARGS,
        )
        event.listen(self._engine, "checkout", _test_connection)
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)
        self._readers = sessionmaker(
            self._engine.execution_options(isolation_level="AUTOCOMMIT"), expire_on_commit=False, autoflush=False
        )

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session whose work is committed when the block ends, and rolled back when it raises."""
        with self._sessions() as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading, in which nothing is locked: each statement sees what is committed when it begins."""
        with self._readers() as session:
            yield session

    def dispose(self) -> None:
        """Close every connection of the pool; one that a thread still uses is closed when it comes back."""
        event.listen(self._engine, "checkin", _close_on_return)
        self._engine.dispose()


def _test_connection(connection: Any, _record: ConnectionPoolEntry, _fairy: Any) -> None:
    """Refuse a connection that Postgres has closed, as it does when it restarts: the pool then makes a new one.

    On a connection at rest hardly anything arrives but its end; where something has, a query tells.

    Raises:
        DisconnectionError: the connection is of no use.
    """
    poll = select.poll()
    try:
        poll.register(connection.fileno(), select.POLLIN)
        if poll.poll(0):
            connection.execute("SELECT 1")
            connection.rollback()
    except psycopg.Error as error:
        raise DisconnectionError("Postgres has closed the connection") from error


def _close_on_return(_connection: Any, record: ConnectionPoolEntry) -> None:
    # The engine has a new pool by then, and nothing would ever close what comes back to the old one.
    record.invalidate()
