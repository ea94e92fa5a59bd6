"""What a job is to do, as stored in its row: OpenAI's hyperparameters and the `lomo` object, with defaults filled in.

The classes double as the schema of the request's `lomo` object: unknown keys are errors, every field has a range.
`worker/runner.py` has the single translation of a `JobSpec` into the engine's `TrainConfig`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Rates at which each rule learns (lomo_core/optim; facts: LOMO 5e-4 to 5e-2 clipped, AdaLomo 5e-4 to 1e-3).
DEFAULT_LEARNING_RATES = {"lomo": 0.01, "adalomo": 5e-4}

Probability = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ClipOptions(_Spec):
    """Gradient clipping: `norm` is exact (a second backward), `group` is per tensor in one pass."""

    mode: Literal["norm", "value", "group", "none"] = "norm"
    threshold: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class LomoOptions(_Spec):
    """The engine's options: the `lomo` object of a job."""

    optimizer: Literal["lomo", "adalomo"] = "lomo"
    learning_rate: float | None = Field(default=None, gt=0, le=10, allow_inf_nan=False)
    """Peak rate, of LOMO's scale; by default 0.01 for lomo and 5e-4 for adalomo (never None once validated)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Probability = 0.03
    """Share of the steps in which the rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    clip: ClipOptions = ClipOptions()
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of weights and gradients; there is no second copy of the weights."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How an update is written back to 16-bit weights."""
    activation_checkpointing: bool = True
    max_seq_length: int = Field(default=512, ge=8, le=1_048_576)
    """Tokens; longer rows are cut and counted."""
    packing: Literal[False] = False
    train_on: Literal["assistant", "all"] = "assistant"
    devices: Literal[1] = 1
    nodes: Literal[1] = 1
    offload: Literal["none"] = "none"
    checkpoint_every_steps: int = Field(default=100, ge=0, le=1_000_000_000)
    """0: no checkpoint before the final model."""
    keep_checkpoints: int = Field(default=2, ge=1, le=1000)
    eval_every_steps: int = Field(default=0, ge=0, le=1_000_000_000)
    """0: before the first and after the last step only."""
    max_steps: int | None = Field(default=None, ge=1, le=1_000_000_000)
    priority: int = Field(default=0, ge=-100, le=100)
    """Higher is claimed first."""

    @model_validator(mode="before")
    @classmethod
    def _default_learning_rate(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("learning_rate") is None:
            rate = DEFAULT_LEARNING_RATES.get(str(data.get("optimizer", "lomo")))
            return {**data, "learning_rate": rate}
        return data


class JobSpec(_Spec):
    """Everything that decides a run's result, apart from the bytes of its files and of its base model."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int = Field(ge=0, le=2_147_483_647)
    n_epochs: int = Field(default=1, ge=1, le=50)
    batch_size: int = Field(default=4, ge=1, le=256)
    learning_rate_multiplier: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Multiplies `lomo.learning_rate`."""
    lomo: LomoOptions = Field(default_factory=LomoOptions)
