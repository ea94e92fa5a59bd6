"""What a job is to do, as stored in its row: OpenAI's hyperparameters and the `lomo` object, with defaults filled in.

The classes double as the schema of the request's `lomo` object: unknown keys are errors, every field has a range. Which
values there are is the engine's to say (`lomo_core/config.py`); what fits together is checked by building its
specification, in `run_config.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from lomo_core.config import (
    ClipMode,
    ExactClipping,
    FinalModel,
    OptimizerConfig,
    OptimizerName,
    Precision,
    Rounding,
    ScheduleName,
    TrainOn,
)

Probability = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
# Prompts come back with every answer of the job and with each sample; a page of text has about 3000 characters.
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=4000)]
_MAX_PROMPTS = 16
# The engine tries each pattern on each name: a model has some hundred of them.
_MAX_PATTERNS = 16
# Written out as a regular expression a star has seven characters and another one at most two: with so few of them the
# longest glob stays below the engine's 200.
_MAX_STARS = 8
_MAX_GLOB_CHARS = 64
# A rate below this changes no weight: fp32 keeps differences down to 1e-7 of it, and an update at clip 1 is the rate's
# size; what is smaller than 1e-38 ends as 0 on the device.
LEAST_RATE = 1e-12
# A clipped update of LOMO's has the rate's size, and weights are below 1: ten times that is no training any more.
MAX_RATE = 10


def _few_stars(glob: str) -> str:
    if glob.count("*") > _MAX_STARS:
        raise ValueError(f"a pattern has at most {_MAX_STARS} stars")
    return glob


Glob = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9_.*?\[\]!-]+$", max_length=_MAX_GLOB_CHARS),
    AfterValidator(_few_stars),
]
"""Matches a parameter's whole name: `*`, `?`, `[0-9]`, `[!0-9]`, as in a shell. A regular expression from a stranger
could take for ever."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ClipOptions(_Spec):
    """Gradient clipping: `norm` is exact, `delayed` takes the norm of the step before, `group` is per tensor."""

    mode: ClipMode = "norm"
    """What is held to the threshold: the norm of all gradients, of each tensor (`group`), or each value."""
    threshold: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """In the gradient's own unit; of no effect with `none`."""
    exact: ExactClipping = "auto"
    """How `norm`, and fp16, get the norm before the first update; all ways give the same bits."""


class ParamGroup(_Spec):
    """Parameters with a rate or a decay of their own."""

    pattern: Glob
    """Of whole names: `*`, `?`, `[abc]`, `[!a-f]`; at most 64 characters and 8 stars."""
    learning_rate_scale: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Times the job's learning rate."""
    weight_decay: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """Share of a weight that a step takes away, times its rate; null: the job's."""


class _CommonOptions(_Spec):
    """The options that are given as they are used."""

    optimizer: OptimizerName = "lomo"
    """`sgd` and `adamw` are torch's own, to compare with: they need memory for all gradients, and AdamW for moments."""
    learning_rate: float | None = Field(default=None, gt=0, ge=LEAST_RATE, le=MAX_RATE, allow_inf_nan=False)
    """Peak rate; by default 0.01 for lomo and sgd, 5e-4 for adalomo, 2e-5 for adamw (null in a request alone)."""
    schedule: ScheduleName = "linear"
    """How the rate goes from its peak to the end: to 0 in a line or a half cosine, or not at all."""
    warmup_ratio: Probability = 0.03
    """Share of the steps in which the rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    """Share of each weight that a step takes away, times the rate."""
    clip: ClipOptions = ClipOptions()
    """How gradients are clipped before the update."""
    precision: Precision = "bf16"
    """Of weights and gradients; there is no second copy of the weights."""
    rounding: Rounding | None = None
    """How an update is written back to 16-bit weights; by default stochastic for lomo and adalomo, nearest for sgd and
    adamw (null in a request alone)."""
    param_groups: list[ParamGroup] = Field(default=[], max_length=_MAX_PATTERNS)
    """The first group whose pattern matches takes a parameter."""
    frozen: list[Glob] = Field(default=[], max_length=_MAX_PATTERNS)
    """Parameters that are not trained; taken before any group."""
    max_seq_length: int = Field(default=512, ge=8, le=1_048_576)
    """Tokens; longer rows are cut and counted."""
    packing: bool = False
    """Several rows in one sequence, which do not see each other; `batch_size` then counts sequences."""
    train_on: TrainOn = "assistant"
    """Which tokens have a loss: those of the answers, or all."""
    nodes: Literal[1] = 1
    """Hosts that the run takes."""
    checkpoint_every_steps: int = Field(default=100, ge=0, le=1_000_000_000)
    """Steps; 0: no checkpoint before the final model."""
    keep_checkpoints: int = Field(default=2, ge=1, le=1000)
    """Checkpoints; older ones are deleted."""
    eval_every_steps: int = Field(default=0, ge=0, le=1_000_000_000)
    """Steps; 0: before the first and after the last step only."""
    early_stopping_patience: int | None = Field(default=None, ge=1, le=1_000_000)
    """The run ends after so many evaluations in a row without a better one."""
    keep_best: bool = False
    """Keep the model of the best evaluation, too."""
    final_model: FinalModel = "last"
    """Which weights the job ends with: the last step's, or those of the best evaluation (needs `keep_best`)."""
    sample_prompts: list[Prompt] = Field(default=[], max_length=_MAX_PROMPTS)
    """Answered greedily with each evaluation."""
    sample_max_new_tokens: int = Field(default=64, ge=1, le=1024)
    """Tokens of each answer, at most."""
    max_steps: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Steps after which the run ends, whatever `n_epochs` says; null: no such bound."""
    priority: int = Field(default=0, ge=-100, le=100)
    """Higher is claimed first; 0 is everybody's."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_rules_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("optimizer", "lomo") not in get_args(OptimizerName):
            return data
        rule = OptimizerConfig(name=data.get("optimizer", "lomo"))
        defaults = {"learning_rate": rule.peak_learning_rate, "rounding": rule.weight_rounding}
        return {**data, **{key: value for key, value in defaults.items() if data.get(key) is None}}


