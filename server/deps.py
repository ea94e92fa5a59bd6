"""Dependencies of the routes: the server's parts, the caller, and bodies, read only once the caller is known."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData

from jobs import organizations, reads, uploads
from jobs.db import UNREACHABLE
from jobs.idempotency import RequestIdentity, check_key, hash_body
from jobs.keys import Principal
from jobs.owner import Owner
from jobs.scopes import Scope
from server import schemas
from server.auth import Credential, check_origin, find_credential
from server.cloning import clone_body
from server.errors import out_of_scope, too_many_requests, unauthenticated
from server.json_body import parse_json
from server.middleware import RATE_HEADERS
from server.openapi import describes, describes_form
from server.part_form import read_part
from server.rate_limit import network_of
from server.schemas import tenants as tenant_schemas
from server.scopes import find_scope
from server.services import Services
from server.sse import Watcher

Body = TypeVar("Body", bound=BaseModel)

_BINARY = {"type": "string", "format": "binary"}
_RETRY_COUNT = re.compile(r"[0-9]{1,4}")


async def get_services(request: Request) -> Services:
    """The parts of this server. Asynchronous, as is `authenticated`, only because FastAPI runs what is not in a thread,
    which costs more than either does."""
    return _services_of(request)


def _services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


async def authenticated(request: Request) -> Principal:
    """The caller, who may do what the request asks for. Every route that is not on the public list depends on this.

    Raises:
        ApiError: 401 without a valid credential, or for an organization or project that is not the key's; 403 for a
            browser's request that comes from another site, or where the key lacks the route's scope; 429 for one
            request too many.
    """
    services, credential = _services_of(request), find_credential(request)
    if credential is None:
        raise unauthenticated("No API key: send the header `Authorization: Bearer sk-lomo-...`.")
    principal = services.authenticator.recall(credential)
    if principal is None:
        principal = await run_in_threadpool(identify, request, services, credential)
    if principal is None and credential.kind == "key":
        raise unauthenticated("This API key is not valid: it is mistyped, unknown, expired or revoked.")
    if principal is None:
        raise unauthenticated("The session has ended: log in again.")
    if credential.kind == "session":
        check_origin(request, method=request.method, required=True)
    allowance = services.requests.take(principal.api_key_id)
    setattr(request.state, RATE_HEADERS, allowance.headers())
    if allowance.is_exceeded:
        message = f"This API key has sent more than {allowance.limit} requests a minute: send them more slowly."
        raise too_many_requests(message, allowance.headers())
    principal = await _placed(request, services, principal)
    scope = find_scope(request.method, request.scope["route"].path)
    if scope is not None and scope not in principal.scopes:
        raise out_of_scope(scope)
    return principal


def identify(request: Request, services: Services, credential: Credential, *, fresh: bool = False) -> Principal | None:
    """The caller behind a credential; `fresh`: as of now. An address that has sent too many wrong ones is not listened
    to for a while; a credential that was right before still is, since others may share its address.

    Raises:
        ApiError: 429 for an address that is not listened to.
    """
    address = "" if request.client is None else network_of(request.client.host)
    allowance = services.failures.look(address)
    if allowance.is_exceeded and not services.authenticator.knows(credential):
        message = "Too many requests with a wrong API key have come from this address."
        times = {name: value for name, value in allowance.headers().items() if name.lower().startswith("retry-")}
        raise too_many_requests(message, times)
    find = services.authenticator.find_fresh if fresh else services.authenticator.find
    principal = find(credential)
    if principal is None:
        services.failures.take(address)
    return principal


async def _placed(request: Request, services: Services, principal: Principal) -> Principal:
    """The caller as it acts by what the request names: the key's own organization, and its project, or, where it
    administers, any other of the organization's.

    Raises:
        ApiError: 401 `mismatched_organization` or `mismatched_project`, as OpenAI's.
    """
    organization_id, project_id = (request.headers.get(f"OpenAI-{what}") for what in ("Organization", "Project"))
    if organization_id and organization_id != principal.organization_id:
        own = principal.organization_id
        message = f"The header OpenAI-Organization does not name the organization of this API key, {own}."
        raise unauthenticated(message, code="mismatched_organization")
    if not project_id:
        return principal
    if project_id != principal.project_id and not await run_in_threadpool(_may_act_in, services, principal, project_id):
        message = (
            f"The header OpenAI-Project does not name the project of this API key, {principal.project_id}, or, for one "
            "that administers, another one of its organization, which is not archived."
        )
        raise unauthenticated(message, code="mismatched_project")
    return principal.narrowed_to(project_id)


def _may_act_in(services: Services, principal: Principal, project_id: str) -> bool:
    """Whether a caller may act in this project alone: its key's own, or, where it administers, one of its
    organization's."""
    if project_id == principal.project_id:
        return True
    named = Owner(principal.organization_id, project_id)
    return Scope.ADMIN in principal.scopes and organizations.is_active_project(services.db, named)


