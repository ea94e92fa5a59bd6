"""The schema is what the models say, and the database itself refuses what the code must never do."""

from __future__ import annotations

import re

import pytest
from alembic import command
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from jobs import migrate
from jobs.db import Database
from jobs.status import TRANSITIONS, JobStatus

from .conftest import claim, submit


def test_models_and_migrations_agree(database_url: str) -> None:
    command.check(migrate.alembic_config(database_url))


def test_every_migration_can_be_undone(empty_database_url: str) -> None:
    migrate.upgrade(empty_database_url)
    command.downgrade(migrate.alembic_config(empty_database_url), "base")
    migrate.upgrade(empty_database_url)


def test_transitions_in_sql_are_those_in_python(db: Database) -> None:
    with db.read() as session:
        source = session.scalars(text("SELECT prosrc FROM pg_proc WHERE proname = 'jobs_check_transition'")).one()
    in_sql = set(re.findall(r"\('(\w+)', '(\w+)'\)", source))
    in_python = {(before.value, after.value) for before, following in TRANSITIONS.items() for after in following}
    assert in_sql == in_python


@pytest.mark.parametrize(
    "change",
    [
        "status = 'succeeded'",  # queued to succeeded: no such transition
        "status = 'running'",  # running without a lease
        "lease_token = gen_random_uuid()",  # a lease without running
        "status = 'failed', finished_at = now()",  # failed without an error
        "status = 'cancelled'",  # ended without a time
        "status = 'exploded'",
    ],
)
def test_the_database_refuses_impossible_rows(db: Database, change: str) -> None:
    submit(db)
    with pytest.raises(IntegrityError), db.transaction() as session:
        session.execute(text(f"UPDATE jobs SET {change}"))  # noqa: S608 - the changes stand above


def test_a_terminal_job_never_changes(db: Database) -> None:
    submit(db)
    lease = claim(db).lease
    with db.transaction() as session:
        session.execute(
            text(
                "UPDATE jobs SET status = 'cancelled', finished_at = now(), lease_token = NULL,"
                " lease_expires_at = NULL, lease_owner = NULL WHERE id = :id"
            ),
            {"id": lease.job_id},
        )
    for status in JobStatus:
        if status is JobStatus.CANCELLED:
            continue
        with pytest.raises(IntegrityError, match="cannot go from cancelled"), db.transaction() as session:
            session.execute(text("UPDATE jobs SET status = :status"), {"status": status})
