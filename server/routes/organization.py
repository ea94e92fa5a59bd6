"""`/v1/organization/...`: the caller's own organization: its projects, its keys, and what it uses. OpenAI's names."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from jobs import key_admin, organizations, quotas
from jobs.errors import InvalidRequestError
from jobs.key_admin import KeyChange, KeyPlace, KeyRequest
from jobs.keys import Principal
from jobs.scopes import ALL, OF_TENANTS, ORDINARY, Scope, parse_scopes
from server.audit import note
from server.deps import (
    Caller,
    CreateAdminKeyBody,
    CreateKeyBody,
    NameBody,
    RotateBody,
    ServicesDep,
    UpdateKeyBody,
    authenticated,
)
from server.describe_tenants import describe_key, describe_new_key, describe_project, describe_usage, edges
from server.schemas import tenants as schemas
from server.services import Services

router = APIRouter(prefix="/v1/organization", dependencies=[Depends(authenticated)])

_KEY_DELETED, _ADMIN_KEY_DELETED = "organization.project.api_key.deleted", "organization.admin_api_key.deleted"


@router.get("/usage")
def get_usage(caller: Caller, services: ServicesDep) -> schemas.Usage:
    """What the organization uses, and may use."""
    data_dir = services.settings.data_dir
    return describe_usage(quotas.read_usage(services.db, organization_id=caller.organization_id, data_dir=data_dir))


@router.get("/projects")
def list_projects(
    caller: Caller, services: ServicesDep, query: Annotated[schemas.ProjectsQuery, Query()]
) -> schemas.ProjectList:
    """The organization's projects."""
    page = organizations.list_projects(
        services.db,
        organization_id=caller.organization_id,
        limit=query.limit,
        after=query.after,
        include_archived=query.include_archived,
    )
    data = [describe_project(project) for project in page.items]
    return schemas.ProjectList(data=data, has_more=page.has_more, **edges(data))


@router.post("/projects")
def create_project(body: NameBody, caller: Caller, services: ServicesDep) -> schemas.Project:
    """Make a project."""
    project = organizations.create_project(services.db, organization_id=caller.organization_id, name=body.name)
    note("project_created", caller, project_id=project.id, name=project.name)
    return describe_project(project)


@router.get("/projects/{project_id}")
def get_project(project_id: str, caller: Caller, services: ServicesDep) -> schemas.Project:
    """One project."""
    return describe_project(
        organizations.get_project(services.db, organization_id=caller.organization_id, project_id=project_id)
    )


@router.post("/projects/{project_id}")
def rename_project(project_id: str, body: NameBody, caller: Caller, services: ServicesDep) -> schemas.Project:
    """Give a project another name."""
    project = organizations.rename_project(
        services.db, organization_id=caller.organization_id, project_id=project_id, name=body.name
    )
    note("project_renamed", caller, project_id=project.id, name=project.name)
    return describe_project(project)


@router.post("/projects/{project_id}/archive")
def archive_project(project_id: str, caller: Caller, services: ServicesDep) -> schemas.Project:
    """Close a project and revoke its keys."""
    project = organizations.archive_project(services.db, organization_id=caller.organization_id, project_id=project_id)
    services.authenticator.doubt(caller.organization_id)
    note("project_archived", caller, project_id=project.id)
    return describe_project(project)


@router.get("/projects/{project_id}/api_keys")
def list_keys(
    project_id: str, caller: Caller, services: ServicesDep, query: Annotated[schemas.TenantsQuery, Query()]
) -> schemas.KeyList:
    """A project's keys."""
    return _list(services, KeyPlace(organization_id=caller.organization_id, project_id=project_id), query)


@router.post("/projects/{project_id}/api_keys")
def create_key(project_id: str, body: CreateKeyBody, caller: Caller, services: ServicesDep) -> schemas.NewKey:
    """Make a key; this answer alone has its value."""
    request = KeyRequest(
        organization_id=caller.organization_id,
        project_id=project_id,
        name=body.name,
        scopes=_grant(body.scopes, caller),
        lifetime_s=body.expires_in_seconds,
    )
    return create_and_note(services, caller, request, as_admin=False)


@router.get("/projects/{project_id}/api_keys/{key_id}")
def get_key(project_id: str, key_id: str, caller: Caller, services: ServicesDep) -> schemas.Key:
    """One key of a project."""
    place = KeyPlace(organization_id=caller.organization_id, project_id=project_id)
    return describe_key(key_admin.get(services.db, place, key_id), as_admin=False)


@router.post("/projects/{project_id}/api_keys/{key_id}")
def update_key(project_id: str, key_id: str, body: UpdateKeyBody, caller: Caller, services: ServicesDep) -> schemas.Key:
    """Change a key's name, scopes or end."""
    place = KeyPlace(organization_id=caller.organization_id, project_id=project_id)
    scopes = None if body.scopes is None else _grant(body.scopes, caller)
    change = KeyChange(name=body.name, scopes=scopes, lifetime_s=body.expires_in_seconds)
    key = key_admin.change(services.db, place, key_id, change)
    services.authenticator.doubt(key.organization_id)
    note(
        "api_key_changed",
        caller,
        key_id=key.id,
        organization_id=key.organization_id,
        **body.model_dump(exclude_unset=True),
    )
    return describe_key(key, as_admin=False)


