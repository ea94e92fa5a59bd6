"""The queue, as one organization may see it."""

from __future__ import annotations

from typing import Literal

from server.schemas.base import Answer, Page


class QueuedJob(Answer):
    """A queued job of the caller's and its place."""

    object: Literal["queue.job"] = "queue.job"
    job_id: str
    position: int
    """1 is the next to be claimed."""
    jobs_ahead: int
    """Of all organizations."""
    priority: int
    created_at: int
    predicted_start: int | None
    """Unix time, from what the running jobs still need; None where that cannot be told."""
    waiting_for: str | None


class Queue(Page):
    """The caller's queued jobs, first to last, and how many there are of all organizations."""

    num_queued: int
    num_running: int
    data: list[QueuedJob]
