"""Alembic's environment: the URL comes from the caller, one migration run at a time, and a
statement waits only briefly for a table's lock."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, text

from jobs import loose_objects, models, webhook_models  # noqa: F401  # their tables belong to the metadata
from jobs.orm import Base

# Two starting processes must not migrate at once; any constant of our own will do.
_MIGRATION_LOCK = 0x10_0D_0002


def run() -> None:
    """Migrate the database of `config.attributes["database_url"]`."""
    engine = create_engine(context.config.attributes["database_url"])
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _MIGRATION_LOCK})
        connection.execute(text("SET lock_timeout = '5s'"))
        connection.commit()
        context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()


run()
