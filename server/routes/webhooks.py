"""`/v1/webhook_endpoints`: who is told how jobs end. OpenAI's paths and bodies, as its client 3.x sends them."""

from __future__ import annotations

import time
from typing import Annotated

import httpx
from fastapi import APIRouter, Depends, Query
from starlette.concurrency import run_in_threadpool

from jobs import webhooks
from jobs.errors import InvalidRequestError
from jobs.ids import new_webhook_event_id
from jobs.webhooks import Due
from server import schemas
from server.deps import (
    Caller,
    ChangeWebhookBody,
    CreateWebhookBody,
    RotateSecretBody,
    ServicesDep,
    TestWebhookBody,
    authenticated,
)
from server.describe import describe_webhook, describe_webhook_with_secret
from server.services import Services
from server.webhook_delivery import UndeliverableError, check_scheme

router = APIRouter(prefix="/v1", dependencies=[Depends(authenticated)])

# A job's id that none has: tells a test from a message that matters.
_TEST_JOB_ID = "ftjob-test"


@router.post("/webhook_endpoints")
def create_endpoint(
    body: CreateWebhookBody, caller: Caller, services: ServicesDep
) -> schemas.WebhookEndpointWithSecret:
    """Record an endpoint; the answer is the only one with its secret."""
    _check_url(services, body.url)
    endpoint = webhooks.create(
        services.db,
        owner=caller.home,
        name=body.name,
        url=body.url,
        event_types=sorted(set(body.event_types)),
    )
    return describe_webhook_with_secret(endpoint)


@router.get("/webhook_endpoints")
def list_endpoints(
    caller: Caller, services: ServicesDep, query: Annotated[schemas.WebhooksQuery, Query()]
) -> schemas.WebhookEndpointList:
    """The endpoints, newest first."""
    page = webhooks.list_endpoints(services.db, owner=caller.view, limit=query.limit, after=query.after)
    data = [describe_webhook(endpoint) for endpoint in page.items]
    return schemas.WebhookEndpointList(
        data=data,
        has_more=page.has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


@router.get("/webhook_endpoints/{endpoint_id}")
def get_endpoint(endpoint_id: str, caller: Caller, services: ServicesDep) -> schemas.WebhookEndpoint:
    """One endpoint."""
    return describe_webhook(webhooks.get(services.db, owner=caller.view, endpoint_id=endpoint_id))


@router.post("/webhook_endpoints/{endpoint_id}")
def change_endpoint(
    endpoint_id: str, body: ChangeWebhookBody, caller: Caller, services: ServicesDep
) -> schemas.WebhookEndpoint:
    """Change an endpoint's name, URL or event types."""
    values = body.model_dump(exclude_none=True)
    if body.url is not None:
        _check_url(services, body.url)
    if body.event_types is not None:
        values["event_types"] = sorted(set(body.event_types))
    endpoint = webhooks.change(services.db, owner=caller.view, endpoint_id=endpoint_id, values=values)
    return describe_webhook(endpoint)


@router.delete("/webhook_endpoints/{endpoint_id}")
def delete_endpoint(endpoint_id: str, caller: Caller, services: ServicesDep) -> schemas.DeletedWebhookEndpoint:
    """Remove an endpoint, and what waits to be delivered to it."""
    webhooks.remove(services.db, owner=caller.view, endpoint_id=endpoint_id)
    return schemas.DeletedWebhookEndpoint(id=endpoint_id)


@router.post("/webhook_endpoints/{endpoint_id}/rotate_secret")
def rotate_secret(
    endpoint_id: str, body: RotateSecretBody, caller: Caller, services: ServicesDep
) -> schemas.WebhookEndpointWithSecret:
    """A new secret; the old one stays valid for a day if that is asked for."""
    endpoint = webhooks.rotate(
        services.db,
        owner=caller.view,
        endpoint_id=endpoint_id,
        keep_old=body.keep_old_secret_active_for_24_hours,
    )
    return describe_webhook_with_secret(endpoint)


@router.post("/webhook_endpoints/{endpoint_id}/test")
async def test_endpoint(
    endpoint_id: str, body: TestWebhookBody, caller: Caller, services: ServicesDep
) -> schemas.WebhookTestResult:
    """Send a sample now, once, and tell what the receiver answered."""
    endpoint = await run_in_threadpool(webhooks.get, services.db, owner=caller.view, endpoint_id=endpoint_id)
    event_id = new_webhook_event_id()
    message = webhooks.make_body(
        event_id=event_id, event_type=body.event_type, created_at=int(time.time()), job_id=_TEST_JOB_ID
    )
    try:
        status = await services.webhooks.sender.send(
            Due(id=event_id, url=endpoint.url, body=message, secrets=(endpoint.secret,))
        )
    except UndeliverableError as error:
        raise InvalidRequestError(
            f"The message could not be delivered to {endpoint.url}: {error}.", code="webhook_undeliverable"
        ) from error
    return schemas.WebhookTestResult(event_type=body.event_type, status_code=status, webhook_endpoint_id=endpoint_id)


@router.get("/webhook_event_types")
def list_event_types() -> schemas.WebhookEventTypeList:
    """What can be subscribed to."""
    return schemas.WebhookEventTypeList(data=sorted(webhooks.EVENT_TYPES.values()))


def _check_url(services: Services, url: str) -> None:
    try:
        check_scheme(httpx.URL(url), allow_private=services.settings.webhook_private_addresses)
    except UndeliverableError as error:
        raise InvalidRequestError(f"The endpoint cannot be used: {error}.", param="url") from error
