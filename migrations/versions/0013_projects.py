"""Projects are walls: whatever belongs to an organization belongs to one of its projects, and keeps it from going."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

_LABELLED = ("jobs", "files")
_NEW = ("uploads", "models", "webhook_endpoints", "submissions")

# Every organization that owns something, and a default project of each, in case that one is missing.
PROJECTS = """
INSERT INTO organizations (id, name)
SELECT DISTINCT organization_id, organization_id FROM (
    SELECT organization_id FROM jobs UNION SELECT organization_id FROM files UNION SELECT organization_id FROM uploads
    UNION SELECT organization_id FROM models UNION SELECT organization_id FROM webhook_endpoints
    UNION SELECT organization_id FROM submissions
) found
ON CONFLICT DO NOTHING;
INSERT INTO projects (id, organization_id, name, is_default)
SELECT 'proj_' || substr(md5(random()::text || id), 1, 24), id, 'Default project', true FROM organizations
ON CONFLICT (organization_id) WHERE is_default DO NOTHING;
"""

# What is a job's or a file's, or was asked for by a key, goes where these are; all else to the default project.
KNOWN = """
UPDATE models SET project_id = jobs.project_id FROM jobs WHERE jobs.id = models.job_id;
UPDATE uploads SET project_id = files.project_id FROM files WHERE files.id = uploads.file_id;
UPDATE submissions SET project_id = jobs.project_id FROM jobs WHERE jobs.id = submissions.job_id;
UPDATE submissions SET project_id = api_keys.project_id FROM api_keys
WHERE submissions.project_id IS NULL AND api_keys.id = submissions.api_key_id;
"""


def upgrade() -> None:
    op.execute(PROJECTS)
    for table in _LABELLED:
        op.drop_constraint(op.f(f"fk_{table}_project_id"), table, type_="foreignkey")
        _give_default(table)
    for table in _NEW:
        op.add_column(table, sa.Column("project_id", sa.Text(), nullable=True))
    op.execute(KNOWN)
    for table in _NEW:
        _give_default(table)
    for table in (*_LABELLED, *_NEW):
        op.alter_column(table, "project_id", nullable=False)
        op.create_foreign_key(op.f(f"fk_{table}_project_id"), table, "projects", ["project_id"], ["id"])
    for table in ("files", "uploads", "models", "webhook_endpoints"):
        op.create_index(op.f(f"ix_{table}_project_id"), table, ["project_id"])
    op.create_index("ix_jobs_project_page", "jobs", ["organization_id", "project_id", "created_at", "id"])
    op.drop_constraint(op.f("uq_submissions_organization_id_idempotency_key"), "submissions", type_="unique")
    op.create_unique_constraint(
        op.f("uq_submissions_project_id_idempotency_key"), "submissions", ["project_id", "idempotency_key"]
    )


def downgrade() -> None:
    # Two projects may have used the same key: the organization then remembers neither.
    op.execute("""
        DELETE FROM submissions s USING submissions other
        WHERE s.organization_id = other.organization_id AND s.idempotency_key = other.idempotency_key
            AND s.id <> other.id
    """)
    op.drop_constraint(op.f("uq_submissions_project_id_idempotency_key"), "submissions", type_="unique")
    op.create_unique_constraint(
        op.f("uq_submissions_organization_id_idempotency_key"), "submissions", ["organization_id", "idempotency_key"]
    )
    op.drop_index("ix_jobs_project_page", table_name="jobs")
    op.drop_index(op.f("ix_files_project_id"), table_name="files")
    for table in _NEW:
        op.drop_column(table, "project_id")
    for table in _LABELLED:
        op.drop_constraint(op.f(f"fk_{table}_project_id"), table, type_="foreignkey")
        op.alter_column(table, "project_id", nullable=True)
        op.create_foreign_key(
            op.f(f"fk_{table}_project_id"), table, "projects", ["project_id"], ["id"], ondelete="SET NULL"
        )


def _give_default(table: str) -> None:
    op.execute(
        f"UPDATE {table} SET project_id = projects.id FROM projects"  # noqa: S608 - one of ours
        f" WHERE {table}.project_id IS NULL AND projects.organization_id = {table}.organization_id"
        " AND projects.is_default"
    )
