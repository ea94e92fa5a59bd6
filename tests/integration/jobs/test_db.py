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
