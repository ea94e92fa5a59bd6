"""Schema migrations (Alembic). They are applied by `python -m jobs migrate`."""
