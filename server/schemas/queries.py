"""The queries of lists and series."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from server.schemas.base import Answer, Cursor

# Of events some 600 bytes each; OpenAI documents no upper limit.
_MAX_PAGE = 1000


# Of LomoOptions.max_steps.
_MAX_STEP = 10**9


class JobsQuery(Answer):
    """The query of a list of jobs. `metadata[key]` is read beside it."""

    limit: int = Field(default=20, ge=1, le=100)
    after: Cursor = None
    include: list[Literal["loss_curve"]] = Field(default=[], alias="include[]")
    stream: bool = False
    project_id: str | None = None


class _FeedQuery(Answer):
    """What every query has that may ask for a stream."""

    after: Cursor = None
    stream: bool | None = None
    """None: as the Accept header says."""
    pings: bool = False
    """Pings as events in place of comments, on a stream."""


class EventsQuery(_FeedQuery):
    """The query of a job's events."""

    limit: int = Field(default=20, ge=1, le=_MAX_PAGE)


class LogsQuery(_FeedQuery):
    """The query of a job's log."""

    limit: int = Field(default=100, ge=1, le=_MAX_PAGE)


class CheckpointsQuery(Answer):
    """The query of a job's checkpoints."""

    limit: int = Field(default=10, ge=1, le=_MAX_PAGE)
    after: Cursor = None


class MetricsQuery(_FeedQuery):
    """The query of a job's series; `after` is of the stream."""

    max_points: int = Field(default=1000, ge=1, le=2000)
    first_step: int | None = Field(default=None, ge=0, le=_MAX_STEP)
    last_step: int | None = Field(default=None, ge=0, le=_MAX_STEP)


class QueueQuery(Answer):
    """The query of the queue."""

    limit: int = Field(default=100, ge=1, le=_MAX_PAGE)


class FilesQuery(Answer):
    """The query of a list of files."""

    limit: int = Field(default=10_000, ge=1, le=10_000)
    after: Cursor = None
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None
    project_id: str | None = None


class WebhooksQuery(Answer):
    """The query of a list of webhook endpoints."""

    limit: int = Field(default=20, ge=1, le=100)
    after: Cursor = None


class ExportQuery(Answer):
    """The query of a model's export."""

    format: Literal["tar", "gguf"] = "tar"
    """A tar of the Hugging Face folder, or one GGUF file."""
