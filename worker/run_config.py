"""The single translation of a job into the engine's specification: `JobSpec` in, `TrainConfig` out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jobs.spec import JobSpec
from lomo_core.config import ClipConfig, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig

RUN_CONFIG_NAME = "run.json"


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


def to_train_config(spec: JobSpec, paths: RunPaths) -> TrainConfig:
    """The engine's specification of one attempt at a job.

    Raises:
        ConfigError: a value is out of the engine's range; `param` is the engine's name for it.
    """
    options = spec.lomo
    if options.learning_rate is None:
        raise AssertionError("JobSpec fills in the learning rate when it is validated")
    return TrainConfig(
        run_dir=str(paths.run_dir),
        model_path=str(paths.model),
        data=DataConfig(
            train_path=str(paths.train),
            validation_path=str(paths.validation) if paths.validation is not None else None,
            max_seq_length=options.max_seq_length,
            train_on=options.train_on,
            cache_dir=str(paths.encoded),
        ),
        optimizer=OptimizerConfig(
            name=options.optimizer,
            learning_rate=options.learning_rate * spec.learning_rate_multiplier,
            weight_decay=options.weight_decay,
            clip=ClipConfig(mode=options.clip.mode, threshold=options.clip.threshold),
            rounding=options.rounding,
        ),
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
        resume_from=tuple(str(path) for path in paths.resume_from),
    )
