"""The fastest way to the exact norm that there is room for."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_core import build
from lomo_core.clipping_choice import HostSpeed, StepCost, choose_exact_clipping, measure_host
from lomo_core.config import ClipConfig, OptimizerConfig
from lomo_core.errors import DiskFullError
from lomo_core.events import Finished, Message
from lomo_core.journal import Journal
from lomo_core.model import weights_sha256
from lomo_core.stop import StopRequest
from lomo_core.trainer import Trainer
from tests.support.engine_runs import MakeConfig, events_of, run_here

GIB = 2**30
# A 7B model in bf16 with 4096 tokens per step on a card of 400 TFLOP/s: 0.43 s for the second backward.
STEP = StepCost(num_parameters=7 * 10**9, gradient_bytes=14 * 10**9, tokens_per_step=4096, recomputes=True)
HOST = HostSpeed(
    flop_per_s=4e14,
    memory_bytes_per_s=25e9,
    disk_bytes_per_s=3e9,
    free_memory_bytes=64 * GIB,
    free_disk_bytes=200 * GIB,
)


@pytest.mark.parametrize(
    ("step", "host", "expected"),
    [
        ({}, {}, "second_backward"),
        ({"tokens_per_step": 65_536}, {}, "spill_memory"),
        ({"tokens_per_step": 65_536}, {"free_memory_bytes": 8 * GIB}, "second_backward"),
        ({"tokens_per_step": 262_144}, {"free_memory_bytes": 8 * GIB}, "spill_file"),
        ({"tokens_per_step": 262_144}, {"free_memory_bytes": 0, "free_disk_bytes": 8 * GIB}, "second_backward"),
        ({}, {"flop_per_s": 1e12}, "spill_memory"),
    ],
)
def test_the_choice(step: dict[str, Any], host: dict[str, Any], expected: str) -> None:
    way, seconds = choose_exact_clipping(dataclasses.replace(STEP, **step), dataclasses.replace(HOST, **host))
    assert way == expected
    assert seconds[way] == min(seconds.values())


def test_the_estimates() -> None:
    _, seconds = choose_exact_clipping(STEP, HOST)
    assert seconds["second_backward"] == pytest.approx(6 * 7e9 * 4096 / 4e14)
    assert seconds["spill_memory"] == pytest.approx(2 * 14e9 / 25e9)
    assert seconds["spill_file"] == pytest.approx(2 * 14e9 / 3e9)
    without = dataclasses.replace(STEP, recomputes=False)
    assert choose_exact_clipping(without, HOST)[1]["second_backward"] == pytest.approx(4 * 7e9 * 4096 / 4e14)


def test_a_measurement_is_of_this_machine(tmp_path: Path) -> None:
    found = measure_host(torch.device("cpu"), torch.float32, tmp_path)
    assert 1e8 < found.flop_per_s < 1e14
    assert 1e5 < found.disk_bytes_per_s < 1e12
    # The weights are in host memory themselves: nothing of it is offered.
    assert found.free_memory_bytes == 0
    assert found.free_disk_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_the_choice_is_announced(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SMALLEST_CHOICE_BYTES", 0)
    chosen = make_config(run="chosen", optimizer=OptimizerConfig(learning_rate=0.05), max_steps=2)
    run_here(chosen)
    (text,) = [
        event.message for event in events_of(chosen.run_dir, Message) if event.message.startswith("the norm comes from")
    ]
    assert "estimates per step: second_backward " in text
    monkeypatch.undo()
    plain = make_config(run="plain", optimizer=OptimizerConfig(learning_rate=0.05), max_steps=2)
    run_here(plain)
    assert not any("the norm comes from" in event.message for event in events_of(plain.run_dir, Message))
    hashes = {events_of(config.run_dir, Finished)[0].weights_sha256 for config in (chosen, plain)}
    assert len(hashes) == 1


def test_a_disk_that_is_full_of_gradients_ends_the_run_by_name(make_config: MakeConfig) -> None:
    clip = ClipConfig(mode="norm", exact="spill_file")
    config = make_config(optimizer=OptimizerConfig(learning_rate=0.05, clip=clip))
    trainer = Trainer(config, Journal(config.run_dir), StopRequest())
    before = weights_sha256(trainer._training.model)
    store = trainer._training.optimizer._store  # type: ignore[attr-defined]
    os.dup2(os.open("/dev/full", os.O_RDWR), store._file)
    with pytest.raises(DiskFullError, match="what gradients were put aside"):
        trainer._train_step()
    assert weights_sha256(trainer._training.model) == before
    trainer._journal.close()
