"""What the routes work with, made once per process and kept on the application's state."""

from __future__ import annotations

from dataclasses import dataclass

from celery import Celery

from jobs.async_reads import AsyncReads
from jobs.db import Database
from jobs.row_preview import PreviewPlaces
from jobs.shape_cache import ShapeCache
from server.auth import Authenticator
from server.chat import ChatClient
from server.doorbell import Doorbell
from server.hub import Hub
from server.prometheus import Metrics
from server.rate_limit import RateLimiter
from server.settings import ServerSettings
from server.webhook_delivery import WebhookDelivery


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a running server."""

    settings: ServerSettings
    db: Database
    reads: AsyncReads
    """Of what is asked most often."""
    broker: Celery
    doorbell: Doorbell
    authenticator: Authenticator
    hub: Hub
    chats: ChatClient
    shapes: ShapeCache
    previews: PreviewPlaces
    metrics: Metrics
    webhooks: WebhookDelivery
    requests: RateLimiter
    """By API key."""
    failures: RateLimiter
    """Keys that are not valid, by address."""
    schema_revision: str
    """The newest revision that this code knows."""
