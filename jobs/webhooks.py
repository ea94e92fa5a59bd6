"""Webhooks: who is told how jobs end, and which deliveries are due.

A job's end and the messages that tell of it are one transaction (`announce`, called by `lifecycle.py`), so that none is
lost. A delivery is taken by moving its next attempt into the future before it is sent: whoever dies over it leaves it
to be sent again, and a receiver knows the repetition by its id. What is sent, and how, is the server's
(`server/webhook_delivery.py`).
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson
from sqlalchemy import delete, func, select, text, tuple_, update
from sqlalchemy.orm import Session

from jobs.db import Database
from jobs.errors import InvalidStateError, NotFoundError
from jobs.ids import new_webhook_endpoint_id, new_webhook_event_id
from jobs.models import Job
from jobs.organizations import project_of
from jobs.owner import Owner
from jobs.reads import Page
from jobs.status import JobStatus
from jobs.webhook_models import WebhookDelivery, WebhookEndpoint

EVENT_TYPES = {
    JobStatus.SUCCEEDED: "fine_tuning.job.succeeded",
    JobStatus.FAILED: "fine_tuning.job.failed",
    JobStatus.CANCELLED: "fine_tuning.job.cancelled",
    JobStatus.PAUSED: "fine_tuning.job.paused",
}
"""OpenAI's types, and the last one, which is ours."""

MAX_ENDPOINTS = 20
"""Of one project: each costs a row for every job of it that ends."""

OLD_SECRET_HOURS = 24
"""OpenAI's, where the old secret is asked to stay valid."""

# From Standard Webhooks: 24 to 64 random bytes.
_SECRET_BYTES = 32
# Longer than an attempt may take (`server/webhook_delivery.py`), so that none is sent twice at once.
_TAKEN_S = 60
# 5 s, 10 s, 20 s ... and from the twelfth on every 3 h, for three days in all (OpenAI retries for 72 hours).
_FIRST_WAIT_S = 5
_LONGEST_WAIT_S = 3 * 3600
_GIVE_UP_AFTER = timedelta(hours=72)
# How long it can be looked up what became of a delivery.
_KEPT_DAYS = 30
_MAX_RESULT_CHARS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A delivery to attempt now."""

    id: str
    url: str
    body: bytes
    secrets: tuple[str, ...]
    """The present one first."""


def create(db: Database, *, owner: Owner, name: str, url: str, event_types: Sequence[str]) -> WebhookEndpoint:
    """Record an endpoint, with a fresh secret.

    Raises:
        InvalidStateError: the project has `MAX_ENDPOINTS` of them.
    """
    with db.transaction() as session:
        project_id = project_of(session, owner)
        # Two at once must not both be the last one.
        session.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"webhooks {project_id}"))))
        owned = select(func.count()).where(WebhookEndpoint.project_id == project_id)
        if session.scalars(owned).one() >= MAX_ENDPOINTS:
            raise InvalidStateError(
                f"There are {MAX_ENDPOINTS} webhook endpoints already, which is the most: delete one of them first.",
                code="too_many_webhook_endpoints",
            )
        endpoint = WebhookEndpoint(
            id=new_webhook_endpoint_id(),
            organization_id=owner.organization_id,
            project_id=project_id,
            name=name,
            url=url,
            event_types=list(event_types),
            secret=_new_secret(),
        )
        session.add(endpoint)
        session.flush()
        session.refresh(endpoint)
        return endpoint


def get(db: Database, *, owner: Owner, endpoint_id: str) -> WebhookEndpoint:
    """One endpoint.

    Raises:
        NotFoundError: no such endpoint of this owner.
    """
    with db.read() as session:
        return _owned(session, endpoint_id, owner)


def list_endpoints(db: Database, *, owner: Owner, limit: int, after: str | None = None) -> Page[WebhookEndpoint]:
    """Endpoints, newest first.

    Raises:
        NotFoundError: `after` is not an endpoint of this owner.
    """
    order = tuple_(WebhookEndpoint.created_at, WebhookEndpoint.id)
    query = (
        select(WebhookEndpoint)
        .where(owner.owns(WebhookEndpoint))
        .order_by(WebhookEndpoint.created_at.desc(), WebhookEndpoint.id.desc())
        .limit(limit + 1)
    )
    with db.read() as session:
        if after is not None:
            last = _owned(session, after, owner)
            query = query.where(order < tuple_(last.created_at, last.id))
        rows = session.scalars(query).all()
        return Page(rows[:limit], has_more=len(rows) > limit)


def change(db: Database, *, owner: Owner, endpoint_id: str, values: dict[str, Any]) -> WebhookEndpoint:
    """Change `name`, `url` or `event_types` of an endpoint. What waits to be delivered goes to the new URL.

    Raises:
        NotFoundError: see `get`.
    """
    with db.transaction() as session:
        endpoint = _owned(session, endpoint_id, owner, for_update=True)
        changed = {name: value for name, value in values.items() if getattr(endpoint, name) != value}
        if changed:
            _update(session, endpoint, {**changed, "updated_at": func.now()})
        return endpoint


def rotate(db: Database, *, owner: Owner, endpoint_id: str, keep_old: bool) -> WebhookEndpoint:
    """Give an endpoint a new secret; with `keep_old`, deliveries are signed with both for a day.

    Raises:
        NotFoundError: see `get`.
    """
    with db.transaction() as session:
        endpoint = _owned(session, endpoint_id, owner, for_update=True)
        until = func.now() + text(f"interval '{OLD_SECRET_HOURS} hours'") if keep_old else None
        values = {
            "secret": _new_secret(),
            "previous_secret": endpoint.secret if keep_old else None,
            "previous_until": until,
            "updated_at": func.now(),
        }
        _update(session, endpoint, values)
        return endpoint


def remove(db: Database, *, owner: Owner, endpoint_id: str) -> None:
    """Remove an endpoint, and what waits to be delivered to it.

    Raises:
        NotFoundError: see `get`.
    """
    with db.transaction() as session:
        session.delete(_owned(session, endpoint_id, owner, for_update=True))


def announce(session: Session, job: Job, status: JobStatus) -> None:
    """Leave a message for every endpoint of the job's project that wants to know of this status."""
    event_type = EVENT_TYPES.get(status)
    if event_type is None:
        return
    wanted = select(WebhookEndpoint.id, func.extract("epoch", func.now())).where(
        WebhookEndpoint.project_id == job.project_id, WebhookEndpoint.event_types.contains([event_type])
    )
    for endpoint_id, now in session.execute(wanted).all():
        event_id = new_webhook_event_id()
        body = make_body(event_id=event_id, event_type=event_type, created_at=int(now), job_id=job.id)
        session.add(WebhookDelivery(id=event_id, endpoint_id=endpoint_id, body=body.decode()))


