"""A queued job may be paused, and what engines print is kept by line."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# As in 0001, with `queued` to `paused`.
TRANSITIONS = """
CREATE OR REPLACE FUNCTION jobs_check_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT (OLD.status, NEW.status) IN (
        ('validating_files', 'queued'), ('validating_files', 'failed'), ('validating_files', 'cancelled'),
        ('queued', 'running'), {queued_to_paused}('queued', 'failed'), ('queued', 'cancelled'),
        ('running', 'queued'), ('running', 'paused'), ('running', 'succeeded'), ('running', 'failed'),
        ('running', 'cancelled'),
        ('paused', 'queued'), ('paused', 'cancelled')
    ) THEN
        RAISE EXCEPTION 'job % cannot go from % to %', OLD.id, OLD.status, NEW.status USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;
"""


def upgrade() -> None:
    op.execute(TRANSITIONS.format(queued_to_paused="('queued', 'paused'), "))
    op.add_column("jobs", sa.Column("last_log_seq", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column(
        "attempts", sa.Column("shipped_log_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False)
    )
    op.create_table(
        "log_lines",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_log_lines_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("pk_log_lines")),
    )


def downgrade() -> None:
    op.drop_table("log_lines")
    op.drop_column("attempts", "shipped_log_bytes")
    op.drop_column("jobs", "last_log_seq")
    op.execute(TRANSITIONS.format(queued_to_paused=""))
