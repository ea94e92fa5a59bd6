"""Rows of webhooks; see `models.py`."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, Index, Integer, func, text
from sqlalchemy.orm import Mapped, mapped_column

from jobs.orm import Base


class WebhookEndpoint(Base):
    """Where a project wants to be told how its jobs end."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (Index("ix_webhook_endpoints_organization_id_created_at", "organization_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str]
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[str]]
    secret: Mapped[str]
    """In the clear, since each delivery is signed with it."""
    previous_secret: Mapped[str | None]
    """The one before the last rotation, signed with as well until `previous_until`."""
    previous_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class WebhookDelivery(Base):
    """A message to an endpoint, and how far its delivery is (`jobs/webhooks.py`)."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_due", "next_attempt_at", postgresql_where=text("next_attempt_at IS NOT NULL")),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    """`webhook-id` of every attempt, by which a receiver knows a repetition."""
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="CASCADE"), index=True)
    body: Mapped[str]
    """Exactly the bytes that are sent, in UTF-8."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)
    num_attempts: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    next_attempt_at: Mapped[datetime | None] = mapped_column(server_default=func.now())
    """None once it is delivered or given up."""
    delivered_at: Mapped[datetime | None]
    last_result: Mapped[str | None]
    """What came of the last attempt, in words."""
