"""What one run of the engine is: frozen dataclasses, validated on construction, read from and written to JSON.

This is one half of the wire between worker and engine (`run.json` in, `journal.jsonl` out; see `events.py`). It is
torch-free, so that the service can build and check a run without loading the engine. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from lomo_core.errors import ConfigError

OptimizerName = Literal["lomo", "adalomo"]
ClipMode = Literal["norm", "value", "group", "none"]
Rounding = Literal["stochastic", "nearest"]
ScheduleName = Literal["linear", "cosine", "constant"]
Precision = Literal["bf16", "fp32"]
TrainOn = Literal["assistant", "all"]
DataFormat = Literal["auto", "chat", "sharegpt", "alpaca", "completion", "text", "plain", "choice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Gradient clipping. `threshold` is in units of the gradient (after loss scaling is undone)."""

    mode: ClipMode = "norm"
    """`norm`: exact global norm, by a second backward; `value`: element-wise; `group`: the norm of each tensor,
    in one pass; `none`."""
    threshold: float = 1.0

    def __post_init__(self) -> None:
        _check_literals(self)
        _positive(self, "threshold")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """The update rule. Learning rates are of LOMO's scale: about 5e-4 to 5e-2 (AdaLomo 5e-4 to 1e-3)."""

    name: OptimizerName = "lomo"
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    """Decoupled, per step, times the learning rate."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    rounding: Rounding = "stochastic"
    """How an fp32 result is written back to 16-bit weights; fp32 weights need none."""

    def __post_init__(self) -> None:
        _check_literals(self)
        _positive(self, "learning_rate")
        _not_negative(self, "weight_decay")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run; see `schedule.py` for the formulas."""

    name: ScheduleName = "linear"
    warmup_ratio: float = 0.03
    """Share of all steps in which the rate rises linearly from 0 to its peak."""

    def __post_init__(self) -> None:
        _check_literals(self)
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(
                f"warmup_ratio must be at least 0 and below 1, not {self.warmup_ratio}", param="warmup_ratio"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The data of a run: files of rows (formats in `data/formats.py`)."""

    train_path: str
    validation_path: str | None = None
    """Rows to learn from (validation loss), or rows of `messages, choices, answer` (accuracy by likelihood)."""
    format: DataFormat = "auto"
    """Of the training file; `auto`: the first row decides, and a name that ends with .txt means plain text."""
    validation_format: DataFormat = "auto"
    max_seq_length: int = 512
    """Tokens per row, or per sequence of packed rows; longer rows are cut from the left of the prompt and counted,
    texts are cut into several rows."""
    train_on: TrainOn = "assistant"
    """`assistant`: what the assistant says, or the completion; `all`: prompts too."""
    packing: bool = False
    """Put several rows into one sequence of `max_seq_length`, which do not see each other; `batch_size` then counts
    sequences."""
    cache_dir: str | None = None
    """Folder for encoded rows, which attempts at one run may share; None: `run_dir/tokens`."""

    def __post_init__(self) -> None:
        _check_literals(self)
        _at_least(self, "max_seq_length", 8)
        if self.format == "choice":
            raise ConfigError("rows with choices measure accuracy: they cannot be trained on", param="format")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One attempt at a run. Every path is absolute; the engine writes below `run_dir` and `data.cache_dir` and
    nowhere else."""

    run_dir: str
    """Gets `journal.jsonl`, `checkpoints/step-<n>/` and, at the end, `model/`."""
    model_path: str
    """Folder of a Hugging Face causal language model with safetensors weights and a tokenizer."""
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: Precision = "bf16"
    activation_checkpointing: bool = True
    n_epochs: int = 1
    batch_size: int = 1
    max_steps: int | None = None
    """Ends the run early; the schedule is laid out over the shorter length."""
    seed: int = 0
    checkpoint_every_steps: int = 100
    """0: only the final model."""
    keep_checkpoints: int = 2
    eval_every_steps: int = 0
    """0: before the first step and after the last one only."""
    resume_from: tuple[str, ...] = ()
    """Checkpoint folders, newest first; the first valid one is taken, each rejected one is reported."""

    def __post_init__(self) -> None:
        _check_literals(self)
        for name, least in (
            ("n_epochs", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("checkpoint_every_steps", 0),
            ("keep_checkpoints", 1),
            ("eval_every_steps", 0),
        ):
            _at_least(self, name, least)
        if self.max_steps is not None:
            _at_least(self, "max_steps", 1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a run's specification.

        Raises:
            ConfigError: the text is not JSON, a key is unknown or missing, or a value has the wrong type or range.
        """
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the run's specification is not JSON: {error}") from error
        config = _build(cls, raw, path="")
        assert isinstance(config, cls)
        return config

    def to_json(self) -> str:
        """Write the run's specification; `from_json` reads it back equal."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def _build(cls: type[Any], raw: object, *, path: str) -> object:
    """Build the dataclass `cls` from parsed JSON, recursively; `path` is the dotted name for messages."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{path or 'the specification'} must be an object", param=path or None)
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            raise ConfigError(f"unknown key {_join(path, key)!r}", param=_join(path, key))
    values: dict[str, object] = {}
    for name, spec in fields.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], path=_join(path, name))
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key {_join(path, name)!r}", param=_join(path, name))
    return cls(**values)


def _convert(hint: Any, value: object, *, path: str) -> object:
    """Check `value` against a field's type; ints are taken for floats, nothing else is coerced."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, path=path)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return None if value is None else _convert(next(a for a in args if a is not type(None)), value, path=path)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(args[0], item, path=path) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = str if origin is Literal else hint
    if type(value) is not expected:
        raise ConfigError(f"{path} must be {getattr(expected, '__name__', expected)}, not {value!r}", param=path)
    return value


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _check_literals(config: Any) -> None:
    """Refuse a value outside a field's `Literal`."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            allowed = ", ".join(map(repr, get_args(hint)))
            raise ConfigError(f"{name} must be one of {allowed}, not {getattr(config, name)!r}", param=name)


def _positive(config: Any, name: str) -> None:
    value = getattr(config, name)
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} must be a finite number above 0, not {value}", param=name)


def _not_negative(config: Any, name: str) -> None:
    value = getattr(config, name)
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{name} must be a finite number, 0 or more, not {value}", param=name)


def _at_least(config: Any, name: str, least: int) -> None:
    value = getattr(config, name)
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}", param=name)
