"""The translation of a job into the engine's specification: complete, and read back equal."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import InvalidRequestError
from jobs.run_config import RunPaths, api_param, check_options, to_train_config
from jobs.spec import JobSpec, LomoOptions
from lomo_core.config import DEFAULT_LEARNING_RATES, CalibrationConfig, OptimizerName, ParamGroupConfig, TrainConfig
from lomo_core.errors import ConfigError
from lomo_core.param_groups import group_parameters

PATHS = RunPaths(
    run_dir=Path("/d/runs/j/attempt-2"),
    model=Path("/d/models/base"),
    train=Path("/d/files/t"),
    validation=Path("/d/files/v"),
    resume_from=(Path("/d/runs/j/attempt-1/checkpoints/step-20"), Path("/d/runs/j/attempt-1/checkpoints/step-10")),
    encoded=Path("/d/runs/j/tokens"),
    shapes=Path("/d/shapes/s.json"),
    calibration=CalibrationConfig(base_bytes=7, libraries_bytes=5),
)
# No option at its default, so that one that is not passed on shows.
OPTIONS: dict[str, Any] = {
    "optimizer": "adalomo",
    "learning_rate": 0.001,
    "schedule": "cosine",
    "warmup_ratio": 0.25,
    "weight_decay": 0.5,
    "clip": {"mode": "norm", "threshold": 2.5, "exact": "spill_file"},
    "precision": "fp32",
    "rounding": "nearest",
    "param_groups": [{"pattern": "*.bias", "learning_rate_scale": 0.5, "weight_decay": 0.25}],
    "frozen": ["model.layers.[01].*", "?"],
    "activation_checkpointing": False,
    "max_seq_length": 99,
    "packing": True,
    "train_on": "all",
    "checkpoint_every_steps": 7,
    "keep_checkpoints": 5,
    "eval_every_steps": 11,
    "early_stopping_patience": 17,
    "keep_best": True,
    "final_model": "best",
    "sample_prompts": ["What is LOMO?", "Why?"],
    "sample_max_new_tokens": 19,
    "max_steps": 13,
    "priority": 9,
}
# Of these the engine has no equal: where a job runs is decided before it starts.
NOT_FOR_THE_ENGINE = {"priority", "devices", "nodes", "offload"}


def make_spec(**changes: Any) -> JobSpec:
    values = {"model": "base", "training_file": "t", "validation_file": "v", "seed": 3, "n_epochs": 4, "batch_size": 6}
    return JobSpec.model_validate({**values, "learning_rate_multiplier": 2.0, "lomo": OPTIONS, **changes})


def test_every_option_reaches_the_engine() -> None:
    assert set(LomoOptions.model_fields) == set(OPTIONS) | NOT_FOR_THE_ENGINE
    config = to_train_config(make_spec(training_format="plain"), PATHS)
    assert dataclasses.asdict(config) == {
        "run_dir": "/d/runs/j/attempt-2",
        "model_path": "/d/models/base",
        "data": {
            "train_path": "/d/files/t",
            "validation_path": "/d/files/v",
            "format": "plain",
            "validation_format": "auto",
            "max_seq_length": 99,
            "train_on": "all",
            "packing": True,
            "cache_dir": "/d/runs/j/tokens",
        },
        "optimizer": {
            "name": "adalomo",
            "learning_rate": 0.002,
            "weight_decay": 0.5,
            "clip": {"mode": "norm", "threshold": 2.5, "exact": "spill_file"},
            "rounding": "nearest",
            "param_groups": ({"pattern": r"\A(?s:.*\.bias)\Z", "learning_rate_scale": 0.5, "weight_decay": 0.25},),
            "frozen": (r"\A(?s:model\.layers\.[01]\..*)\Z", r"\A(?s:.)\Z"),
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
        "early_stopping_patience": 17,
        "keep_best": True,
        "final_model": "best",
        "sample_prompts": ("What is LOMO?", "Why?"),
        "sample_max_new_tokens": 19,
        "resume_from": (
            "/d/runs/j/attempt-1/checkpoints/step-20",
            "/d/runs/j/attempt-1/checkpoints/step-10",
        ),
        "shapes_path": "/d/shapes/s.json",
        "calibration": {"base_bytes": 7, "libraries_bytes": 5},
    }
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("optimizer", "rate", "rounding"),
    [
        ("lomo", 0.01, "stochastic"),
        ("adalomo", 5e-4, "stochastic"),
        ("sgd", 0.01, "nearest"),
        ("adamw", 2e-5, "nearest"),
    ],
)
def test_the_defaults_are_the_rules(optimizer: OptimizerName, rate: float, rounding: str) -> None:
    spec = make_spec(lomo={"optimizer": optimizer, "rounding": None}, learning_rate_multiplier=1.0)
    assert (spec.lomo.learning_rate, spec.lomo.rounding) == (rate, rounding)
    config = to_train_config(spec, PATHS).optimizer
    assert (config.learning_rate, config.rounding) == (rate, rounding)
    assert rate == DEFAULT_LEARNING_RATES[optimizer]


@pytest.mark.parametrize(
    ("lomo", "changes", "param"),
    [
        ({"optimizer": "adamw", "precision": "fp16"}, {}, "lomo.precision"),
        ({"optimizer": "sgd", "rounding": "stochastic"}, {}, "lomo.rounding"),
        ({"optimizer": "sgd", "clip": {"mode": "delayed"}}, {}, "lomo.clip"),
        ({"optimizer": "adamw", "clip": {"exact": "spill_file"}}, {}, "lomo.clip"),
        ({"clip": {"mode": "value", "exact": "spill_memory"}}, {}, "lomo.clip.exact"),
        ({"final_model": "best"}, {}, "lomo.final_model"),
        ({"keep_best": True}, {}, "lomo.keep_best"),
        ({"early_stopping_patience": 3}, {}, "lomo.early_stopping_patience"),
        (
            {"early_stopping_patience": 3, "eval_every_steps": 5},
            {"validation_file": None},
            "lomo.early_stopping_patience",
        ),
        ({"learning_rate": 10}, {"learning_rate_multiplier": 1e308}, "hyperparameters.learning_rate_multiplier"),
        ({"learning_rate": 1e-10}, {"learning_rate_multiplier": 1e-320}, "hyperparameters.learning_rate_multiplier"),
    ],
)
def test_what_the_engine_cannot_have_together_is_refused_by_the_requests_name(
    lomo: dict[str, Any], changes: dict[str, Any], param: str
) -> None:
    spec = make_spec(lomo=lomo, **changes)
    with pytest.raises(InvalidRequestError, match=f"Invalid value for '{param}': ") as caught:
        check_options(spec)
    assert (caught.value.param, caught.value.code) == (param, "invalid_value")


@pytest.mark.parametrize(
    "lomo",
    [
        OPTIONS,
        {"precision": "fp16", "clip": {"mode": "group", "exact": "spill_memory"}},
        {"optimizer": "adamw", "precision": "fp32"},
        {"clip": {"mode": "delayed"}},
        {"eval_every_steps": 5, "early_stopping_patience": 2},
    ],
)
def test_what_fits_together_passes(lomo: dict[str, Any]) -> None:
    check_options(make_spec(lomo=lomo))


NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.11.mlp.up_proj.weight",
    "model.norm.weight",
]


def test_a_glob_matches_whole_names() -> None:
    lomo = {
        "frozen": ["model.layers.[!0].*"],
        "param_groups": [{"pattern": "*norm*", "learning_rate_scale": 2.0}, {"pattern": "model.layers.??.*"}],
    }
    grouping = group_parameters(NAMES, to_train_config(make_spec(lomo=lomo), PATHS).optimizer)
    assert grouping.frozen == {NAMES[2]}
    assert [group.names for group in grouping.groups] == [tuple(NAMES[:2]), (NAMES[4],), (NAMES[3],)]
    with pytest.raises(ConfigError, match="takes no parameter"):
        group_parameters(NAMES, to_train_config(make_spec(lomo={"frozen": ["norm"]}), PATHS).optimizer)


@given(glob=st.text(alphabet="aA0_.*?[]!-", min_size=1, max_size=64).filter(lambda text: text.count("*") <= 8))
def test_every_glob_that_is_taken_fits_the_engine_and_ends(glob: str) -> None:
    spec = make_spec(lomo={"frozen": [glob], "param_groups": [{"pattern": glob}]})
    group = to_train_config(spec, PATHS).optimizer.param_groups[0]
    assert group == ParamGroupConfig(pattern=group.pattern)
    assert (re.search(group.pattern, "a" * 40) is not None) == fnmatch.fnmatchcase("a" * 40, glob)


def test_the_worst_glob_takes_no_time() -> None:
    """As a backtracking search `(.*a){8}b` on 200 letters takes 10^14 steps."""
    optimizer = to_train_config(make_spec(lomo={"frozen": ["*a" * 8 + "b"]}), PATHS).optimizer
    started = time.monotonic()
    assert re.search(optimizer.frozen[0], "a" * 200) is None
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    ("engine", "api"),
    [
        (None, None),
        ("model_path", "model"),
        ("data.train_path", "training_file"),
        ("data.validation_path", "validation_file"),
        ("training_file", "training_file"),
        ("model", "model"),
        ("seed", "seed"),
        ("optimizer.learning_rate", "lomo.learning_rate"),
        ("learning_rate", "lomo.learning_rate"),
        ("lomo.learning_rate", "lomo.learning_rate"),
        ("optimizer.clip.threshold", "lomo.clip.threshold"),
        ("optimizer.name", "lomo.optimizer"),
        ("schedule.name", "lomo.schedule"),
        ("schedule.warmup_ratio", "lomo.warmup_ratio"),
        ("data.max_seq_length", "lomo.max_seq_length"),
        ("n_epochs", "hyperparameters.n_epochs"),
        ("checkpoint_every_steps", "lomo.checkpoint_every_steps"),
    ],
)
def test_fields_have_the_requests_names(engine: str | None, api: str | None) -> None:
    assert api_param(engine) == api