Caller = Annotated[Principal, Depends(authenticated)]


def get_watcher(request: Request, services: Services, caller: Principal) -> Watcher:
    """The caller as the reader of a stream.

    Raises:
        ApiError: 429 where there is no room for another stream.
    """
    services.hub.check_room(caller.api_key_id)
    credential = find_credential(request)
    scope = find_scope(request.method, request.scope["route"].path)

    def is_still_valid() -> bool:
        try:
            found = None if credential is None else services.authenticator.find_fresh(credential)
            return found is not None and (scope is None or scope in found.scopes) and _sees(services, found, caller)
        except UNREACHABLE:
            # Nobody can tell, and nothing new is sent while the database does not answer.
            return True

    return Watcher(caller, is_still_valid)


def _sees(services: Services, found: Principal, caller: Principal) -> bool:
    """Whether a caller, as it is found now, may still see what it was shown: a key can cease to administer, and a
    project be archived."""
    if caller.is_narrowed:
        return _may_act_in(services, found, caller.project_id)
    return found.view == caller.view


@dataclass(frozen=True, slots=True)
class Creation:
    """A request for a job, and what tells it from another."""

    body: schemas.CreateJob
    identity: RequestIdentity


@describes(schemas.CreateJob)
async def read_creation(request: Request, caller: Caller) -> Creation:
    """A job's creation. Whatever the content type says, its body must be JSON (curl sends a form's by default).

    Raises:
        InvalidRequestError: the body is not acceptable JSON.
        RequestValidationError: it does not fit the schema.
    """
    body = parse_json(await request.body())
    identity = _identify(request, caller, body)
    return Creation(_validate(schemas.CreateJob, body), identity)


@describes(schemas.CreateJob, partial=True)
async def read_clone(job_id: str, request: Request, caller: Caller, services: ServicesDep) -> Creation:
    """The creation that a clone amounts to: the other job's, with the options of the body over it; see `read_creation`.

    Raises:
        NotFoundError: no such job that the caller sees.
        InvalidRequestError: the body is not acceptable JSON, or another version stored the job.
        RequestValidationError: the options do not fit the schema.
    """
    raw = await request.body()
    overrides = parse_json(raw) if raw.strip() else {}
    job = await run_in_threadpool(reads.get_job, services.db, owner=caller.view, job_id=job_id)
    identity = _identify(request, caller, {"clone": job.id, "with": overrides})
    return Creation(_validate(schemas.CreateJob, clone_body(job, overrides)), identity)


def _identify(request: Request, caller: Principal, body: dict[str, Any]) -> RequestIdentity:
    """What tells a request that creates a job from another.

    Raises:
        InvalidRequestError: its Idempotency-Key cannot be one.
    """
    key = request.headers.get("idempotency-key")
    # Of the official client; anything but a number says nothing.
    tries = _RETRY_COUNT.fullmatch(request.headers.get("x-stainless-retry-count", ""))
    return RequestIdentity(
        owner=caller.home,
        api_key_id=caller.api_key_id,
        body_sha256=hash_body(body),
        idempotency_key=None if key is None else check_key(key),
        num_retries=int(tries[0]) if tries else None,
    )


