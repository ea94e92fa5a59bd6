"""The meter's benchmark: its arithmetic, and that its three ways are what they say."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest

from bench.bench_meter import WAYS, measure, summary
from lomo_core.memory.saved import SavedTensors


def test_a_sampled_step_counts_once_per_interval() -> None:
    row = summary({"off": [1.0, 2.0, 9.0], "on": [1.01, 2.0, 9.9], "sampled": [1.5, 3.0, 9.0]})
    assert (row["unsampled"], row["sampled"], row["num_steps"]) == (1.01, 1.5, 3)
    assert row["default_interval"] == pytest.approx((49 * 1.01 + 1.5) / 50, abs=1e-4)
    assert (row["median_unsampled"], row["median_sampled"]) == (1.01, 1.5)
    assert row["median_default_interval"] == row["default_interval"]


def test_each_way_takes_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[SavedTensors] = []
    real = SavedTensors.counting

    def counting(saved: SavedTensors) -> AbstractContextManager[None]:
        counted.append(saved)
        return real(saved)

    monkeypatch.setattr(SavedTensors, "counting", counting)
    setting = {"precision": "fp32", "checkpointing": True, "batch": 1, "seq": 16}
    found = measure(setting, num_rounds=2)
    assert {way: len(values) for way, values in found.items()} == dict.fromkeys(WAYS, 2)
    assert all(value > 0 for values in found.values() for value in values)
    assert len(counted) == 2 + 10  # one of the three ways, the warm-up's rounds too
