"""The single translation of a job into the engine's specification: `JobSpec` in, `TrainConfig` out.

The worker makes a run of it; the server makes one at a job's creation, of paths that do not matter, so that what the
engine would refuse is refused there, by the same rules.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import InvalidRequestError
from jobs.spec import LEAST_RATE, MAX_RATE, JobSpec, LomoOptions
from lomo_core.config import (
    CalibrationConfig,
    ClipConfig,
    DataConfig,
    OptimizerConfig,
    ParamGroupConfig,
    ScheduleConfig,
    TrainConfig,
)
from lomo_core.errors import ConfigError

RUN_CONFIG_NAME = "run.json"

# The engine names fields of its own specification (lomo_core/config.py); a user knows those of the request.
_PARAMS = {
    "model_path": "model",
    "train_path": "training_file",
    "validation_path": "validation_file",
    "n_epochs": "hyperparameters.n_epochs",
    "batch_size": "hyperparameters.batch_size",
    "optimizer.name": "lomo.optimizer",
    "schedule.name": "lomo.schedule",
}
_API_PARAMS = frozenset({"model", "training_file", "validation_file", "seed", "suffix"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPaths:
    """Where this host has what the specification only names. All absolute."""

    run_dir: Path
    model: Path
    train: Path
    validation: Path | None
    resume_from: tuple[Path, ...]
    """Checkpoint folders, newest first."""
    encoded: Path
    """Folder for the data as token ids, which the attempts of a job share."""
    shapes: Path | None = None
    """File of the model's shapes, to plan the run's memory with."""
    calibration: CalibrationConfig | None = None
    """What this host adds to a plan, where it was measured."""


def to_train_config(spec: JobSpec, paths: RunPaths) -> TrainConfig:
    """The engine's specification of one attempt at a job.

    Raises:
        ConfigError: a value is out of the engine's range; `param` is the engine's name for it.
    """
    options = spec.lomo
    return TrainConfig(
        run_dir=str(paths.run_dir),
        model_path=str(paths.model),
        data=DataConfig(
            train_path=str(paths.train),
            validation_path=str(paths.validation) if paths.validation is not None else None,
            format=spec.training_format,
            validation_format=spec.validation_format,
            max_seq_length=options.max_seq_length,
            train_on=options.train_on,
            packing=options.packing,
            cache_dir=str(paths.encoded),
        ),
        optimizer=_optimizer(options, multiplier=spec.learning_rate_multiplier),
        schedule=ScheduleConfig(name=options.schedule, warmup_ratio=options.warmup_ratio),
        precision=options.precision,
        activation_checkpointing=options.activation_checkpointing,
        n_epochs=spec.n_epochs,
        batch_size=spec.batch_size,
        max_steps=options.max_steps,
        seed=spec.seed,
        checkpoint_every_steps=options.checkpoint_every_steps,
        keep_checkpoints=options.keep_checkpoints,
        eval_every_steps=options.eval_every_steps,
        early_stopping_patience=options.early_stopping_patience,
        keep_best=options.keep_best,
        final_model=options.final_model,
        sample_prompts=tuple(options.sample_prompts),
        sample_max_new_tokens=options.sample_max_new_tokens,
        resume_from=tuple(str(path) for path in paths.resume_from),
        shapes_path=None if paths.shapes is None else str(paths.shapes),
        calibration=paths.calibration,
    )


def check_options(spec: JobSpec) -> None:
    """Refuse what the engine would refuse before it has seen model and data.

    Raises:
        InvalidRequestError: `param` is the request's name of the field.
    """
    _check_rate(spec)
    anywhere = Path("/")
    validation = anywhere if spec.validation_file is not None else None
    paths = RunPaths(
        run_dir=anywhere, model=anywhere, train=anywhere, validation=validation, resume_from=(), encoded=anywhere
    )
    try:
        to_train_config(spec, paths)
    except ConfigError as error:
        param = api_param(error.param)
        raise InvalidRequestError(f"Invalid value for {param!r}: {error.message}.", param=param) from error


def _check_rate(spec: JobSpec) -> None:
    """Hold the product of rate and multiplier to the bounds of the rate."""
    rate = _learning_rate(spec.lomo, multiplier=spec.learning_rate_multiplier)
    if not LEAST_RATE <= rate <= MAX_RATE:
        param = "hyperparameters.learning_rate_multiplier"
        raise InvalidRequestError(
            f"Invalid value for {param!r}: times lomo.learning_rate, {spec.lomo.learning_rate:g}, it makes a rate of "
            f"{rate:g}, which is not between {LEAST_RATE:g} and {MAX_RATE:g}.",
            param=param,
        )


def _learning_rate(options: LomoOptions, *, multiplier: float) -> float:
    if options.learning_rate is None:
        raise AssertionError("LomoOptions fills in the learning rate when it is validated")
    return options.learning_rate * multiplier


def api_param(param: str | None) -> str | None:
    """The request's name for a field that the engine names: `optimizer.learning_rate` is `lomo.learning_rate`."""
    if param is None or param in _API_PARAMS:
        return param
    if param in _PARAMS:
        return _PARAMS[param]
    for prefix in ("data.", "optimizer.", "schedule."):
        param = param.removeprefix(prefix)
    return _PARAMS.get(param) or f"lomo.{param.removeprefix('lomo.')}"


def _optimizer(options: LomoOptions, *, multiplier: float) -> OptimizerConfig:
    return OptimizerConfig(
        name=options.optimizer,
        learning_rate=_learning_rate(options, multiplier=multiplier),
        weight_decay=options.weight_decay,
        clip=ClipConfig(mode=options.clip.mode, threshold=options.clip.threshold, exact=options.clip.exact),
        rounding=options.rounding,
        param_groups=tuple(
            ParamGroupConfig(
                pattern=_regular_expression(group.pattern),
                learning_rate_scale=group.learning_rate_scale,
                weight_decay=group.weight_decay,
            )
            for group in options.param_groups
        ),
        frozen=tuple(_regular_expression(glob) for glob in options.frozen),
    )


def _regular_expression(glob: str) -> str:
    """What the engine searches for in a name, for a glob that must match all of it.

    Since Python 3.11 each star but the last becomes an atomic group, which never tries again: the search takes at most
    the glob's length times the name's.
    """
    return r"\A" + fnmatch.translate(glob)
