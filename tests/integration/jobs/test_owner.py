"""Whose a row is: the condition of a query, the one of a statement that is built once, and what a new row gets."""

from __future__ import annotations

import re
from typing import Any

import pytest
from alembic import command
from sqlalchemy import Engine, event, select, text

from jobs import lifecycle, migrate, organizations, reads
from jobs.db import Database
from jobs.errors import InvalidStateError
from jobs.models import File, Job, Submission, TunedModel, Upload
from jobs.owner import OwnedTable, Owner, is_owned
from jobs.webhook_models import WebhookEndpoint

from .conftest import LEASE_S, submit_to

TABLES: tuple[OwnedTable, ...] = (File, Job, Submission, TunedModel, Upload, WebhookEndpoint)


@pytest.fixture
def projects(db: Database) -> tuple[Owner, Owner, Owner]:
    """Two projects of one organization and one of another."""
    made = []
    for organization_id in ("org-a", "org-b"):
        with db.transaction() as session:
            made.append(Owner(organization_id, organizations.ensure_organization(session, organization_id)))
    other = organizations.create_project(db, organization_id="org-a", name="Other")
    return made[0], Owner("org-a", other.id), made[1]


def test_a_row_is_its_projects_and_its_organizations(db: Database, projects: tuple[Owner, Owner, Owner]) -> None:
    jobs = [submit_to(db, project) for project in projects]
    views = {
        projects[0]: {jobs[0].id},
        projects[1]: {jobs[1].id},
        projects[2]: {jobs[2].id},
        Owner("org-a"): {jobs[0].id, jobs[1].id},
        # A project is nobody else's, whoever asks for it.
        Owner("org-b", projects[0].project_id): set(),
        Owner("org-none"): set(),
    }
    for owner, seen in views.items():
        with db.read() as session:
            found = session.scalars(select(Job.id).where(owner.owns(Job))).all()
            again = session.scalars(select(Job.id).where(is_owned(Job)), owner.parameters).all()
        assert (set(found), set(again)) == (seen, seen), owner
        assert {job.id for job in jobs if owner.has(job)} == seen, owner


def test_what_names_no_project_is_the_default_ones(db: Database) -> None:
    job = submit_to(db, Owner("org-new"))
    with db.read() as session:
        assert job.project_id == organizations.default_project_id(session, "org-new")


def test_a_model_is_its_jobs_projects(db: Database, projects: tuple[Owner, Owner, Owner]) -> None:
    submit_to(db, projects[1])
    claim = lifecycle.claim(db, owner="host/1", lease_s=LEASE_S)
    assert claim is not None
    name = lifecycle.succeed(db, claim.lease, model_path="runs/x/model", weights_sha256="", trained_tokens=1)
    assert reads.find_model(db, owner=projects[0], model_id=name) is None
    assert [model.id for model in reads.list_models(db, owner=projects[1])] == [name]
    assert [model.id for model in reads.list_models(db, owner=Owner("org-a"))] == [name]


def test_an_organization_goes_with_what_nobody_needs_and_stays_with_the_rest(
    db: Database, projects: tuple[Owner, Owner, Owner]
) -> None:
    with db.transaction() as session:
        session.execute(
            text(
                "INSERT INTO submissions (organization_id, project_id, body_sha256)"
                " SELECT organization_id, id, '' FROM projects"
            )
        )
        session.execute(
            text(
                "INSERT INTO webhook_endpoints (id, organization_id, project_id, name, url, event_types, secret)"
                " SELECT id, organization_id, id, '', '', '{}', '' FROM projects"
            )
        )
    submit_to(db, projects[1])
    with pytest.raises(InvalidStateError, match="still has jobs"):
        organizations.delete_organization(db, "org-a")
    organizations.delete_organization(db, "org-b")
    with db.read() as session:
        for table in TABLES:
            assert session.scalar(select(table.id).where(Owner("org-b").owns(table))) is None


# Of two projects of one organization and of another, the second one's the oldest.
MANY_JOBS = """
INSERT INTO jobs (id, organization_id, project_id, status, spec, created_at)
SELECT id || n, organization_id, id, 'queued', '{}', now() - make_interval(0, 0, 0, days, 0, 0, n)
FROM (VALUES (:first, 0), (:second, 300), (:third, 0)) AS of_project (project_id, days)
    JOIN projects ON id = project_id, generate_series(1, 5000) AS n
"""


