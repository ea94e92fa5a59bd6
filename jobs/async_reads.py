"""Statements that are asked a thousand times a second, on the event loop.

Asked in a thread, through SQLAlchemy, reading one job took 1.6 ms of the server's only interpreter: 0.5 ms of that went
to threads that wait for one another, 0.4 ms to SQLAlchemy's session and result. Here the statement is still written
with SQLAlchemy, compiled once, and sent by psycopg itself: 0.8 ms.
"""

from __future__ import annotations

import select
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import Select, make_url
from sqlalchemy.dialects.postgresql import psycopg as dialect

from jobs.db import CONNECT_ARGS

# Postgres has no use for more statements at once than it has processors for, and each connection costs it some 5 MB.
_MAX_CONNECTIONS = 4
# Seconds that a reader waits for a connection, and that the pool tries for one before it tells those who wait.
_TIMEOUT_S = 3.0

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class CompiledQuery:
    """A statement as it goes to Postgres, and its constants."""

    sql: str
    constants: Mapping[str, Any]

    @classmethod
    def of(cls, statement: Select[*tuple[Any, ...]]) -> CompiledQuery:
        """Compile a statement whose parameters are `bindparam`s without values."""
        compiled = statement.compile(dialect=dialect.dialect())  # type: ignore[no-untyped-call]
        constants = {name: value for name, value in compiled.params.items() if value is not None}
        return cls(str(compiled), constants)


class AsyncReads:
    """A few connections for reading, all of one event loop; nothing is locked, as in `Database.read`."""

    def __init__(self, url: str) -> None:
        self._pool = AsyncConnectionPool(
            make_url(url).set(drivername="postgresql").render_as_string(hide_password=False),
            min_size=1,
            max_size=_MAX_CONNECTIONS,
            timeout=_TIMEOUT_S,
            reconnect_timeout=_TIMEOUT_S,
            open=False,
            kwargs={"autocommit": True, **CONNECT_ARGS},
            check=_test_connection,
        )

    async def open(self) -> None:
        """Begin to connect, in the background: a server starts without its database, too."""
        await self._pool.open()

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.close()

    async def fetch(self, query: CompiledQuery, **parameters: Any) -> list[Row]:
        """The rows of an answer.

        Raises:
            psycopg.OperationalError: the database does not answer (one of `jobs.db.UNREACHABLE`).
        """
        async with self._pool.connection() as connection:
            cursor = await connection.execute(query.sql, {**query.constants, **parameters})
            return await cursor.fetchall()


async def _test_connection(connection: psycopg.AsyncConnection[Any]) -> None:
    """Refuse a connection that Postgres has closed; see `jobs.db`.

    Raises:
        psycopg.OperationalError: it is of no use.
    """
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if poll.poll(0):
        await connection.execute("SELECT 1")
