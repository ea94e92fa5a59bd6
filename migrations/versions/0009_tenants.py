"""Tenants: organizations with quotas, projects, and keys with scopes, an end and a second secret."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0007"
branch_labels = None
depends_on = None

# Every organization that something is said to belong to becomes a row, with a project of its own.
ORGANIZATIONS = """
INSERT INTO organizations (id, name)
SELECT DISTINCT organization_id, organization_id FROM (
    SELECT organization_id FROM api_keys UNION SELECT organization_id FROM jobs UNION SELECT organization_id FROM files
    UNION SELECT organization_id FROM uploads UNION SELECT organization_id FROM models
) found;
INSERT INTO projects (id, organization_id, name, is_default)
SELECT 'proj_' || substr(md5(random()::text || id), 1, 24), id, 'Default project', true FROM organizations;
"""

# What a key could do before it had scopes: everything, but there was no administration. The first key of an
# installation is the one of whoever runs it.
KEYS = """
UPDATE api_keys SET project_id = p.id, scopes = ARRAY[
    'jobs:read', 'jobs:write', 'files:read', 'files:write', 'models:read', 'models:write', 'chat', 'metrics:read'
] FROM projects p WHERE p.organization_id = api_keys.organization_id AND p.is_default;
UPDATE api_keys SET scopes = scopes || ARRAY['admin'] WHERE id = (
    SELECT id FROM api_keys WHERE organization_id = 'org-local' AND name = 'admin' AND revoked_at IS NULL
    ORDER BY created_at LIMIT 1
);
"""


def upgrade() -> None:
    _create_tables()
    op.execute(ORGANIZATIONS)
    op.add_column("api_keys", sa.Column("project_id", sa.Text(), nullable=True))
    op.add_column("api_keys", sa.Column("scopes", postgresql.ARRAY(sa.Text()), nullable=True))
    op.add_column("api_keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("api_keys", sa.Column("previous_sha256", sa.Text(), nullable=True))
    op.add_column("api_keys", sa.Column("previous_expires_at", sa.DateTime(timezone=True), nullable=True))
    op.execute(KEYS)
    op.alter_column("api_keys", "project_id", nullable=False)
    op.alter_column("api_keys", "scopes", nullable=False)
    for column, table in (("organization_id", "organizations"), ("project_id", "projects")):
        name = op.f(f"fk_api_keys_{column}")
        op.create_foreign_key(name, "api_keys", table, [column], ["id"], ondelete="CASCADE")
    op.create_index(op.f("ix_api_keys_project_id"), "api_keys", ["project_id"], unique=False)
    # These may be NULL, so that a server or worker of the version before goes on writing its rows.
    for table in ("jobs", "files"):
        op.add_column(table, sa.Column("project_id", sa.Text(), nullable=True))
        name = op.f(f"fk_{table}_project_id")
        op.create_foreign_key(name, table, "projects", ["project_id"], ["id"], ondelete="SET NULL")
    op.add_column("models", sa.Column("num_bytes", sa.BigInteger(), nullable=True))


def _create_tables() -> None:
    op.create_table(
        "organizations",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("max_queued_jobs", sa.Integer(), nullable=True),
        sa.Column("max_running_jobs", sa.Integer(), nullable=True),
        sa.Column("max_gpu_seconds", sa.BigInteger(), nullable=True),
        sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True),
        sa.Column("max_priority", sa.SmallInteger(), nullable=True),
        *(
            sa.CheckConstraint(f"{name} >= 0", name=op.f(f"ck_organizations_{name}"))
            for name in ("max_queued_jobs", "max_running_jobs", "max_gpu_seconds", "max_stored_bytes")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_organizations")),
    )
    op.create_table(
        "projects",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("organization_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("is_default", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("archived_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("NOT (is_default AND archived_at IS NOT NULL)", name=op.f("ck_projects_default_stays")),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_projects_organization_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
    )
    op.create_index(op.f("ix_projects_organization_id"), "projects", ["organization_id"], unique=False)
    op.create_index(
        "uq_projects_default", "projects", ["organization_id"], unique=True, postgresql_where=sa.text("is_default")
    )


def downgrade() -> None:
    op.drop_column("models", "num_bytes")
    for table in ("files", "jobs"):
        op.drop_constraint(op.f(f"fk_{table}_project_id"), table, type_="foreignkey")
        op.drop_column(table, "project_id")
    op.drop_index(op.f("ix_api_keys_project_id"), table_name="api_keys")
    for column in ("project_id", "organization_id"):
        op.drop_constraint(op.f(f"fk_api_keys_{column}"), "api_keys", type_="foreignkey")
    for column in ("previous_expires_at", "previous_sha256", "expires_at", "scopes", "project_id"):
        op.drop_column("api_keys", column)
    op.drop_table("projects")
    op.drop_table("organizations")
