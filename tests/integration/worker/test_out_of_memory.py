"""A real engine under a real limit on its memory: the job tells what it held and what would fit, and the worker goes on
with the next one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import KnownShapes
from tests.support.tiny_model import chat, make_tiny_model, write_jsonl
from tests.support.worker_bench import Bench

pytestmark = pytest.mark.slow

MIB = 1 << 20
# What an engine holds before its model, 373 MiB here, and room for a step of 16 rows but not of 80 (408 MiB).
LIMIT_BYTES = 373 * MIB + 200 * MIB


@pytest.fixture
def values(bench: Bench, tmp_path: Path, known_shapes: KnownShapes) -> dict[str, Any]:
    """A job of 80 rows of 512 tokens a step; its model's shapes are known, and no host is asked whether it fits."""
    model = make_tiny_model(bench.settings.data_dir / "models" / "tiny")
    known_shapes.give_file(bench.settings.data_dir, model / "config.json")
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("word " * 400, "x")] * 80)
    return {
        "model": "tiny",
        "training_file": bench.store(rows.read_text(encoding="utf-8")),
        "seed": 1,
        "batch_size": 80,
        "lomo": {"precision": "fp32", "activation_checkpointing": False, "max_steps": 1, "clip": {"mode": "none"}},
    }


def test_out_of_memory_is_an_answer_and_the_worker_lives_on(bench: Bench, values: dict[str, Any]) -> None:
    engine = ("prlimit", f"--data={LIMIT_BYTES}", sys.executable, "-m", "lomo_core")
    node = bench.node(engine_command=engine, engine_threads=1)
    large = bench.work_until_ended(node, bench.submit_spec(values), timeout_s=90)
    assert large.status == "failed"
    assert large.error is not None
    assert (large.error["code"], large.failures) == ("out_of_memory", 0)
    message = large.error["message"]
    assert "80 rows of 512 tokens). It held: parameters" in message
    assert "and would fit" in message
    assert large.memory is not None
    assert large.memory["peak_bytes"] > large.memory["activations_bytes"] > 20 * MIB
    failed = next(event for event in bench.events(large.id) if event.message == "The engine ended: out_of_memory.")
    assert failed.data is not None
    suggestion = failed.data["suggestion"]
    assert suggestion["peak_bytes"] < large.run["planned"]["peak_bytes"]  # type: ignore[index]
    options = {name: value for name, value in suggestion.items() if name not in ("peak_bytes", "batch_size")}
    fitting = values | {
        "batch_size": suggestion.get("batch_size", values["batch_size"]),
        "lomo": values["lomo"] | options,
    }
    small = bench.work_until_ended(node, bench.submit_spec(fitting), timeout_s=90)
    assert (small.status, small.error) == ("succeeded", None)
    [said] = [text for text in bench.messages(small.id) if text.startswith("Memory: planned ")]
    assert "measured" in said
