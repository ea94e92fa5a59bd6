"""Bodies of `/v1/plan`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import StringConstraints, model_validator

from jobs.spec import Choosable, RequestedOptions
from server.schemas.base import Answer, Request
from server.schemas.job_creation import Hyperparameters


class PlanRequest(Request):
    """The body of `POST /v1/plan`: a model by name, or a bare `config.json`, and options as for a job."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    config: dict[str, Any] | None = None
    hyperparameters: Hyperparameters | None = None
    lomo: RequestedOptions | None = None

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.model is None) == (self.config is None):
            raise ValueError("give either a model's name or its config")
        return self


class PlanPhase(Answer):
    """The largest moment of a part of a step, beside parameters, optimizer state and buffers."""

    name: str
    activations_bytes: int
    gradients_bytes: int
    transient_bytes: int


class Fit(Answer):
    """Whether a live host can hold the run; what it needs there includes, on a CPU host, the process itself."""

    host: str
    device_bytes: int
    needed_bytes: int
    ok: bool


class Plan(Answer):
    """The memory of a run, by plan. Gradients, activations and transients are each one's own largest value."""

    object: Literal["plan"] = "plan"
    model: str | None
    architecture: str
    num_parameters: int
    batch_size: int
    max_seq_length: int
    activation_checkpointing: bool
    auto: list[Choosable]
    """What was left to choose; the values chosen stand in their places."""
    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    transient_bytes: int
    buffers_bytes: int
    peak_bytes: int
    peak_phase: str
    phases: list[PlanPhase]
    beside: dict[str, int]
    """Peak of the same run under each optimizer, and under LoRA (`lora`: at least, see lomo_core/memory/lora.py)."""
    fits: list[Fit]