def _validate(schema: type[Body], body: dict[str, Any]) -> Body:
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError(details, body=body) from error


def json_body(schema: type[Body]) -> Callable[..., Awaitable[Body]]:
    """A dependency that reads a body of this schema once the caller is known; see `read_creation`. No body at all is an
    empty object."""

    @describes(schema)
    async def read(request: Request, _caller: Caller) -> Body:
        return _validate(schema, parse_json(await request.body() or b"{}"))

    return read


@describes_form(
    {"expires_after[anchor]": {"type": "string"}, "expires_after[seconds]": {"type": "integer"}},
    file=_BINARY,
    purpose={"type": "string"},
)
async def read_upload_form(request: Request, _caller: Caller) -> AsyncIterator[FormData]:
    """The multipart form of an upload; its file lies in a temporary one until the request has ended."""
    async with request.form(max_files=1, max_fields=8) as form:
        yield form


@describes_form(data=_BINARY)
async def receive_part(
    upload_id: str, request: Request, caller: Caller, services: ServicesDep
) -> AsyncIterator[uploads.IncomingPart]:
    """A part of an upload, written to disk while it arrives; nothing is read for an upload that takes none."""
    incoming = await run_in_threadpool(
        uploads.open_part,
        services.db,
        services.settings,
        owner=caller.view,
        upload_id=upload_id,
    )
    try:
        await read_part(request, incoming)
        yield incoming
    finally:
        await run_in_threadpool(incoming.discard)


CreationDep = Annotated[Creation, Depends(read_creation)]
CloneDep = Annotated[Creation, Depends(read_clone)]
ChatBody = Annotated[schemas.CreateChat, Depends(json_body(schemas.CreateChat))]
PlanBody = Annotated[schemas.PlanRequest, Depends(json_body(schemas.PlanRequest))]
UploadForm = Annotated[FormData, Depends(read_upload_form)]
UploadBody = Annotated[schemas.CreateUpload, Depends(json_body(schemas.CreateUpload))]
CompleteBody = Annotated[schemas.CompleteUpload, Depends(json_body(schemas.CompleteUpload))]
ReceivedPart = Annotated[uploads.IncomingPart, Depends(receive_part)]
CreateWebhookBody = Annotated[schemas.CreateWebhookEndpoint, Depends(json_body(schemas.CreateWebhookEndpoint))]
ChangeWebhookBody = Annotated[schemas.ChangeWebhookEndpoint, Depends(json_body(schemas.ChangeWebhookEndpoint))]
RotateSecretBody = Annotated[schemas.RotateSecret, Depends(json_body(schemas.RotateSecret))]
TestWebhookBody = Annotated[schemas.SendTest, Depends(json_body(schemas.SendTest))]
CreateOrganizationBody = Annotated[
    tenant_schemas.CreateOrganization, Depends(json_body(tenant_schemas.CreateOrganization))
]
UpdateOrganizationBody = Annotated[
    tenant_schemas.UpdateOrganization, Depends(json_body(tenant_schemas.UpdateOrganization))
]
NameBody = Annotated[tenant_schemas.NameProject, Depends(json_body(tenant_schemas.NameProject))]
CreateKeyBody = Annotated[tenant_schemas.CreateKey, Depends(json_body(tenant_schemas.CreateKey))]
CreateAdminKeyBody = Annotated[tenant_schemas.CreateAdminKey, Depends(json_body(tenant_schemas.CreateAdminKey))]
RotateBody = Annotated[tenant_schemas.RotateKey, Depends(json_body(tenant_schemas.RotateKey))]
UpdateKeyBody = Annotated[tenant_schemas.UpdateKey, Depends(json_body(tenant_schemas.UpdateKey))]
