"""Fixtures of the engine's tests: tiny models and runs of a few steps, on one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_core.config import ClipConfig, DataConfig, OptimizerConfig, TrainConfig
from tests.support.engine_runs import MakeConfig, Start
from tests.support.tiny_model import TAGGED_TEMPLATE, chat_rows, choice_rows, make_tiny_model, write_jsonl

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny matrices are slower on two threads, and other tests run beside these."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a plain chat template. Costs 0.2 s, once."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tagged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose template has generation tags. Costs 0.2 s, once."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tagged", template=TAGGED_TEMPLATE)


@pytest.fixture
def make_config(tmp_path: Path, tiny_model: Path) -> MakeConfig:
    """`make_config(run="name", **fields)`: a run over 12 rows, 8 steps of 3 rows, checkpoints every 2 steps."""
    write_jsonl(tmp_path / "train.jsonl", chat_rows(12))
    write_jsonl(tmp_path / "choices.jsonl", choice_rows(6))
    write_jsonl(tmp_path / "valid.jsonl", chat_rows(5))

    def make(*, run: str = "run", validation: str | None = None, **fields: Any) -> TrainConfig:
        data = DataConfig(
            train_path=str(tmp_path / "train.jsonl"),
            validation_path=str(tmp_path / validation) if validation else None,
        )
        defaults: dict[str, Any] = {
            "optimizer": OptimizerConfig(learning_rate=0.05, clip=ClipConfig(mode="group")),
            "precision": "fp32",
            "n_epochs": 2,
            "batch_size": 3,
            "checkpoint_every_steps": 2,
        }
        return TrainConfig(
            run_dir=str(tmp_path / run),
            model_path=str(tiny_model),
            **{"data": data, **defaults, **fields},
        )

    return make


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[Start]:
    """`start_engine("train", path, **environment)`: the engine as a process; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, "LOMO_ENGINE_THREADS": "1", "OMP_NUM_THREADS": "1", **options.pop("env", {})}
        process = subprocess.Popen(
            [sys.executable, "-m", "lomo_core", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
