"""Memory by plan and by measurement: what a job needs, what a host has."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


# Every column may be NULL, so that a server or worker of the version before goes on writing its rows.
def upgrade() -> None:
    op.add_column("jobs", sa.Column("plan", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.add_column("jobs", sa.Column("planned_bytes", sa.BigInteger(), nullable=True))
    op.add_column("hosts", sa.Column("available_bytes", sa.BigInteger(), nullable=True))
    op.add_column("hosts", sa.Column("device_kind", sa.Text(), nullable=True))
    op.create_check_constraint(op.f("ck_jobs_planned_bytes"), "jobs", "planned_bytes >= 0")
    op.create_check_constraint(op.f("ck_hosts_device_kind"), "hosts", "device_kind IN ('cuda', 'cpu')")


def downgrade() -> None:
    op.drop_constraint(op.f("ck_hosts_device_kind"), "hosts", type_="check")
    op.drop_constraint(op.f("ck_jobs_planned_bytes"), "jobs", type_="check")
    op.drop_column("hosts", "device_kind")
    op.drop_column("hosts", "available_bytes")
    op.drop_column("jobs", "planned_bytes")
    op.drop_column("jobs", "plan")
