"""What one run of the engine is: frozen dataclasses, validated on construction, read from and written to JSON.

This is one half of the wire between worker and engine (`run.json` in, `journal.jsonl` out; see `events.py`). It is
torch-free, so that the service can build and check a run without loading the engine. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Self, Union, cast, get_args, get_origin, get_type_hints

from lomo_core.errors import ConfigError

OptimizerName = Literal["lomo", "adalomo", "sgd", "adamw"]
ClipMode = Literal["norm", "delayed", "value", "group", "none"]
ExactClipping = Literal["auto", "second_backward", "spill_memory", "spill_file"]
Rounding = Literal["stochastic", "nearest"]
ScheduleName = Literal["linear", "cosine", "constant"]
Precision = Literal["bf16", "fp16", "fp32"]
TrainOn = Literal["assistant", "all"]
DataFormat = Literal["auto", "chat", "sharegpt", "alpaca", "completion", "text", "plain", "choice"]
FinalModel = Literal["last", "best"]

# torch's own optimizers: they hold every gradient at once and know neither fused clipping nor stochastic rounding.
BASELINES: tuple[OptimizerName, ...] = ("sgd", "adamw")
# LOMO's rates are SGD's (arXiv 2306.09782: 5e-4 to 5e-2), AdaLomo's are relative to the weights (arXiv 2310.10195),
# AdamW's is what people start from who fine-tune all parameters with it.
DEFAULT_LEARNING_RATES: dict[OptimizerName, float] = {"lomo": 0.01, "adalomo": 5e-4, "sgd": 0.01, "adamw": 2e-5}
_NO_REENTRANT = (
    "activation_checkpointing is on or off and never reentrant, which would update a shared weight before its gradient "
    "is complete"
)
# Keys that people bring along from other trainers, and why they are refused here.
_REFUSED_KEYS = {
    "gradient_accumulation_steps": "a fused update leaves no gradient to add to: raise batch_size instead, "
    "activation_checkpointing makes room for it",
    "use_reentrant": _NO_REENTRANT,
    "activation_checkpointing_kwargs": _NO_REENTRANT,
    "gradient_checkpointing_kwargs": _NO_REENTRANT,
    "trust_remote_code": "code of a model folder is never run",
}
# A pattern is tried on names of about 60 characters; nobody needs more to tell them apart.
_MAX_PATTERN_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Gradient clipping. `threshold` is in units of the gradient (after loss scaling is undone)."""

    mode: ClipMode = "norm"
    """`norm`: exact global norm; `delayed`: the global norm of the step before, in one pass; `value`: element-wise;
    `group`: the norm of each tensor, in one pass; `none`."""
    threshold: float = 1.0
    exact: ExactClipping = "auto"
    """How `norm` gets the norm before the first update: by a second backward pass, or by putting the gradients aside
    in host memory or in a file. All give the same bits; `auto` takes the fastest that there is room for."""

    def __post_init__(self) -> None:
        _check_literals(self)
        _positive(self, "threshold")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamGroupConfig:
    """Parameters with a rate or a decay of their own."""

    pattern: str
    """Regular expression, searched for in the parameter's name; the first group that matches takes it."""
    learning_rate_scale: float = 1.0
    """Times the run's learning rate."""
    weight_decay: float | None = None
    """None: the run's."""

    def __post_init__(self) -> None:
        _check_pattern(self.pattern, "pattern")
        _not_negative(self, "learning_rate_scale")
        if self.weight_decay is not None:
            _not_negative(self, "weight_decay")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """The update rule: LOMO's (fused into the backward pass), or `sgd` and `adamw`, torch's own, to compare with."""

    name: OptimizerName = "lomo"
    learning_rate: float | None = None
    """Peak rate: about 5e-4 to 5e-2 for lomo and sgd, 5e-4 to 1e-3 for adalomo, 1e-5 to 5e-5 for adamw. None: 0.01
    for lomo and sgd, 5e-4 for adalomo, 2e-5 for adamw."""
    weight_decay: float = 0.0
    """Decoupled, per step, times the learning rate."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    rounding: Rounding | None = None
    """How an fp32 result is written back to 16-bit weights; fp32 weights need none. None: stochastic for lomo and
    adalomo, nearest for sgd and adamw, which know no other."""
    param_groups: tuple[ParamGroupConfig, ...] = ()
    """Rates and decays that differ by parameter; what no pattern matches has the run's."""
    frozen: tuple[str, ...] = ()
    """Regular expressions: parameters that are not trained. They have no optimizer state."""

    def __post_init__(self) -> None:
        _check_literals(self)
        if self.learning_rate is not None:
            _positive(self, "learning_rate")
        _not_negative(self, "weight_decay")
        for pattern in self.frozen:
            _check_pattern(pattern, "frozen")
        if self.is_baseline:
            self._check_baseline()

    def _check_baseline(self) -> None:
        if self.rounding == "stochastic":
            raise ConfigError(f"{self.name} is torch's own and rounds to nearest only", param="rounding")
        if self.clip.mode == "delayed" or self.clip.exact != "auto":
            raise ConfigError(
                f"{self.name} has every gradient at hand and clips by their exact norm: the ways around that "
                "(mode 'delayed', exact) are lomo's and adalomo's",
                param="clip",
            )

    @property
    def is_baseline(self) -> bool:
        """Whether this is one of torch's own optimizers."""
        return self.name in BASELINES

    @property
    def peak_learning_rate(self) -> float:
        """The rate given, or the rule's default."""
        return DEFAULT_LEARNING_RATES[self.name] if self.learning_rate is None else self.learning_rate

    @property
    def weight_rounding(self) -> Rounding:
        """The rounding given, or the rule's default."""
        return self.rounding or ("nearest" if self.is_baseline else "stochastic")


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
class CalibrationConfig:
    """What a CPU host adds to every run (`memory/process.py`), as `python -m lomo_core calibrate` prints it."""

    base_bytes: int
    """Resident after the imports."""
    libraries_bytes: int
    """Code and tables that the first step brings."""

    def __post_init__(self) -> None:
        for name in ("base_bytes", "libraries_bytes"):
            _at_least(self, name, 0)


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
    early_stopping_patience: int | None = None
    """The run ends after so many evaluations in a row without a better validation loss or choice accuracy."""
    keep_best: bool = False
    """Keep the model of the best evaluation in `best/`, beside the last checkpoints."""
    final_model: FinalModel = "last"
    """Which weights the run ends with: those of the last step, or of the best evaluation (needs `keep_best`)."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts answered greedily with each evaluation, for people to read."""
    sample_max_new_tokens: int = 64
    resume_from: tuple[str, ...] = ()
    """Checkpoint folders, newest first; the first valid one is taken, each rejected one is reported."""
    shapes_path: str | None = None
    """File of the model's shapes (`python -m lomo_core shapes`): the run's memory is then planned, held against what is
    measured, and a smaller setting named where it does not suffice."""
    calibration: CalibrationConfig | None = None
    """What this host adds to a plan; None: figures of another CPU host."""

    def __post_init__(self) -> None:
        _check_literals(self)
        for name, least in (
            ("n_epochs", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("checkpoint_every_steps", 0),
            ("keep_checkpoints", 1),
            ("eval_every_steps", 0),
            ("sample_max_new_tokens", 1),
        ):
            _at_least(self, name, least)
        for name in ("max_steps", "early_stopping_patience"):
            if getattr(self, name) is not None:
                _at_least(self, name, 1)
        self._check_together()

    def _check_together(self) -> None:
        """Refuse fields that need each other."""
        if self.precision == "fp16" and self.optimizer.is_baseline:
            raise ConfigError(
                f"fp16 weights need the loss scaling of lomo and adalomo: use bf16 or fp32 with {self.optimizer.name}",
                param="precision",
            )
        clip = self.optimizer.clip
        if clip.exact != "auto" and clip.mode != "norm" and self.precision != "fp16":
            raise ConfigError(
                f"exact is for clip mode 'norm' and for fp16 only, not for {clip.mode!r} in {self.precision}",
                param="optimizer.clip.exact",
            )
        if self.final_model == "best" and not self.keep_best:
            raise ConfigError("final_model 'best' needs keep_best", param="final_model")
        for name in ("early_stopping_patience", "keep_best"):
            if getattr(self, name) and (self.eval_every_steps == 0 or self.data.validation_path is None):
                raise ConfigError(f"{name} needs a validation file and eval_every_steps above 0", param=name)

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
    hints = _hints(cast(Hashable, cls))
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            reason = f": {_REFUSED_KEYS[key]}" if key in _REFUSED_KEYS else ""
            raise ConfigError(f"unknown key {_join(path, key)!r}{reason}", param=_join(path, key))
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


@functools.cache
def _hints(cls: Hashable) -> dict[str, Any]:
    """The types of a dataclass's fields; to evaluate them takes 0.2 ms, which each look at a stored job would pay."""
    return get_type_hints(cls)


def _check_literals(config: Any) -> None:
    """Refuse a value outside a field's `Literal`."""
    for name, hint in _hints(cast(Hashable, type(config))).items():
        allowed_values = _literal_values(hint)
        if allowed_values and getattr(config, name) not in allowed_values:
            allowed = ", ".join(map(repr, allowed_values))
            raise ConfigError(f"{name} must be one of {allowed}, not {getattr(config, name)!r}", param=name)


def _literal_values(hint: Any) -> tuple[object, ...]:
    """The values of a `Literal`, and None where it may stand beside it; empty for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    values = [value for part in parts for value in _literal_values(part)]
    return (*values, None) if values else ()


def _check_pattern(pattern: str, param: str) -> None:
    if not 0 < len(pattern) <= _MAX_PATTERN_CHARS:
        raise ConfigError(f"a pattern has 1 to {_MAX_PATTERN_CHARS} characters, not {len(pattern)}", param=param)
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}", param=param) from error


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
