"""The pool lets go of every connection, also of one that a thread still holds when the process ends its work."""

from __future__ import annotations

from typing import Any

from sqlalchemy import text

from jobs.db import Database


def test_a_connection_in_use_is_closed_when_it_comes_back(database_url: str) -> None:
    db = Database(database_url)
    with db.read() as session:
        session.execute(text("SELECT 1"))
        driver: Any = session.connection().connection.dbapi_connection
        db.dispose()
        assert not driver.closed  # whoever reads is not cut off
    assert driver.closed


def test_one_taken_after_the_end_is_closed_too(database_url: str) -> None:
    db = Database(database_url)
    db.dispose()
    with db.read() as session:
        session.execute(text("SELECT 1"))
        driver: Any = session.connection().connection.dbapi_connection
    assert driver.closed


def test_a_connection_that_postgres_has_closed_is_replaced(database_url: str, db: Database) -> None:
    other = Database(database_url)
    with other.read() as session:
        before = session.scalar(text("SELECT pg_backend_pid()"))
    with db.transaction() as session:
        session.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": before})
    with other.read() as session:
        assert session.scalar(text("SELECT pg_backend_pid()")) != before
    other.dispose()


def test_reads_begin_no_transaction(db: Database) -> None:
    with db.read() as session:
        first, second = (session.scalar(text("SELECT pg_current_xact_id()::text")) for _ in range(2))
    assert first != second
    with db.transaction() as session:
        first, second = (session.scalar(text("SELECT pg_current_xact_id()::text")) for _ in range(2))
    assert first == second
