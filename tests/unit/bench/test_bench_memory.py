"""The memory benchmark's judgement, and its measurement against a plan, of the smallest model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers

from bench.bench_memory import CASES, MODELS, is_within, judge, measure, report
from lomo_core.memory.plan import plan
from lomo_core.memory.process import Calibration, holes_bytes, process_peak_bytes
from lomo_core.memory.shapes import read_shapes

pytestmark = pytest.mark.slow


def test_there_are_enough_settings_of_every_kind() -> None:
    assert len(set(CASES)) >= 16
    assert {case.optimizer for case in CASES} == {"lomo", "adalomo", "sgd", "adamw"}
    assert {case.precision for case in CASES} == {"fp32", "bf16"}
    assert {case.checkpointing for case in CASES} == {True, False}
    assert len({MODELS[case.model]["model_type"] for case in CASES}) >= 2


@pytest.mark.parametrize("optimizer", ["lomo", "adamw"])
def test_a_step_takes_what_was_planned(optimizer: str) -> None:
    case = replace(CASES[0], optimizer=optimizer)
    shapes = {case.model: read_shapes(transformers.AutoConfig.for_model(**MODELS[case.model]))}
    measured = measure(case, shapes)
    found = plan(shapes[case.model], case.setting())
    # The plan takes all tokens for different ones: a few of these repeat, and their row of the embedding waits once.
    assert measured["gradients_bytes"] <= found.gradients_bytes <= 1.05 * measured["gradients_bytes"]
    calibration = Calibration.of_step(
        base_bytes=measured["base_bytes"], process_peak_bytes=measured["process_peak_bytes"], tiny=found
    )
    row = judge(measured, shapes, calibration)
    assert abs(row["tensor_error"]) < 0.05
    assert row["process_error"] == pytest.approx(0, abs=1e-6)  # it calibrates itself
    assert is_within(row)
    assert not is_within({**row, "tensor_error": -0.051})
    assert not is_within({**row, "process_error": 0.101})
    bad = {**row, "name": "the bad one", "process_error": 0.2}
    lines = report([bad, row], calibration).splitlines()
    assert lines[2].startswith("the bad one")  # the worst is the last of the table
    assert "1 of 2 within" in lines[-1]


def test_holes_are_bounded_by_the_watch_of_the_heap() -> None:
    case = CASES[0]
    shapes = read_shapes(transformers.AutoConfig.for_model(**MODELS[case.model]))
    small, large = (plan(shapes, replace(case.setting(), batch_size=batch)) for batch in (4, 1024))
    assert 0 < holes_bytes(small) < holes_bytes(large) == 56 * 2**20
    host = Calibration(base_bytes=100, libraries_bytes=10)
    assert process_peak_bytes(large, host) == 110 + large.peak_bytes + holes_bytes(large)
