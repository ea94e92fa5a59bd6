"""Engine processes under a limit on their memory: how they end, and that what they propose really runs under it.

The limit is on private writable memory (RLIMIT_DATA, setrlimit(2)); resident are also pages of files, some 40 MB. It is
set relative to what an engine holds on this host before its model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lomo_core import calibrate
from lomo_core.config import CalibrationConfig, DataConfig, TrainConfig
from lomo_core.errors import ConfigError, OutOfMemoryError
from lomo_core.events import Failed, Finished, MemoryVerdict, Started, Step
from lomo_core.memory.shapes import read_shapes
from lomo_core.plan_command import read_config
from tests.support.engine_runs import MakeConfig, Start, events_of, write_run
from tests.support.tiny_model import chat, make_tiny_model, write_jsonl

pytestmark = pytest.mark.slow
MIB = 1 << 20
ROOT = Path(__file__).parents[3]

Limited = Callable[[TrainConfig, int], tuple[int, str]]


@pytest.fixture
def limited(start_engine: Start) -> Limited:
    """`limited(config, limit_bytes)`: the exit code and stderr of a run in a process with so much memory."""

    def run(config: TrainConfig, limit_bytes: int) -> tuple[int, str]:
        process = start_engine("train", write_run(config))
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
        _, errors = process.communicate()
        return process.returncode, errors

    return run


@pytest.fixture(scope="module")
def host() -> CalibrationConfig:
    """What this host adds to a run. Costs about 8 s, once."""
    command = [sys.executable, "-m", "lomo_core", "calibrate"]
    environment = {**os.environ, "LOMO_ENGINE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert not result.stderr
    return CalibrationConfig(**json.loads(result.stdout))


def write_shapes(model: Path, path: Path) -> str:
    path.write_text(read_shapes(read_config(model)).to_json(), encoding="utf-8")
    return str(path)


def with_changes(config: TrainConfig, changes: dict[str, Any], *, run: str) -> TrainConfig:
    """The configuration with a suggestion's options."""
    options = {name: value for name, value in changes.items() if name not in ("peak_bytes", "max_seq_length")}
    data = dataclasses.replace(config.data, max_seq_length=changes.get("max_seq_length", config.data.max_seq_length))
    return dataclasses.replace(config, run_dir=str(Path(config.run_dir).with_name(run)), data=data, **options)


def test_a_host_is_measured_without_its_model(host: CalibrationConfig) -> None:
    # torch and transformers alone take more than 150 MiB (measured: 328), a step's libraries tens (45).
    assert 150 * MIB < host.base_bytes < 1024 * MIB
    assert 0 < host.libraries_bytes < 256 * MIB


def test_a_host_with_a_cuda_device_is_not_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "pick_device", lambda: torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="only plans for CPU hosts are calibrated"):
        calibrate.calibrate()


@pytest.mark.parametrize(
    ("checkpointing", "room_bytes", "changed"),
    # 80 rows of 512 tokens take 408 MiB beside what the host adds, 268 with activation checkpointing.
    [(False, 340 * MIB, "activation_checkpointing"), (True, 160 * MIB, "batch_size")],
)
def test_what_is_proposed_runs_under_the_limit_that_the_run_broke(
    make_config: MakeConfig,
    limited: Limited,
    host: CalibrationConfig,
    tiny_model: Path,
    tmp_path: Path,
    checkpointing: bool,
    room_bytes: int,
    changed: str,
) -> None:
    write_jsonl(tmp_path / "long.jsonl", [chat("word " * 400, "x")] * 80)
    config = make_config(
        batch_size=80,
        n_epochs=1,
        max_steps=1,
        checkpoint_every_steps=0,
        activation_checkpointing=checkpointing,
        data=DataConfig(train_path=str(tmp_path / "long.jsonl")),
        shapes_path=write_shapes(tiny_model, tmp_path / "shapes.json"),
        calibration=host,
    )
    limit_bytes = host.base_bytes + host.libraries_bytes + room_bytes
    exit_code, errors = limited(config, limit_bytes)
    assert exit_code == OutOfMemoryError.exit_code, errors
    (started,) = events_of(config.run_dir, Started)
    assert started.planned is not None and started.planned.peak_bytes > limit_bytes
    (failed,) = events_of(config.run_dir, Failed)
    assert failed.memory is not None and failed.suggestion is not None
    assert failed.memory.peak_bytes > failed.memory.activations_bytes > 20 * MIB
    assert set(failed.suggestion) == {changed, "peak_bytes"}
    assert failed.message == errors.strip()
    assert failed.message.startswith("out of memory on the longest batch (step 1: 80 rows of 512 tokens). It held: ")
    assert failed.message.endswith(f"{failed.suggestion['peak_bytes'] / MIB:.0f} MiB and would fit")
    again = with_changes(config, failed.suggestion, run="again")
    exit_code, errors = limited(again, limit_bytes)
    assert exit_code == 0, errors
    (verdict,) = events_of(again.run_dir, MemoryVerdict)
    assert verdict.planned.peak_bytes <= failed.suggestion["peak_bytes"]
    assert 0.85 < verdict.ratio < 1.15


def test_a_model_that_cannot_be_loaded_is_told_with_what_the_run_would_need(
    make_config: MakeConfig, limited: Limited, host: CalibrationConfig, tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "large")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 8}
    architecture = LlamaConfig.from_pretrained(folder, num_key_value_heads=8, head_dim=128, **sizes)
    LlamaForCausalLM(architecture).save_pretrained(folder)
    config = dataclasses.replace(
        make_config(shapes_path=write_shapes(folder, tmp_path / "shapes.json"), calibration=host),
        model_path=str(folder),
    )
    exit_code, errors = limited(config, host.base_bytes + host.libraries_bytes + 20 * MIB)
    assert exit_code == OutOfMemoryError.exit_code, errors
    (failed,) = events_of(config.run_dir, Failed)
    assert failed.message.startswith("out of memory while loading the model. By its plan the run needs: parameters 130")
    assert failed.message.endswith("a smaller one, or weights in 16 bits, needs less")
    assert failed.memory is not None and failed.memory.parameters_bytes == 4 * 34_083_840
    assert failed.suggestion is None
    assert not events_of(config.run_dir, Started)
    assert not events_of(config.run_dir, Step) and not events_of(config.run_dir, Finished)
