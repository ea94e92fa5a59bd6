"""Whose things a request is about: the wall between organizations, and between the projects of one.

Whatever a tenant makes names its organization and its project. An `Owner` is made once of the caller (`keys.Principal`)
and handed down; it alone turns into the condition of a query, so that none can forget half of it. Workers and sweepers,
which act for everybody, take the owner without a project.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import ColumnElement, bindparam, case, func

from jobs.models import File, Job, Submission, TunedModel, Upload
from jobs.webhook_models import WebhookEndpoint

OwnedTable = type[File] | type[Job] | type[Submission] | type[TunedModel] | type[Upload] | type[WebhookEndpoint]


class Owned(Protocol):
    """Something of a tenant's that has been read: a row, or a part of one."""

    @property
    def organization_id(self) -> str: ...

    @property
    def project_id(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Owner:
    """A project; without its id a whole organization. Of something new: the project that it comes to belong to, which
    is the organization's default one where none is named (`organizations.project_of`)."""

    organization_id: str
    project_id: str | None = None

    def owns(self, table: OwnedTable) -> ColumnElement[bool]:
        """The condition that a row is this owner's; others are as absent as those that do not exist."""
        of_organization = table.organization_id == self.organization_id
        return of_organization if self.project_id is None else of_organization & (table.project_id == self.project_id)

    def has(self, thing: Owned) -> bool:
        """The same of what has been read."""
        return thing.organization_id == self.organization_id and self.project_id in (None, thing.project_id)

    @property
    def parameters(self) -> Mapping[str, str | None]:
        """What a statement with `is_owned` asks for."""
        return {"organization_id": self.organization_id, "project_id": self.project_id}


def is_owned(table: OwnedTable) -> ColumnElement[bool]:
    """`Owner.owns` for a statement that is built once and asks for single rows by their ids: no index serves it."""
    of_project = table.project_id == func.coalesce(bindparam("project_id"), table.project_id)
    return (table.organization_id == bindparam("organization_id")) & of_project


def user_name(thing: File | Job | TunedModel) -> ColumnElement[str]:
    """How a message to whoever owns `thing` calls a job that uses it: an administrator's job may use what is another
    project's, and is then not named."""
    return case((Job.project_id == thing.project_id, Job.id), else_="a job of another project")
