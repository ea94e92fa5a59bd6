"""Worker hosts, and whether the service is ready."""

from __future__ import annotations

from typing import Any, Literal

from server.schemas.base import Answer


class Host(Answer):
    """A worker host as it last reported itself, and what runs there."""

    object: Literal["host"] = "host"
    name: str
    device_kind: Literal["cuda", "cpu"] | None
    """None, as the three numbers below, where the worker is of a version that did not measure."""
    devices: dict[str, Any]
    memory_bytes: int
    """Of the host itself, cards not counted."""
    available_bytes: int | None
    """Free on the device when the worker started: what its jobs may need together."""
    run_overhead_bytes: int | None
    """What each run takes beside its plan: on a CPU host the process around it."""
    free_bytes: int | None
    """What the running jobs leave of it, by plan."""
    slots: int
    running_jobs: list[str]
    """Of the caller's organization."""
    num_running: int
    """Of all organizations."""
    last_seen_at: int
    is_alive: bool


class HostList(Answer):
    """Every host; never paged."""

    object: Literal["list"] = "list"
    data: list[Host]


class Readiness(Answer):
    """Whether the service can run jobs; one word or sentence per part."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, str]
