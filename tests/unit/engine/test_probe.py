"""The longest batch is tried first, leaves no trace, and ends a run that does not fit before its first step."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lomo_core.config import ClipConfig, DataConfig, OptimizerConfig
from lomo_core.errors import OutOfMemoryError
from lomo_core.events import Finished, Started, Step
from lomo_core.trainer import Trainer
from tests.support.engine_runs import MakeConfig, events_of, rewrite_json, run_here, write_run
from tests.support.faults import memory_for
from tests.support.tiny_model import chat, chat_rows, make_tiny_model, write_jsonl


@pytest.mark.parametrize("name", ["lomo", "adalomo", "sgd", "adamw"])
@pytest.mark.parametrize("mode", ["norm", "group"])
def test_a_probe_changes_no_bit(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: Any, mode: Any
) -> None:
    """With dropout, so that a generator that has moved on would show."""
    model = make_tiny_model(tmp_path / "dropout")
    rewrite_json(model / "config.json", attention_dropout=0.3)
    rule = OptimizerConfig(name=name, learning_rate=0.001, clip=ClipConfig(mode=mode))
    base = dataclasses.replace(
        make_config(optimizer=rule, precision="bf16", max_steps=4, checkpoint_every_steps=0), model_path=str(model)
    )
    found = {}
    for is_tried in (True, False):
        if not is_tried:
            monkeypatch.setattr(Trainer, "_try_longest_batch", lambda _: None)
        config = dataclasses.replace(base, run_dir=str(tmp_path / f"run-{is_tried}"))
        run_here(config)
        steps = [(event.loss, event.grad_norm, event.rows_hash) for event in events_of(config.run_dir, Step)]
        found[is_tried] = (steps, events_of(config.run_dir, Finished)[0].weights_sha256)
    assert found[True] == found[False]


LIMITED = """
import resource, sys
from pathlib import Path
from lomo_core.__main__ import main
assert main(["train", sys.argv[1]], {"LOMO_ENGINE_THREADS": "1"}) == 0
limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 200 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(["train", sys.argv[2]], {}))
"""


@pytest.mark.slow
def test_a_process_that_runs_out_of_memory_says_where_and_with_what(make_config: MakeConfig, tmp_path: Path) -> None:
    """200 MiB of address space are left for a batch that needs more than 1 GiB; a run of short rows has fitted."""
    small = make_config(run="small", max_steps=1)
    big = make_config(
        run="big",
        batch_size=400,
        activation_checkpointing=False,
        data=DataConfig(train_path=str(tmp_path / "long.jsonl")),
    )
    write_jsonl(tmp_path / "long.jsonl", [chat("word " * 200, "x")] * 400)
    command = [sys.executable, "-c", LIMITED, str(write_run(small)), str(write_run(big))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == OutOfMemoryError.exit_code, result.stderr
    assert result.stderr.startswith("out of memory on the longest batch (step 1: 400 rows of ")
    assert "It held: parameters" in result.stderr
    assert events_of(big.run_dir, Started) and not events_of(big.run_dir, Step)


def test_a_run_that_does_not_fit_ends_before_its_first_step(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(batch_size=1, data=DataConfig(train_path=str(tmp_path / "train.jsonl")))
    write_jsonl(tmp_path / "train.jsonl", [*chat_rows(11), chat("word " * 100, "x")])
    with memory_for(200) as tried, pytest.raises(OutOfMemoryError) as caught:
        run_here(config)
    assert len(tried) == 1
    assert events_of(config.run_dir, Started) and not events_of(config.run_dir, Step)
    assert "out of memory on the longest batch (step" in caught.value.message
    for name in ("parameters", "gradients", "optimizer", "activations", "peak"):
        assert f"{name} " in caught.value.message
    with memory_for(10_000) as tried:
        run_here(dataclasses.replace(config, max_steps=2, run_dir=str(tmp_path / "fits")))
    assert max(tried) == tried[0]
