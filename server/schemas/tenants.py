"""Organizations, projects, API keys and what is used: OpenAI's objects where it has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from jobs.key_admin import DEFAULT_GRACE_S
from server.schemas.base import Answer, Cursor, EdgedPage, Request

Name = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]*$")
]
_MAX_BIGINT = 2**63 - 1
_MAX_INT = 2**31 - 1
# A key that is to end later than in ten years need not end.
_MAX_LIFETIME_S = 10 * 366 * 86_400
# A secret that is to be taken for longer has not been rotated.
_MAX_GRACE_S = 30 * 86_400

Count = Annotated[int, Field(ge=0, le=_MAX_INT)]
Amount = Annotated[int, Field(ge=0, le=_MAX_BIGINT)]


class Quotas(Request):
    """What an organization may use; null: as much as there is."""

    max_queued_jobs: Count | None = None
    max_running_jobs: Count | None = None
    max_gpu_seconds: Amount | None = None
    max_stored_bytes: Amount | None = None
    max_priority: Annotated[int, Field(ge=-100, le=100)] | None = None


class CreateOrganization(Request):
    """The body of `POST /v1/organizations`."""

    name: Name
    quotas: Quotas = Quotas()


class UpdateOrganization(Request):
    """What is to change; a quota that is not named stays."""

    name: Name | None = None
    quotas: Quotas = Quotas()


class Organization(Answer):
    """An organization, as whoever runs the service sees it."""

    object: Literal["organization"] = "organization"
    id: str
    name: str
    created_at: int
    quotas: Quotas


class OrganizationList(EdgedPage):
    """A page of organizations, oldest first."""

    data: list[Organization]


class Deleted(Answer):
    """The answer to a deletion."""

    object: str
    id: str
    deleted: Literal[True] = True


class NameProject(Request):
    """The body of a project's creation, and of its renaming."""

    name: Name


class Project(Answer):
    """OpenAI's `organization.project`; `is_default` is ours."""

    object: Literal["organization.project"] = "organization.project"
    id: str
    name: str
    created_at: int
    archived_at: int | None
    status: Literal["active", "archived"]
    is_default: bool


class ProjectList(EdgedPage):
    """A page of projects, oldest first."""

    data: list[Project]


class CreateAdminKey(Request):
    """The body of the creation of a key that administers; it may also do all that is not named here."""

    name: Name
    expires_in_seconds: Annotated[int, Field(ge=1, le=_MAX_LIFETIME_S)] | None = None


class CreateKey(CreateAdminKey):
    """The body of the creation of a project's key."""

    scopes: Annotated[list[Annotated[str, StringConstraints(max_length=64)]], Field(max_length=32)] | None = None
    """None: everything but `admin`, and but `metrics:read` outside of the organization that runs the service."""


class UpdateKey(Request):
    """What is to change of a project's key."""

    name: Name | None = None
    scopes: Annotated[list[Annotated[str, StringConstraints(max_length=64)]], Field(max_length=32)] | None = None
    expires_in_seconds: Annotated[int, Field(ge=1, le=_MAX_LIFETIME_S)] | None = None
    """From now on."""


class RotateKey(Request):
    """The body of a rotation."""

    grace_s: Annotated[int, Field(ge=0, le=_MAX_GRACE_S)] = DEFAULT_GRACE_S
    """How long the secret before is still taken."""


class Key(Answer):
    """OpenAI's `organization.project.api_key` and `organization.admin_api_key`; `project_id`, `scopes` and
    `previous_expires_at` are ours."""

    object: Literal["organization.project.api_key", "organization.admin_api_key"]
    id: str
    name: str
    redacted_value: str
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    owner: dict[str, Any]
    owner_project_access: Literal["active"] = "active"
    project_id: str
    scopes: list[str]
    previous_expires_at: int | None
    """Until when the secret before the last rotation is taken."""


class NewKey(Key):
    """A key at the only moment at which its value is told."""

    value: str


class KeyList(EdgedPage):
    """A page of keys, oldest first."""

    data: list[Key]


class Used(Answer):
    """How much of something is used, and may be; null: no limit."""

    used: float
    limit: int | None


class UsedBytes(Used):
    """What is stored, and of what kind it is."""

    files: int
    uploads: int
    models: int
    checkpoints: int


class Usage(Answer):
    """What an organization uses now."""

    object: Literal["organization.usage"] = "organization.usage"
    organization_id: str
    queued_jobs: Used
    running_jobs: Used
    gpu_seconds: Used
    """In the last 30 days."""
    stored_bytes: UsedBytes
    max_priority: int | None


class TenantsQuery(Answer):
    """The query of a list of organizations, projects or keys."""

    limit: int = Field(default=20, ge=1, le=100)
    after: Cursor = None


class ProjectsQuery(TenantsQuery):
    """The query of a list of projects."""

    include_archived: bool = False
