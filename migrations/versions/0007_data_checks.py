"""The checks of jobs' files, and their reports."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "data_checks",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("training_file", sa.Text(), nullable=False),
        sa.Column("validation_file", sa.Text(), nullable=True),
        sa.Column("number", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("token", sa.Uuid(), nullable=True),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("checked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("report", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("summary", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.CheckConstraint("(token IS NULL) = (expires_at IS NULL)", name=op.f("ck_data_checks_claim_whole")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_data_checks_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_data_checks")),
    )
    op.create_index("ix_data_checks_training_file", "data_checks", ["training_file", "checked_at"], unique=False)
    op.create_index("ix_data_checks_validation_file", "data_checks", ["validation_file", "checked_at"], unique=False)
    op.create_index(
        "ix_jobs_validating",
        "jobs",
        [sa.literal_column("priority DESC"), "created_at"],
        unique=False,
        postgresql_where=sa.text("status = 'validating_files'"),
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_validating", table_name="jobs", postgresql_where=sa.text("status = 'validating_files'"))
    op.drop_table("data_checks")
