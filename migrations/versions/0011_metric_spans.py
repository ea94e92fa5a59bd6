"""Figures of consecutive steps in one row, so that a chart of a long run reads few."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# As the program made them when this was written; a migration does not change with it.
_FILL = """
    INSERT INTO metric_spans
    SELECT DISTINCT ON (m.job_id, (m.step - 1) / {span})
        m.job_id, {span}, (m.step - 1) / {span}, m.step, m.attempt, m.created_at, m.epoch, m.loss,
        min({low}) OVER w, max({high}) OVER w, m.mean_token_accuracy, m.learning_rate, max(m.grad_norm) OVER w,
        avg(m.tokens_per_s) OVER w, m.step_s, m.parameters_bytes, max(m.gradients_bytes) OVER w, m.optimizer_bytes,
        max(m.activations_bytes) OVER w, m.other_bytes, max(m.peak_bytes) OVER w
    FROM {source} AS m JOIN jobs j ON j.id = m.job_id
    WHERE m.step > 0 AND (m.step - 1) / {span} < j.step / {span}
    WINDOW w AS (PARTITION BY m.job_id, (m.step - 1) / {span})
    ORDER BY m.job_id, (m.step - 1) / {span}, m.step DESC
"""


def upgrade() -> None:
    op.create_table(
        "metric_spans",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("span", sa.Integer(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("epoch", sa.Double(), nullable=False),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("loss_min", sa.Double(), nullable=True),
        sa.Column("loss_max", sa.Double(), nullable=True),
        sa.Column("mean_token_accuracy", sa.Double(), nullable=True),
        sa.Column("learning_rate", sa.Double(), nullable=False),
        sa.Column("grad_norm", sa.Double(), nullable=True),
        sa.Column("tokens_per_s", sa.Double(), nullable=False),
        sa.Column("step_s", sa.Double(), nullable=False),
        sa.Column("parameters_bytes", sa.BigInteger(), nullable=False),
        sa.Column("gradients_bytes", sa.BigInteger(), nullable=False),
        sa.Column("optimizer_bytes", sa.BigInteger(), nullable=False),
        sa.Column("activations_bytes", sa.BigInteger(), nullable=False),
        sa.Column("other_bytes", sa.BigInteger(), nullable=False),
        sa.Column("peak_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_metric_spans_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "span", "number", name=op.f("pk_metric_spans")),
    )
    op.execute(_FILL.format(span=16, source="metrics", low="m.loss", high="m.loss"))
    for span, finer in ((256, 16), (4096, 256)):
        source = f"(SELECT * FROM metric_spans WHERE span = {finer})"  # noqa: S608  # a number of ours
        op.execute(_FILL.format(span=span, source=source, low="m.loss_min", high="m.loss_max"))


def downgrade() -> None:
    op.drop_table("metric_spans")
