"""`python -m jobs migrate`: bring the database to the newest schema and write the first API key, if nobody has one to
administer with."""

from __future__ import annotations

import sys

from jobs import keys, migrate
from jobs.db import Database
from jobs.settings import JobsSettings, SettingsError, load_settings


def main(arguments: list[str]) -> int:
    """Run the one sub-command. Returns the exit code."""
    if arguments != ["migrate"]:
        sys.stderr.write("usage: python -m jobs migrate\n")
        return 2
    try:
        settings = load_settings(JobsSettings)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    migrate.upgrade(settings.database_url)
    if settings.admin_key_file is not None:
        db = Database(settings.database_url)
        if keys.ensure_admin_key(db, settings.admin_key_file):
            sys.stdout.write(f"wrote the first API key to {settings.admin_key_file}\n")
        db.dispose()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
