"""What a run takes on a host beside its plan."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("hosts", sa.Column("run_overhead_bytes", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("hosts", "run_overhead_bytes")