class LomoOptions(_CommonOptions):
    """The engine's options as used: the `lomo` object of a job."""

    activation_checkpointing: bool = True
    """Blocks are computed again in the backward pass, so that what they would keep need not be: a third more time."""
    devices: Literal[1] = 1
    """Devices that the run takes on its host."""
    offload: Literal["none"] = "none"
    """What lies in the host's memory and not in the device's."""


Auto = Literal["auto"]


class RequestedOptions(_CommonOptions):
    """The same as asked for: what "auto" stands at is chosen by the plan of the run's memory."""

    activation_checkpointing: bool | Auto = True
    """Blocks are computed again in the backward pass; "auto": where it does not fit otherwise."""
    devices: Literal[1] | Auto = 1
    """Devices that the run takes on its host."""
    offload: Literal["none"] | Auto = "none"
    """What lies in the host's memory and not in the device's."""

    def resolve(self) -> tuple[LomoOptions, list[Choosable]]:
        """The options to begin with, defaults in place of "auto", and the names of those that are to be chosen."""
        given = dict(self)
        chosen: list[Choosable] = [name for name in get_args(Choosable) if given.get(name) == "auto"]
        return LomoOptions(**{key: value for key, value in given.items() if key not in chosen}), chosen


Choosable = Literal["batch_size", "activation_checkpointing", "devices", "offload"]
"""What the plan of a run's memory may choose."""

Format = Literal["auto", "plain"]
"""Of an uploaded file: rows, the first of which says what they are, or plain text."""


# Of W&B's runs: at most 128 characters, and those of a project without what its addresses cannot have
# (wandb/sdk/wandb_settings.py); tags have 1 to 64. Control characters would be refused by the database at the latest.
_WandbName = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
_WandbProject = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f/\\#?%:]+$")]
_WandbTag = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
MAX_INTEGRATIONS = 5
"""OpenAI's limit."""
_MAX_TAGS = 50  # neither OpenAI nor W&B names a limit


class WandbSettings(_Spec):
    """Where Weights & Biases shows the run."""

    project: _WandbProject
    name: _WandbName | None = None
    """By default the job's id."""
    entity: _WandbName | None = None
    """Team or user; by default that of the worker's key."""
    tags: Annotated[list[_WandbTag], Field(max_length=_MAX_TAGS)] | None = None


class Integration(_Spec):
    """A tool that is told of the job's figures."""

    type: Literal["wandb"]
    wandb: WandbSettings


DEFAULT_BATCH_SIZE = 4


class JobSpec(_Spec):
    """Everything that decides a run's result, apart from the bytes of its files and of its base model."""

    model: str
    training_file: str
    validation_file: str | None = None
    training_format: Format = "auto"
    validation_format: Format = "auto"
    suffix: str | None = None
    seed: int = Field(ge=0, le=2_147_483_647)
    n_epochs: int = Field(default=1, ge=1, le=50)
    batch_size: int = Field(default=DEFAULT_BATCH_SIZE, ge=1, le=256)
    learning_rate_multiplier: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Multiplies `lomo.learning_rate`."""
    lomo: LomoOptions = Field(default_factory=LomoOptions)
    auto: list[Choosable] = []
    """What was left to the plan of the run's memory; the values chosen stand in their places."""
    integrations: list[Integration] = Field(default=[], max_length=MAX_INTEGRATIONS)


def _none_if_wrong(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        return None


_Text = Annotated[str | None, WrapValidator(_none_if_wrong)]
_Integer = Annotated[int | None, WrapValidator(_none_if_wrong)]


class ForeignSpec(BaseModel):
    """What can be read of a spec that another version of this program stored; None: that cannot. It can be shown, but
    not run."""

    model_config = ConfigDict(strict=True, frozen=True)

    model: _Text = None
    training_file: _Text = None
    validation_file: _Text = None
    suffix: _Text = None
    seed: _Integer = None
    n_epochs: _Integer = None
    batch_size: _Integer = None
    learning_rate_multiplier: Annotated[float | None, WrapValidator(_none_if_wrong)] = None
    lomo: Annotated[dict[str, Any] | None, WrapValidator(_none_if_wrong)] = None
    """As it is stored."""
    unreadable: list[str]
    """Keys that this version does not know, that are missing, or whose values it does not take."""


def read_stored(stored: dict[str, Any]) -> JobSpec | ForeignSpec:
    """A spec as a job's row has it."""
    try:
        return JobSpec.model_validate(stored)
    except ValidationError as error:
        places = [".".join(map(str, fault["loc"])) for fault in error.errors(include_url=False, include_input=False)]
        return ForeignSpec.model_validate({**stored, "unreadable": sorted(set(places))})
