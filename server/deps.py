"""Dependencies of the routes: the server's parts, the caller, and bodies, read only once the caller is known."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData

from jobs import uploads
from jobs.db import UNREACHABLE
from jobs.idempotency import RequestIdentity, check_key, hash_body
from jobs.keys import Principal
from server.auth import check_origin, find_credential
from server.errors import unauthenticated
from server.json_body import parse_json
from server.part_form import read_part
from server.schemas import CompleteUpload, CreateChat, CreateJob, CreateUpload, PlanRequest
from server.services import Services
from server.sse import Watcher

Body = TypeVar("Body", bound=BaseModel)

_RETRY_COUNT = re.compile(r"[0-9]{1,4}")


def get_services(request: Request) -> Services:
    """The parts of this server."""
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


def authenticated(request: Request, services: ServicesDep) -> Principal:
    """The caller. Every route that is not on the public list depends on this.

    Raises:
        ApiError: 401 without a valid credential; 403 for a browser's request that comes from another site.
    """
    credential = find_credential(request)
    if credential is None:
        raise unauthenticated("No API key: send the header `Authorization: Bearer sk-lomo-...`.")
    principal = services.authenticator.find(credential)
    if principal is None and credential.kind == "key":
        raise unauthenticated("This API key is not valid: it is mistyped, unknown or revoked.")
    if principal is None:
        raise unauthenticated("The session has ended: log in again.")
    if credential.kind == "session":
        check_origin(request, method=request.method, required=True)
    return principal


Caller = Annotated[Principal, Depends(authenticated)]


def get_watcher(request: Request, services: Services, caller: Principal) -> Watcher:
    """The caller as the reader of a stream.

    Raises:
        ApiError: 429 where there is no room for another stream.
    """
    services.hub.check_room(caller.api_key_id)
    credential = find_credential(request)

    def is_still_valid() -> bool:
        try:
            return credential is not None and services.authenticator.find_fresh(credential) is not None
        except UNREACHABLE:
            # Nobody can tell, and nothing new is sent while the database does not answer.
            return True

    return Watcher(caller, is_still_valid)


@dataclass(frozen=True, slots=True)
class Creation:
    """A request for a job, and what tells it from another."""

    body: CreateJob
    identity: RequestIdentity


async def read_creation(request: Request, caller: Caller) -> Creation:
    """A job's creation. Whatever the content type says, its body must be JSON (curl sends a form's by default).

    Raises:
        InvalidRequestError: the body is not acceptable JSON.
        RequestValidationError: it does not fit the schema.
    """
    body = parse_json(await request.body())
    key = request.headers.get("idempotency-key")
    # Of the official client; anything but a number says nothing.
    tries = _RETRY_COUNT.fullmatch(request.headers.get("x-stainless-retry-count", ""))
    identity = RequestIdentity(
        organization_id=caller.organization_id,
        api_key_id=caller.api_key_id,
        body_sha256=hash_body(body),
        idempotency_key=None if key is None else check_key(key),
        num_retries=int(tries[0]) if tries else None,
    )
    return Creation(_validate(CreateJob, body), identity)


async def read_plan_body(request: Request, _caller: Caller) -> PlanRequest:
    """The body of a plan; see `read_creation`.

    Raises:
        InvalidRequestError: the body is not acceptable JSON.
        RequestValidationError: it does not fit the schema.
    """
    return _validate(PlanRequest, parse_json(await request.body()))


async def read_chat_body(request: Request, _caller: Caller) -> CreateChat:
    """The body of a chat; see `read_creation`.

    Raises:
        InvalidRequestError: the body is not acceptable JSON.
        RequestValidationError: it does not fit the schema.
    """
    return _validate(CreateChat, parse_json(await request.body()))


def _validate(schema: type[Body], body: dict[str, Any]) -> Body:
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError(details) from error


async def read_upload_form(request: Request, _caller: Caller) -> AsyncIterator[FormData]:
    """The multipart form of an upload; its file lies in a temporary one until the request has ended."""
    async with request.form(max_files=1, max_fields=8) as form:
        yield form


async def read_upload_body(request: Request, _caller: Caller) -> CreateUpload:
    """The body of the creation of an upload in parts; see `read_create_body`.

    Raises:
        InvalidRequestError: the body is not acceptable JSON.
        RequestValidationError: it does not fit the schema.
    """
    return _validate(CreateUpload, parse_json(await request.body()))


async def read_complete_body(request: Request, _caller: Caller) -> CompleteUpload:
    """The body of an upload's completion; see `read_create_body`.

    Raises:
        InvalidRequestError: the body is not acceptable JSON.
        RequestValidationError: it does not fit the schema.
    """
    return _validate(CompleteUpload, parse_json(await request.body()))


async def receive_part(
    upload_id: str, request: Request, caller: Caller, services: ServicesDep
) -> AsyncIterator[uploads.IncomingPart]:
    """A part of an upload, written to disk while it arrives; nothing is read for an upload that takes none."""
    incoming = await run_in_threadpool(
        uploads.open_part,
        services.db,
        services.settings,
        organization_id=caller.organization_id,
        upload_id=upload_id,
    )
    try:
        await read_part(request, incoming)
        yield incoming
    finally:
        await run_in_threadpool(incoming.discard)


CreationDep = Annotated[Creation, Depends(read_creation)]
ChatBody = Annotated[CreateChat, Depends(read_chat_body)]
PlanBody = Annotated[PlanRequest, Depends(read_plan_body)]
UploadForm = Annotated[FormData, Depends(read_upload_form)]
UploadBody = Annotated[CreateUpload, Depends(read_upload_body)]
CompleteBody = Annotated[CompleteUpload, Depends(read_complete_body)]
ReceivedPart = Annotated[uploads.IncomingPart, Depends(receive_part)]
