"""Files that are there for a time, and objects of the store that no file names."""

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
    op.create_table(
        "loose_objects",
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("remove_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("url", name=op.f("pk_loose_objects")),
    )
    op.create_index(op.f("ix_loose_objects_remove_at"), "loose_objects", ["remove_at"])


def downgrade() -> None:
    op.drop_table("loose_objects")
    op.drop_column("uploads", "file_expires_after_s")
    op.drop_index("ix_files_expires_at", table_name="files")
    op.drop_column("files", "expires_at")
