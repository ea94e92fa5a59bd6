"""What a submission asks for in one statement: files of its own organization that are there, and the largest room."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from jobs import reads
from jobs.async_reads import AsyncReads
from jobs.db import Database
from jobs.owner import Owner
from jobs.references import References, ReferredFile, read_references
from tests.integration.jobs.conftest import ORGANIZATION, register
from tests.integration.jobs.test_files import ROW, expire, store


def read(url: str, file_ids: Sequence[str], *, organization_id: str = ORGANIZATION) -> References:
    async def ask() -> References:
        db = AsyncReads(url)
        await db.open()
        try:
            return await read_references(db, owner=Owner(organization_id), file_ids=file_ids)
        finally:
            await db.close()

    return asyncio.run(ask())


def test_files_that_are_there_are_found_and_no_others(database_url: str, db: Database, tmp_path: Path) -> None:
    known, expired = store(db, ROW * 3, tmp_path), store(db, ROW, tmp_path, expires_after_s=3600)
    expire(db, expired)
    found = read(database_url, [known.id, expired.id, "file-unknown"])
    assert found.files == {known.id: ReferredFile(purpose="fine-tune", num_lines=3)}
    assert read(database_url, [known.id], organization_id="org-other").files == {}
    assert read(database_url, []).files == {}


def test_the_room_is_that_of_the_largest_host(database_url: str, db: Database) -> None:
    assert read(database_url, []).room is None
    register(db, name="small", available_bytes=10**9)
    register(db, name="large", available_bytes=10**10)
    room = read(database_url, []).room
    assert room is not None
    assert room.host == "large"
    assert room == reads.largest_room(db)
