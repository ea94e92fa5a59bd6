"""`/v1/organizations`: every organization and its quotas, for whoever runs the service. OpenAI has nothing like it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query

from jobs import organizations, quotas
from jobs.key_admin import KeyRequest
from jobs.keys import Principal
from jobs.scopes import OF_TENANTS, Scope
from server.audit import note
from server.deps import Caller, CreateAdminKeyBody, CreateOrganizationBody, ServicesDep, UpdateOrganizationBody
from server.describe_tenants import describe_organization, describe_usage, edges
from server.errors import forbidden
from server.routes.organization import create_and_note, grantable
from server.schemas import tenants as schemas


def operator(caller: Caller) -> Principal:
    """The caller, who runs the service.

    Raises:
        ApiError: 403 for an administrator of another organization.
    """
    if not caller.is_operator:
        message = "Organizations are managed by whoever runs this service; your key administers its own organization."
        raise forbidden(message, code="operator_only")
    return caller


Operator = Annotated[Principal, Depends(operator)]

router = APIRouter(prefix="/v1/organizations", dependencies=[Depends(operator)])


@router.get("")
def list_organizations(
    services: ServicesDep, query: Annotated[schemas.TenantsQuery, Query()]
) -> schemas.OrganizationList:
    """Every organization."""
    page = organizations.list_organizations(services.db, limit=query.limit, after=query.after)
    data = [describe_organization(organization) for organization in page.items]
    return schemas.OrganizationList(data=data, has_more=page.has_more, **edges(data))


@router.post("")
def create_organization(body: CreateOrganizationBody, caller: Operator, services: ServicesDep) -> schemas.Organization:
    """Make an organization. It has no key yet."""
    given = _quotas(body.quotas)
    organization = organizations.create_organization(services.db, name=body.name, quotas=given)
    note("organization_created", caller, organization_id=organization.id, name=organization.name, **given)
    return describe_organization(organization)


@router.get("/{organization_id}")
def get_organization(organization_id: str, services: ServicesDep) -> schemas.Organization:
    """One organization."""
    return describe_organization(organizations.get_organization(services.db, organization_id))


@router.post("/{organization_id}")
def update_organization(
    organization_id: str, body: UpdateOrganizationBody, caller: Operator, services: ServicesDep
) -> schemas.Organization:
    """Change its name or the quotas that are named."""
    values = _quotas(body.quotas)
    if body.name is not None:
        values["name"] = body.name
    organization = organizations.update_organization(services.db, organization_id, values)
    note("organization_changed", caller, organization_id=organization_id, **values)
    return describe_organization(organization)


@router.delete("/{organization_id}")
def delete_organization(organization_id: str, caller: Operator, services: ServicesDep) -> schemas.Deleted:
    """Remove an organization that owns nothing."""
    organizations.delete_organization(services.db, organization_id)
    services.authenticator.doubt(organization_id)
    note("organization_deleted", caller, organization_id=organization_id)
    return schemas.Deleted(object="organization.deleted", id=organization_id)


@router.get("/{organization_id}/usage")
def get_usage(organization_id: str, services: ServicesDep) -> schemas.Usage:
    """What an organization uses, and may use."""
    organizations.get_organization(services.db, organization_id)
    data_dir = services.settings.data_dir
    return describe_usage(quotas.read_usage(services.db, organization_id=organization_id, data_dir=data_dir))


@router.post("/{organization_id}/admin_api_keys")
def create_admin_key(
    organization_id: str, body: CreateAdminKeyBody, caller: Operator, services: ServicesDep
) -> schemas.NewKey:
    """Make a key that administers an organization: its first one, with which it makes the others."""
    organizations.get_organization(services.db, organization_id)
    is_own = organization_id == caller.organization_id
    request = KeyRequest(
        organization_id=organization_id,
        name=body.name,
        scopes=grantable(caller) if is_own else OF_TENANTS | {Scope.ADMIN},
        lifetime_s=body.expires_in_seconds,
    )
    return create_and_note(services, caller, request, as_admin=True)


def _quotas(body: schemas.Quotas) -> dict[str, Any]:
    """Those that are named in the body."""
    return body.model_dump(exclude_unset=True)