@pytest.mark.parametrize("which", [0, 1, None])
def test_a_page_of_jobs_is_read_by_an_index_alone(
    db: Database, projects: tuple[Owner, Owner, Owner], which: int | None
) -> None:
    with db.transaction() as session:
        names = ("first", "second", "third")
        session.execute(text(MANY_JOBS), {name: owner.project_id for name, owner in zip(names, projects, strict=True)})
        session.execute(text("ANALYZE jobs"))
    asked: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        asked.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        page = reads.list_jobs(db, owner=Owner("org-a") if which is None else projects[which], limit=20)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len(page.items) == 20
    [(statement, parameters)] = asked
    with db.read() as session:
        plan = "\n".join(session.connection().exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars())
    index = "ix_jobs_organization_id_created_at_id" if which is None else "ix_jobs_project_page"
    assert f"Index Scan Backward using {index}" in plan
    assert not re.search("Filter|Sort", plan), plan


OLD_ROWS = """
INSERT INTO organizations (id, name) VALUES ('org-a', 'A');
INSERT INTO projects (id, organization_id, name, is_default)
VALUES ('proj_a', 'org-a', 'Default project', true), ('proj_other', 'org-a', 'Other', false);
INSERT INTO api_keys (id, organization_id, project_id, name, scopes, secret_sha256)
VALUES ('key', 'org-a', 'proj_other', 'ci', '{}', '');
INSERT INTO jobs (id, organization_id, project_id, status, spec, fine_tuned_model, finished_at) VALUES
    ('job-1', 'org-a', NULL, 'succeeded', '{}', 'ft:1', now()),
    ('job-2', 'org-a', 'proj_other', 'succeeded', '{}', 'ft:2', now()),
    ('job-3', 'org-lost', NULL, 'queued', '{}', NULL, NULL);
INSERT INTO models (id, organization_id, job_id, path, weights_sha256)
VALUES ('ft:1', 'org-a', 'job-1', '', ''), ('ft:2', 'org-a', 'job-2', '', '');
INSERT INTO files (id, organization_id, project_id, filename, purpose, num_bytes, sha256)
VALUES ('file-1', 'org-a', NULL, '', '', 1, ''), ('file-2', 'org-a', 'proj_other', '', '', 1, '');
INSERT INTO uploads (id, organization_id, filename, purpose, num_bytes, status, file_id, part_ids, expires_at) VALUES
    ('upload-1', 'org-a', '', '', 1, 'pending', NULL, NULL, now()),
    ('upload-2', 'org-a', '', '', 1, 'completed', 'file-2', '{}', now());
INSERT INTO submissions (organization_id, api_key_id, idempotency_key, body_sha256, job_id) VALUES
    ('org-a', NULL, 'a', '', NULL), ('org-a', 'key', 'b', '', NULL), ('org-a', NULL, 'c', '', 'job-2');
INSERT INTO webhook_endpoints (id, organization_id, name, url, event_types, secret)
VALUES ('wh', 'org-a', '', '', '{}', '');
"""


def test_what_had_no_project_gets_one(empty_database_url: str) -> None:
    config = migrate.alembic_config(empty_database_url)
    command.upgrade(config, "0012")
    db = Database(empty_database_url)
    with db.transaction() as session:
        session.execute(text(OLD_ROWS))
    migrate.upgrade(empty_database_url)
    with db.read() as session:
        found = {
            table.__tablename__: session.scalars(
                select(table.project_id).where(table.organization_id == "org-a").order_by(table.id)
            ).all()
            for table in TABLES
        }
        assert found == {
            "files": ["proj_a", "proj_other"],
            "jobs": ["proj_a", "proj_other"],
            "models": ["proj_a", "proj_other"],
            "submissions": ["proj_a", "proj_other", "proj_other"],
            "uploads": ["proj_a", "proj_other"],
            "webhook_endpoints": ["proj_a"],
        }
        lost = session.scalars(select(Job.project_id).where(Job.organization_id == "org-lost")).one()
        assert lost == organizations.default_project_id(session, "org-lost")
    command.downgrade(config, "0012")
    db.dispose()
