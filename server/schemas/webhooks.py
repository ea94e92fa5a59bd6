"""OpenAI's `webhook_endpoint`, and what creates and changes one."""

from __future__ import annotations

from typing import Annotated, Literal

import httpx
from pydantic import AfterValidator, Field, StringConstraints

from server.schemas.base import Answer, EdgedPage, Request

# The longest that every browser and proxy takes.
_MAX_URL_CHARS = 2000
_NUM_PORTS = 2**16


def _check_url(value: str) -> str:
    try:
        url = httpx.URL(value)
    except httpx.InvalidURL as error:
        raise ValueError("this is not a URL") from error
    if url.scheme not in ("https", "http") or not url.host:
        raise ValueError("a URL that begins with https:// and names a host is needed")
    if url.port is not None and not 0 < url.port < _NUM_PORTS:
        raise ValueError(f"a URL's port is a number from 1 to {_NUM_PORTS - 1}")
    if url.userinfo or url.fragment:
        raise ValueError("a URL has neither a password nor a fragment here")
    return value


Url = Annotated[
    str, StringConstraints(max_length=_MAX_URL_CHARS, pattern=r"^[\x21-\x7e]+$"), AfterValidator(_check_url)
]
EventType = Literal[
    "fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled", "fine_tuning.job.paused"
]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=4)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class CreateWebhookEndpoint(Request):
    """The body of `POST /v1/webhook_endpoints`."""

    name: Name
    url: Url
    event_types: EventTypes


class ChangeWebhookEndpoint(Request):
    """The body of `POST /v1/webhook_endpoints/{id}`: what is left out stays."""

    name: Name | None = None
    url: Url | None = None
    event_types: EventTypes | None = None


class RotateSecret(Request):
    """The body of `POST /v1/webhook_endpoints/{id}/rotate_secret`; it may be empty."""

    keep_old_secret_active_for_24_hours: bool = False


class SendTest(Request):
    """The body of `POST /v1/webhook_endpoints/{id}/test`."""

    event_type: EventType


class WebhookEndpoint(Answer):
    """OpenAI's `webhook_endpoint`."""

    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    id: str
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str
    """The last characters of the secret."""


class WebhookEndpointWithSecret(WebhookEndpoint):
    """The same at its creation and at a rotation: the only times that the secret is shown."""

    signing_secret: str


class WebhookEndpointList(EdgedPage):
    """A page of endpoints, newest first."""

    data: list[WebhookEndpoint]


class DeletedWebhookEndpoint(Answer):
    """The answer to the deletion of an endpoint."""

    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    id: str
    deleted: Literal[True] = True


class WebhookTestResult(Answer):
    """What the receiver answered to a test."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    success: Literal[True] = True
    event_type: str
    status_code: int
    webhook_endpoint_id: str


class WebhookEventTypeList(Answer):
    """The types of events that there are."""

    object: Literal["list"] = "list"
    data: list[str]
