"""Organizations and their projects: who the tenants are.

An organization has a default project from the start. Jobs, files, models and uploads keep their project from being
deleted, and so their organization; so one that is deleted must own nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from sqlalchemy import delete, exists, func, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from jobs.db import Database
from jobs.errors import InvalidStateError, NotFoundError
from jobs.ids import new_organization_id, new_project_id
from jobs.models import ApiKey, File, Job, Organization, Project, Submission, TunedModel, Upload
from jobs.owner import Owner
from jobs.reads import Page
from jobs.webhook_models import WebhookEndpoint

DEFAULT_ORGANIZATION = "org-local"
"""The organization that runs the service: it was there first, and its administrators manage the others."""

Row = TypeVar("Row")

_DEFAULT_PROJECT = "Default project"


def ensure_organization(session: Session, organization_id: str) -> str:
    """Make the organization if there is none of this id. Returns the id of its default project."""
    organization = upsert(Organization).values(id=organization_id, name=organization_id)
    session.execute(organization.on_conflict_do_nothing())
    project = upsert(Project).values(
        id=new_project_id(), organization_id=organization_id, name=_DEFAULT_PROJECT, is_default=True
    )
    session.execute(
        project.on_conflict_do_nothing(index_elements=[Project.organization_id], index_where=text("is_default"))
    )
    return default_project_id(session, organization_id)


def default_project_id(session: Session, organization_id: str) -> str:
    """The id of an organization's default project."""
    return session.scalars(
        select(Project.id).where(Project.organization_id == organization_id, Project.is_default)
    ).one()


def project_of(session: Session, owner: Owner) -> str:
    """The id of the project that something new comes to belong to. Requests name theirs; for whoever names none, it is
    the default one, which is made, with its organization, where there is none."""
    return owner.project_id or ensure_organization(session, owner.organization_id)


def create_organization(db: Database, *, name: str, quotas: Mapping[str, int | None]) -> Organization:
    """A new organization with a default project and these quotas (names of columns)."""
    with db.transaction() as session:
        organization_id = new_organization_id()
        ensure_organization(session, organization_id)
        return _update(session, organization_id, {"name": name, **quotas})


def update_organization(db: Database, organization_id: str, values: Mapping[str, str | int | None]) -> Organization:
    """Change an organization's name or quotas (names of columns). What it has beyond a new quota stays.

    Raises:
        NotFoundError: there is no such organization.
    """
    with db.transaction() as session:
        _existing(session, organization_id)
        return _update(session, organization_id, values)


def delete_organization(db: Database, organization_id: str) -> None:
    """Remove an organization that owns nothing, with its keys, projects and webhooks.

    Raises:
        NotFoundError: there is no such organization.
        InvalidStateError: it owns something, or it is the one that runs the service.
    """
    if organization_id == DEFAULT_ORGANIZATION:
        raise InvalidStateError(f"{organization_id} runs this service and cannot be deleted.")
    with db.transaction() as session:
        _existing(session, organization_id, lock=True)
        # Waits for whoever is just making something in one of its projects; what comes later finds none.
        session.execute(select(Project.id).where(Project.organization_id == organization_id).with_for_update())
        _refuse_owner(session, organization_id)
        for owned in (WebhookEndpoint, Submission, ApiKey, Project):
            session.execute(delete(owned).where(owned.organization_id == organization_id))
        session.execute(delete(Organization).where(Organization.id == organization_id))


def get_organization(db: Database, organization_id: str) -> Organization:
    """One organization.

    Raises:
        NotFoundError: there is no such organization.
    """
    with db.read() as session:
        return _existing(session, organization_id)


def list_organizations(db: Database, *, limit: int, after: str | None = None) -> Page[Organization]:
    """Organizations, oldest first.

    Raises:
        NotFoundError: `after` is none.
    """
    query = select(Organization).order_by(Organization.created_at, Organization.id).limit(limit + 1)
    with db.read() as session:
        if after is not None:
            last = _existing(session, after)
            query = query.where(tuple_(Organization.created_at, Organization.id) > tuple_(last.created_at, last.id))
        return _page(session.scalars(query).all(), limit)


