"""Requests that may come twice, and the files that jobs leave behind."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


# The new columns of `files` may be NULL, so that a server of the version before goes on writing its rows.
def upgrade() -> None:
    op.create_table(
        "submissions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("organization_id", sa.Text(), nullable=False),
        sa.Column("api_key_id", sa.Text(), nullable=True),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("body_sha256", sa.Text(), nullable=False),
        sa.Column("num_retries", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["api_key_id"], ["api_keys.id"], name=op.f("fk_submissions_api_key_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_submissions_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_submissions")),
        sa.UniqueConstraint(
            "organization_id", "idempotency_key", name=op.f("uq_submissions_organization_id_idempotency_key")
        ),
    )
    op.create_index(op.f("ix_submissions_created_at"), "submissions", ["created_at"], unique=False)
    op.create_index(
        op.f("ix_submissions_api_key_id_body_sha256"), "submissions", ["api_key_id", "body_sha256"], unique=False
    )
    op.add_column("files", sa.Column("job_id", sa.Text(), nullable=True))
    op.add_column("files", sa.Column("path", sa.Text(), nullable=True))
    op.create_foreign_key(op.f("fk_files_job_id"), "files", "jobs", ["job_id"], ["id"], ondelete="SET NULL")
    op.create_index(op.f("ix_files_job_id"), "files", ["job_id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_files_job_id"), table_name="files")
    op.drop_constraint(op.f("fk_files_job_id"), "files", type_="foreignkey")
    op.drop_column("files", "path")
    op.drop_column("files", "job_id")
    op.drop_table("submissions")