@router.post("/projects/{project_id}/api_keys/{key_id}/rotate")
def rotate_key(project_id: str, key_id: str, body: RotateBody, caller: Caller, services: ServicesDep) -> schemas.NewKey:
    """Give a key another secret."""
    place = KeyPlace(organization_id=caller.organization_id, project_id=project_id)
    return _rotate(services, caller, place, key_id, grace_s=body.grace_s)


@router.delete("/projects/{project_id}/api_keys/{key_id}")
def revoke_key(project_id: str, key_id: str, caller: Caller, services: ServicesDep) -> schemas.Deleted:
    """Revoke a key."""
    place = KeyPlace(organization_id=caller.organization_id, project_id=project_id)
    return _revoke(services, caller, place, key_id)


@router.get("/admin_api_keys")
def list_admin_keys(
    caller: Caller, services: ServicesDep, query: Annotated[schemas.TenantsQuery, Query()]
) -> schemas.KeyList:
    """The keys that administer the organization."""
    return _list(services, KeyPlace(organization_id=caller.organization_id, admin_only=True), query)


@router.post("/admin_api_keys")
def create_admin_key(body: CreateAdminKeyBody, caller: Caller, services: ServicesDep) -> schemas.NewKey:
    """Make a key that administers, and may do everything else, too."""
    request = KeyRequest(
        organization_id=caller.organization_id,
        name=body.name,
        scopes=grantable(caller),
        lifetime_s=body.expires_in_seconds,
    )
    return create_and_note(services, caller, request, as_admin=True)


@router.get("/admin_api_keys/{key_id}")
def get_admin_key(key_id: str, caller: Caller, services: ServicesDep) -> schemas.Key:
    """One key that administers."""
    place = KeyPlace(organization_id=caller.organization_id, admin_only=True)
    return describe_key(key_admin.get(services.db, place, key_id), as_admin=True)


@router.post("/admin_api_keys/{key_id}/rotate")
def rotate_admin_key(key_id: str, body: RotateBody, caller: Caller, services: ServicesDep) -> schemas.NewKey:
    """Give a key that administers another secret."""
    place = KeyPlace(organization_id=caller.organization_id, admin_only=True)
    return _rotate(services, caller, place, key_id, grace_s=body.grace_s)


@router.delete("/admin_api_keys/{key_id}")
def revoke_admin_key(key_id: str, caller: Caller, services: ServicesDep) -> schemas.Deleted:
    """Revoke a key that administers."""
    return _revoke(services, caller, KeyPlace(organization_id=caller.organization_id, admin_only=True), key_id)


def grantable(caller: Principal) -> frozenset[Scope]:
    """The scopes that an administrator may give: a tenant's cannot give those of the whole service."""
    return ALL if caller.is_operator else OF_TENANTS | {Scope.ADMIN}


def create_and_note(services: Services, caller: Principal, request: KeyRequest, *, as_admin: bool) -> schemas.NewKey:
    """Make a key and write down who did."""
    key, token = key_admin.create(services.db, request)
    note(
        "api_key_created",
        caller,
        key_id=key.id,
        name=key.name,
        organization_id=key.organization_id,
        project_id=key.project_id,
        scopes=key.scopes,
    )
    return describe_new_key(key, token, as_admin=as_admin)


def _grant(names: list[str] | None, caller: Principal) -> frozenset[Scope]:
    """The scopes of a new key.

    Raises:
        InvalidRequestError: one is unknown, or not the caller's to give.
    """
    if names is None:
        return grantable(caller) & ORDINARY
    scopes = parse_scopes(names)
    beyond = sorted(scopes - grantable(caller))
    if beyond:
        message = f"The scope {beyond[0]} is about the whole service: only the organization that runs it may give it."
        raise InvalidRequestError(message, param="scopes")
    return scopes


def _list(services: Services, place: KeyPlace, query: schemas.TenantsQuery) -> schemas.KeyList:
    page = key_admin.list_keys(services.db, place, limit=query.limit, after=query.after)
    data = [describe_key(key, as_admin=place.admin_only) for key in page.items]
    return schemas.KeyList(data=data, has_more=page.has_more, **edges(data))


def _rotate(services: Services, caller: Principal, place: KeyPlace, key_id: str, *, grace_s: int) -> schemas.NewKey:
    key, token = key_admin.rotate(services.db, place, key_id, grace_s=grace_s)
    services.authenticator.doubt(key.organization_id)
    note("api_key_rotated", caller, key_id=key.id, organization_id=key.organization_id, grace_s=grace_s)
    return describe_new_key(key, token, as_admin=place.admin_only)


def _revoke(services: Services, caller: Principal, place: KeyPlace, key_id: str) -> schemas.Deleted:
    key_admin.revoke(services.db, place, key_id)
    services.authenticator.doubt(place.organization_id)
    note("api_key_revoked", caller, key_id=key_id, organization_id=place.organization_id)
    return schemas.Deleted(object=_ADMIN_KEY_DELETED if place.admin_only else _KEY_DELETED, id=key_id)