def make_body(*, event_id: str, event_type: str, created_at: int, job_id: str) -> bytes:
    """A message as OpenAI's: the receiver asks for what else it wants to know of the job."""
    return orjson.dumps(
        {"id": event_id, "object": "event", "created_at": created_at, "type": event_type, "data": {"id": job_id}}
    )


def take_due(db: Database, *, limit: int) -> list[Due]:
    """Take deliveries whose time has come; nobody else gets them for `_TAKEN_S` seconds."""
    ids = (
        select(WebhookDelivery.id)
        .where(WebhookDelivery.next_attempt_at <= func.now())
        .order_by(WebhookDelivery.next_attempt_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    taken = (
        update(WebhookDelivery)
        .where(WebhookDelivery.id.in_(ids), WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .values(
            next_attempt_at=func.now() + func.make_interval(0, 0, 0, 0, 0, 0, _TAKEN_S),
            num_attempts=WebhookDelivery.num_attempts + 1,
        )
        .returning(
            WebhookDelivery.id,
            WebhookDelivery.body,
            WebhookEndpoint.url,
            WebhookEndpoint.secret,
            WebhookEndpoint.previous_secret,
            WebhookEndpoint.previous_until > func.now(),
        )
    )
    with db.transaction() as session:
        return [
            Due(
                id=event_id,
                url=url,
                body=body.encode(),
                secrets=(secret, *([previous] if keeps_old and previous else [])),
            )
            for event_id, body, url, secret, previous, keeps_old in session.execute(taken).all()
        ]


def record(db: Database, delivery_id: str, *, is_delivered: bool, result: str) -> None:
    """Note what came of an attempt, and when the next one is due if it failed. One that is gone by now is no matter."""
    with db.transaction() as session:
        delivery = session.get(WebhookDelivery, delivery_id, with_for_update=True)
        if delivery is None:
            return
        now: datetime = session.scalars(select(func.now())).one()
        delivery.last_result = result[:_MAX_RESULT_CHARS]
        if is_delivered:
            delivery.delivered_at = now
            delivery.next_attempt_at = None
        elif now - delivery.created_at > _GIVE_UP_AFTER:
            delivery.next_attempt_at = None
        else:
            wait_s = min(_FIRST_WAIT_S * 2 ** min(delivery.num_attempts - 1, 20), _LONGEST_WAIT_S)
            delivery.next_attempt_at = now + timedelta(seconds=wait_s)


def forget_old(db: Database) -> int:
    """Remove deliveries that have ended long ago. Returns how many."""
    old = WebhookDelivery.created_at < func.now() - text(f"interval '{_KEPT_DAYS} days'")
    with db.transaction() as session:
        gone = session.execute(
            delete(WebhookDelivery).where(old, WebhookDelivery.next_attempt_at.is_(None)).returning(WebhookDelivery.id)
        )
        return len(gone.all())


def _new_secret() -> str:
    """In the form of Standard Webhooks, which the official client decodes."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def _update(session: Session, endpoint: WebhookEndpoint, values: dict[str, Any]) -> None:
    session.execute(update(WebhookEndpoint).where(WebhookEndpoint.id == endpoint.id).values(**values))
    session.refresh(endpoint)


def _owned(session: Session, endpoint_id: str, owner: Owner, *, for_update: bool = False) -> WebhookEndpoint:
    query = select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id, owner.owns(WebhookEndpoint))
    endpoint = session.scalar(query.with_for_update() if for_update else query)
    if endpoint is None:
        raise NotFoundError(f"No such webhook endpoint: {endpoint_id}", param="webhook_endpoint_id")
    return endpoint