def create_project(db: Database, *, organization_id: str, name: str) -> Project:
    """A new project."""
    with db.transaction() as session:
        project = Project(id=new_project_id(), organization_id=organization_id, name=name)
        session.add(project)
        session.flush()
        session.refresh(project)
        return project


def rename_project(db: Database, *, organization_id: str, project_id: str, name: str) -> Project:
    """Give a project another name.

    Raises:
        NotFoundError: no such project of this organization.
    """
    with db.transaction() as session:
        project = owned_project(session, organization_id, project_id)
        project.name = name
        return project


def archive_project(db: Database, *, organization_id: str, project_id: str) -> Project:
    """Close a project for good: its keys are revoked. What it made stays.

    Raises:
        NotFoundError: no such project of this organization.
        InvalidStateError: it is the default one.
    """
    with db.transaction() as session:
        project = owned_project(session, organization_id, project_id, lock=True)
        if project.is_default:
            raise InvalidStateError(f"{project_id} is the organization's default project and cannot be archived.")
        if project.archived_at is None:
            session.execute(update(Project).where(Project.id == project_id).values(archived_at=func.now()))
            unrevoked = (ApiKey.project_id == project_id) & ApiKey.revoked_at.is_(None)
            session.execute(update(ApiKey).where(unrevoked).values(revoked_at=func.now()))
            session.refresh(project)
        return project


def get_project(db: Database, *, organization_id: str, project_id: str) -> Project:
    """One project.

    Raises:
        NotFoundError: no such project of this organization.
    """
    with db.read() as session:
        return owned_project(session, organization_id, project_id)


def list_projects(
    db: Database, *, organization_id: str, limit: int, after: str | None = None, include_archived: bool = False
) -> Page[Project]:
    """An organization's projects, oldest first.

    Raises:
        NotFoundError: `after` is none of them.
    """
    query = select(Project).where(Project.organization_id == organization_id)
    if not include_archived:
        query = query.where(Project.archived_at.is_(None))
    with db.read() as session:
        if after is not None:
            last = owned_project(session, organization_id, after)
            query = query.where(tuple_(Project.created_at, Project.id) > tuple_(last.created_at, last.id))
        rows = session.scalars(query.order_by(Project.created_at, Project.id).limit(limit + 1)).all()
        return _page(rows, limit)


def owned_project(session: Session, organization_id: str, project_id: str, *, lock: bool = False) -> Project:
    """A project of this organization; its row locked if asked for.

    Raises:
        NotFoundError: there is no such one.
    """
    query = select(Project).where(Project.id == project_id, Project.organization_id == organization_id)
    project = session.scalar(query.with_for_update() if lock else query)
    if project is None:
        raise NotFoundError(f"No such project: {project_id}", param="project_id")
    return project


def is_active_project(db: Database, owner: Owner) -> bool:
    """Whether an organization has this project, and has not archived it."""
    query = select(Project.id).where(
        Project.id == owner.project_id,
        Project.organization_id == owner.organization_id,
        Project.archived_at.is_(None),
    )
    with db.read() as session:
        return session.scalar(query) is not None


def _existing(session: Session, organization_id: str, *, lock: bool = False) -> Organization:
    query = select(Organization).where(Organization.id == organization_id)
    organization = session.scalar(query.with_for_update() if lock else query)
    if organization is None:
        raise NotFoundError(f"No such organization: {organization_id}", param="organization_id")
    return organization


def _refuse_owner(session: Session, organization_id: str) -> None:
    for table, what in ((Job, "jobs"), (File, "files"), (TunedModel, "models"), (Upload, "uploads")):
        if session.scalar(select(exists().where(table.organization_id == organization_id))):
            raise InvalidStateError(f"{organization_id} still has {what}: delete them first, or revoke its keys.")


def _update(session: Session, organization_id: str, values: Mapping[str, str | int | None]) -> Organization:
    organization = session.get_one(Organization, organization_id)
    if values:
        session.execute(update(Organization).where(Organization.id == organization_id).values(**values))
        session.refresh(organization)
    return organization


def _page(rows: Sequence[Row], limit: int) -> Page[Row]:
    return Page(rows[:limit], has_more=len(rows) > limit)
