"""Reads on the event loop see what the other connections see, and outlive the end of a connection."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import BigInteger, bindparam, func, select, text

from jobs.async_reads import AsyncReads, CompiledQuery
from jobs.db import UNREACHABLE, Database
from jobs.job_details import get_detailed_job, read_details
from jobs.models import Evaluation, Job
from jobs.owner import Owner
from local.postgres import Postgres
from tests.integration.jobs.conftest import claim, submit

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PID = CompiledQuery.of(select(func.pg_backend_pid()))
ADD_ONE = CompiledQuery.of(select(bindparam("number", type_=BigInteger) + 1))
SLEEP = CompiledQuery.of(select(func.pg_sleep(60)))


async def _with(url: str, *questions: tuple[CompiledQuery, dict[str, int]]) -> list[object]:
    reads = AsyncReads(url)
    await reads.open()
    try:
        return [(await reads.fetch(query, **parameters))[0][0] for query, parameters in questions]
    finally:
        await reads.close()


def test_constants_and_parameters_arrive(database_url: str) -> None:
    assert asyncio.run(_with(database_url, (ADD_ONE, {"number": 41}))) == [42]


def test_a_job_is_read_as_by_a_session(database_url: str, db: Database) -> None:
    submit(db)
    job_id = claim(db).lease.job_id
    with db.transaction() as session:
        job = session.get_one(Job, job_id)
        session.add_all(
            [Evaluation(job_id=job_id, step=step, created_at=NOW, num_rows=1, valid_loss=0.5) for step in range(1, 120)]
        )
    details = read_details(db, job_ids=[job_id])[job_id]

    async def read() -> None:
        reads = AsyncReads(database_url)
        await reads.open()
        other, other_details = await get_detailed_job(reads, owner=Owner(job.organization_id), job_id=job_id)
        await reads.close()
        for attribute in Job.__mapper__.column_attrs:
            assert getattr(other, attribute.key) == getattr(job, attribute.key), attribute.key
        assert [found.step for found in other_details.evaluations] == [1, *range(21, 120)]
        assert [found.step for found in details.evaluations] == [1, *range(21, 120)]
        other_details.evaluations, details.evaluations = [], []
        assert other_details == details
        assert details.owner is not None

    asyncio.run(read())


def test_a_connection_that_postgres_has_closed_is_replaced(database_url: str, db: Database) -> None:
    async def read() -> None:
        reads = AsyncReads(database_url)
        await reads.open()
        ((before,),) = await reads.fetch(PID)
        with db.transaction() as session:
            session.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": before})
        ((after,),) = await reads.fetch(PID)
        assert after != before
        await reads.close()

    asyncio.run(read())


def test_a_reader_that_leaves_takes_no_connection_along(database_url: str) -> None:
    async def read() -> None:
        reads = AsyncReads(database_url)
        await reads.open()
        for _ in range(10):  # more than there are connections
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reads.fetch(SLEEP), 0.05)
        assert await reads.fetch(ADD_ONE, number=1) == [(2,)]
        await reads.close()

    asyncio.run(read())


def test_a_database_that_is_away_is_unreachable_until_it_is_back(tmp_path: Path) -> None:
    postgres = Postgres(tmp_path / "postgres", log_path=tmp_path / "postgres.log")

    async def read() -> None:
        reads = AsyncReads(postgres.url())
        await reads.open()
        with pytest.raises(UNREACHABLE) as caught:
            await reads.fetch(PID)
        assert isinstance(caught.value, psycopg.OperationalError)
        postgres.start()
        assert await reads.fetch(ADD_ONE, number=1) == [(2,)]
        await reads.close()

    try:
        asyncio.run(read())
    finally:
        postgres.stop()
