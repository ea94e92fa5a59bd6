"""Files that are there for a time."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("files", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_files_expires_at", "files", ["expires_at"], postgresql_where=sa.text("expires_at IS NOT NULL"))
    op.add_column("uploads", sa.Column("file_expires_after_s", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("uploads", "file_expires_after_s")
    op.drop_index("ix_files_expires_at", table_name="files")
    op.drop_column("files", "expires_at")
