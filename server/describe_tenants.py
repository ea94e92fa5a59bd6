"""From rows to the API's organizations, projects and keys, beside `describe.py`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jobs.models import ApiKey, Organization, Project
from jobs.quotas import Usage
from jobs.scopes import Scope
from server.schemas import tenants as schemas


def describe_organization(organization: Organization) -> schemas.Organization:
    """An organization."""
    return schemas.Organization(
        id=organization.id,
        name=organization.name,
        created_at=_unix(organization.created_at),
        quotas=schemas.Quotas(**{name: getattr(organization, name) for name in schemas.Quotas.model_fields}),
    )


def describe_project(project: Project) -> schemas.Project:
    """A project."""
    return schemas.Project(
        id=project.id,
        name=project.name,
        created_at=_unix(project.created_at),
        archived_at=_unix_or_none(project.archived_at),
        status="active" if project.archived_at is None else "archived",
        is_default=project.is_default,
    )


def describe_key(key: ApiKey, *, as_admin: bool) -> schemas.Key:
    """A key, as one of a project or as one that administers."""
    return schemas.Key(**_key(key, as_admin=as_admin))


def describe_new_key(key: ApiKey, token: str, *, as_admin: bool) -> schemas.NewKey:
    """A key with its value."""
    return schemas.NewKey(**_key(key, as_admin=as_admin), value=token)


def describe_usage(usage: Usage) -> schemas.Usage:
    """What an organization uses, beside what it may."""
    organization, stored = usage.organization, usage.stored
    return schemas.Usage(
        organization_id=organization.id,
        queued_jobs=schemas.Used(used=usage.num_queued_jobs, limit=organization.max_queued_jobs),
        running_jobs=schemas.Used(used=usage.num_running_jobs, limit=organization.max_running_jobs),
        gpu_seconds=schemas.Used(used=round(usage.gpu_seconds, 1), limit=organization.max_gpu_seconds),
        stored_bytes=schemas.UsedBytes(
            used=stored.total,
            limit=organization.max_stored_bytes,
            files=stored.files,
            uploads=stored.uploads,
            models=stored.models,
            checkpoints=stored.checkpoints,
        ),
        max_priority=organization.max_priority,
    )


def edges(data: Sequence[Any]) -> dict[str, str | None]:
    """The first and the last id of a page."""
    return {"first_id": data[0].id if data else None, "last_id": data[-1].id if data else None}


def _key(key: ApiKey, *, as_admin: bool) -> dict[str, Any]:
    account = {"id": key.id, "name": key.name, "created_at": _unix(key.created_at)}
    if as_admin:
        owner = {**account, "type": "service_account", "object": "organization.service_account", "role": "owner"}
    else:
        role = "owner" if Scope.ADMIN in key.scopes else "member"
        owner = {"type": "service_account", "service_account": {**account, "role": role}}
    return {
        "object": "organization.admin_api_key" if as_admin else "organization.project.api_key",
        "id": key.id,
        "name": key.name,
        "redacted_value": f"sk-lomo-{key.id}-...",
        "created_at": _unix(key.created_at),
        "expires_at": _unix_or_none(key.expires_at),
        "last_used_at": _unix_or_none(key.last_used_at),
        "owner": owner,
        "project_id": key.project_id,
        "scopes": key.scopes,
        "previous_expires_at": _unix_or_none(key.previous_expires_at),
    }


def _unix(moment: datetime) -> int:
    return int(moment.timestamp())


def _unix_or_none(moment: datetime | None) -> int | None:
    return None if moment is None else _unix(moment)
