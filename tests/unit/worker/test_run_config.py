"""The translation of a job into the engine's specification: complete, and read back equal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jobs.spec import JobSpec, LomoOptions
from lomo_core.config import TrainConfig
from worker.run_config import RunPaths, to_train_config

PATHS = RunPaths(
    run_dir=Path("/d/runs/j/attempt-2"),
    model=Path("/d/models/base"),
    train=Path("/d/files/t"),
    validation=Path("/d/files/v"),
    resume_from=(Path("/d/runs/j/attempt-1/checkpoints/step-20"), Path("/d/runs/j/attempt-1/checkpoints/step-10")),
    encoded=Path("/d/runs/j/tokens"),
)
# No option at its default, so that one that is not passed on shows.
OPTIONS: dict[str, Any] = {
    "optimizer": "adalomo",
    "learning_rate": 0.001,
    "schedule": "cosine",
    "warmup_ratio": 0.25,
    "weight_decay": 0.5,
    "clip": {"mode": "group", "threshold": 2.5},
    "precision": "fp32",
    "rounding": "nearest",
    "activation_checkpointing": False,
    "max_seq_length": 99,
    "train_on": "all",
    "checkpoint_every_steps": 7,
    "keep_checkpoints": 5,
    "eval_every_steps": 11,
    "max_steps": 13,
    "priority": 9,
}
# Of these the engine has no equal: where a job runs is decided before it starts.
NOT_FOR_THE_ENGINE = {"priority", "packing", "devices", "nodes", "offload"}
# Fields of the engine that a job cannot set, at their defaults.
ENGINE_ONLY = {
    "early_stopping_patience": None,
    "keep_best": False,
    "final_model": "last",
    "sample_prompts": (),
    "sample_max_new_tokens": 64,
}


def make_spec(**changes: Any) -> JobSpec:
    values = {"model": "base", "training_file": "t", "validation_file": "v", "seed": 3, "n_epochs": 4, "batch_size": 6}
    return JobSpec.model_validate({**values, "learning_rate_multiplier": 2.0, "lomo": OPTIONS, **changes})


def test_every_option_reaches_the_engine() -> None:
    assert set(LomoOptions.model_fields) == set(OPTIONS) | NOT_FOR_THE_ENGINE
    config = to_train_config(make_spec(), PATHS)
    assert dataclasses.asdict(config) == {
        "run_dir": "/d/runs/j/attempt-2",
        "model_path": "/d/models/base",
        "data": {
            "train_path": "/d/files/t",
            "validation_path": "/d/files/v",
            "format": "auto",
            "validation_format": "auto",
            "max_seq_length": 99,
            "train_on": "all",
            "packing": False,
            "cache_dir": "/d/runs/j/tokens",
        },
        "optimizer": {
            "name": "adalomo",
            "learning_rate": 0.002,
            "weight_decay": 0.5,
            # Of the engine alone, at its defaults: exact, param_groups and frozen.
            "clip": {"mode": "group", "threshold": 2.5, "exact": "auto"},
            "rounding": "nearest",
            "param_groups": (),
            "frozen": (),
        },
        "schedule": {"name": "cosine", "warmup_ratio": 0.25},
        "precision": "fp32",
        "activation_checkpointing": False,
        "n_epochs": 4,
        "batch_size": 6,
        "max_steps": 13,
        "seed": 3,
        "checkpoint_every_steps": 7,
        "keep_checkpoints": 5,
        "eval_every_steps": 11,
        **ENGINE_ONLY,
        "resume_from": (
            "/d/runs/j/attempt-1/checkpoints/step-20",
            "/d/runs/j/attempt-1/checkpoints/step-10",
        ),
    }
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(("optimizer", "rate"), [("lomo", 0.01), ("adalomo", 5e-4)])
def test_the_default_rate_is_the_optimizers(optimizer: str, rate: float) -> None:
    spec = make_spec(lomo={"optimizer": optimizer}, learning_rate_multiplier=1.0)
    assert to_train_config(spec, PATHS).optimizer.learning_rate == rate
