"""The journal: what the engine says while it runs, as JSON lines.

This is the other half of the wire between engine and worker (see `config.py`). Each line of `run_dir/journal.jsonl` is
one event; its 0-based line number, with the attempt it belongs to, is its identity, so that shipping a line twice is
harmless. A line without its newline is still being written. Torch-free: the worker and the tests read it too.

Floats that are not finite are written as null, so that every line is strict JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import orjson

JOURNAL_NAME = "journal.jsonl"

Level = Literal["info", "warn", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBytes:
    """Memory of one step by category, in bytes. `gradients` is the high-water mark of gradients alive at once;
    `peak` the largest moment of the step in all (CUDA: allocated; CPU: resident set)."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    other_bytes: int
    """`peak_bytes` less the four categories: libraries, buffers, temporaries inside operators."""
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A sentence for the reader of the log."""

    type: ClassVar[str] = "message"
    level: Level
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Model and data are loaded and the first step is next."""

    type: ClassVar[str] = "started"
    step: int
    """Steps already done (0, or those of the checkpoint resumed from)."""
    total_steps: int
    num_parameters: int
    num_train_rows: int
    num_truncated_rows: int
    num_trainable_tokens: int
    """Tokens with a loss, in one epoch."""
    device: str
    """PyTorch's name of the device, and what it is: `cpu (AMD EPYC)`, `cuda:0 (NVIDIA H100)`."""
    device_bytes: int | None
    """Memory of the device in all, or None where it is not known."""
    planned: MemoryBytes | None = None
    """What the step of the longest batch is to take; None where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One update of the weights."""

    type: ClassVar[str] = "step"
    step: int
    """1-based: after the first update this is 1."""
    total_steps: int
    epoch: float
    loss: float
    """Mean cross-entropy in nats over the batch's trained tokens."""
    mean_token_accuracy: float | None
    learning_rate: float
    grad_norm: float | None
    """Global L2 norm before clipping; None where the clip mode does not compute it."""
    num_tokens: int
    """Tokens of the batch, padding excluded."""
    num_trained_tokens: int
    """Those with a loss, summed over the run so far."""
    step_s: float
    tokens_per_s: float
    memory: MemoryBytes
    rows_hash: str | None = None
    """Of the indexes of the batch's rows, in order: equal batches, equal hashes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryProfile:
    """Memory of a sampled step at the boundaries of its phases (see `memory/meter.py`). Bytes that are alive and were
    not when the step began; a later boundary's can be negative."""

    type: ClassVar[str] = "memory_profile"
    step: int
    """As in the `Step` before it."""
    after_forward_bytes: int
    """The loss is there, and the backward pass is next."""
    after_backward_bytes: int
    """Where the update happens inside the backward pass, it has happened."""
    after_step_bytes: int
    saved_bytes: int
    """Of `after_forward_bytes`, what autograd says that it keeps: its storages, each once, parameters and buffers
    excluded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A step that changed no weight."""

    type: ClassVar[str] = "skipped"
    step: int
    what: Literal["loss", "gradient", "overflow", "window"]
    """`loss`, `gradient`: not finite. `overflow`: an fp16 gradient too large for the loss scale, which falls; no sign
    of divergence. `window`: the run has diverged here once, and goes past it."""
    loss_scale: float | None = None
    """After the step; None where the loss is not scaled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack:
    """The run has diverged and goes on from earlier weights; it does so once."""

    type: ClassVar[str] = "rolled_back"
    step: int
    """The step gone back to; 0 is the base model."""
    first_skipped: int
    """1-based, as in `Step`: the steps from here to `last_skipped` are passed over."""
    last_skipped: int
    checkpoint: str | None
    """Name of the checkpoint's folder; None for the base model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A pass over the validation file. Chat rows give loss and token accuracy, choice rows give choice accuracy."""

    type: ClassVar[str] = "evaluation"
    step: int
    num_rows: int
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    choice_accuracy: float | None = None
    """Share of rows whose right choice has the highest mean log-likelihood per token."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the model answers to one of the run's prompts, greedily."""

    type: ClassVar[str] = "sample"
    step: int
    prompt: str
    text: str
    num_tokens: int
    """Of the answer, its end token included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint is complete on disk: a model folder that also holds what resuming needs."""

    type: ClassVar[str] = "checkpoint"
    step: int
    path: str
    manifest_sha256: str
    num_bytes: int
    train_loss: float | None
    valid_loss: float | None = None
    best_step: int | None = None
    """Step of the best evaluation so far whose model is kept; None where none is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryVerdict:
    """How right the plan was for the steps of this attempt; written before the end of a run that was planned."""

    type: ClassVar[str] = "memory_verdict"
    step: int
    """The one with the highest peak, the first of several."""
    planned: MemoryBytes
    """As in `Started`."""
    measured: MemoryBytes
    """That step's."""
    ratio: float
    """Planned peak over measured peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The tuned model is complete on disk."""

    type: ClassVar[str] = "finished"
    step: int
    model_path: str
    weights_sha256: str
    """Over every parameter's name, dtype, shape and bytes in the order of the names: equal runs, equal hashes."""
    num_trained_tokens: int
    peak_bytes: int
    seconds: float
    model_step: int | None = None
    """The step whose weights the model has: the last one, or the best evaluation's."""
    best_step: int | None = None
    best_model_path: str | None = None
    """Folder of the best evaluation's model, where it is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The run ends here; `code` is that of the error class (`errors.py`)."""

    type: ClassVar[str] = "failed"
    code: str
    message: str
    param: str | None = None
    memory: MemoryBytes | None = None
    """Where memory ran out: of the step that failed, as far as it came; the planned one where the model itself could
    not be loaded."""
    suggestion: dict[str, Any] | None = None
    """The least change that would fit by the plan: options by name, and `peak_bytes` of the run with them."""


Event = (
    Message
    | Started
    | Step
    | MemoryProfile
    | Skipped
    | RolledBack
    | Evaluation
    | Sample
    | Checkpoint
    | MemoryVerdict
    | Finished
    | Failed
)

EVENT_TYPES: dict[str, type[Event]] = {cls.type: cls for cls in get_args(Event)}
_MEMORY_FIELDS = ("memory", "planned", "measured")


@dataclass(frozen=True, slots=True)
class JournalLine:
    """One line of the journal: when it was written, and the event."""

    time: float
    """Seconds since the epoch."""
    event: Event


def encode_line(line: JournalLine) -> bytes:
    """One JSON line, newline included."""
    body = {"time": line.time, "type": line.event.type, **_finite(dataclasses.asdict(line.event))}
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", errors="replace") + b"\n"


def decode_line(raw: bytes) -> JournalLine:
    """Read one complete line.

    Raises:
        ValueError: the line is not JSON, or not an event of a known type.
    """
    parsed = orjson.loads(raw)
    body: dict[str, Any] = parsed if isinstance(parsed, dict) else {}
    time, kind = body.pop("time", None), body.pop("type", None)
    cls = EVENT_TYPES.get(kind) if isinstance(kind, str) else None
    if cls is None or not isinstance(time, int | float):
        raise ValueError("not an event of a known type")
    if cls is Step and body.get("loss") is None:
        body["loss"] = math.nan
    try:
        for name in _MEMORY_FIELDS:
            if body.get(name) is not None:
                body[name] = MemoryBytes(**body[name])
        return JournalLine(float(time), cls(**body))
    except TypeError as error:
        raise ValueError(f"not a valid {cls.type!r} event: {error}") from error


def _finite(value: Any) -> Any:
    """Replace non-finite floats by None, in nested dicts."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value
