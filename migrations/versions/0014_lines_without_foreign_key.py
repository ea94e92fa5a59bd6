"""Events and figures without a foreign key: to look the job of each row up was a quarter of the cost of shipping it."""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_TABLES = ("events", "metrics")


def upgrade() -> None:
    for table in _TABLES:
        op.drop_constraint(op.f(f"fk_{table}_job_id"), table, type_="foreignkey")


def downgrade() -> None:
    for table in _TABLES:
        op.create_foreign_key(op.f(f"fk_{table}_job_id"), table, "jobs", ["job_id"], ["id"], ondelete="CASCADE")
