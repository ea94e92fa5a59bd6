"""Both halves of the wire: `run.json` in, `journal.jsonl` out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lomo_core.config import CalibrationConfig, ClipConfig, DataConfig, OptimizerConfig, ParamGroupConfig, TrainConfig
from lomo_core.errors import EXIT_CODES, ConfigError, EngineError
from lomo_core.events import (
    EVENT_TYPES,
    Failed,
    JournalLine,
    MemoryBytes,
    MemoryVerdict,
    Message,
    Step,
    decode_line,
    encode_line,
)
from lomo_core.journal import Journal

MINIMAL: dict[str, Any] = {"run_dir": "/r", "model_path": "/m", "data": {"train_path": "/t"}}


def step(**changes: Any) -> Step:
    fields: dict[str, Any] = {
        "step": 1,
        "total_steps": 2,
        "epoch": 0.5,
        "loss": 1.5,
        "mean_token_accuracy": None,
        "learning_rate": 0.1,
        "grad_norm": 2.0,
        "num_tokens": 10,
        "num_trained_tokens": 4,
        "step_s": 0.1,
        "tokens_per_s": 100.0,
        "memory": MemoryBytes(
            parameters_bytes=1, gradients_bytes=2, optimizer_bytes=3, activations_bytes=4, other_bytes=5, peak_bytes=15
        ),
    }
    return Step(**{**fields, **changes})


def test_a_configuration_survives_the_wire() -> None:
    config = TrainConfig(
        run_dir="/r",
        model_path="/m",
        data=DataConfig(train_path="/t", validation_path="/v", max_seq_length=99),
        optimizer=OptimizerConfig(
            name="adalomo",
            clip=ClipConfig(mode="value", threshold=0.5),
            param_groups=(ParamGroupConfig(pattern="norm", weight_decay=0.0),),
            frozen=("embed",),
        ),
        sample_prompts=("hello",),
        max_steps=7,
        resume_from=("/a", "/b"),
        shapes_path="/s",
        calibration=CalibrationConfig(base_bytes=300, libraries_bytes=40),
    )
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"data": {"train_path": "/t", "nonsense": 1}}, "data.nonsense"),
        ({"data": {}}, "data.train_path"),
        ({"data": []}, "data"),
        ({"n_epochs": 0}, "n_epochs"),
        ({"n_epochs": True}, "n_epochs"),
        ({"batch_size": "4"}, "batch_size"),
        ({"precision": "fp8"}, "precision"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps"),
        ({"optimizer": {"clip": {"mode": "value", "exact": "spill_file"}}}, "optimizer.clip.exact"),
        ({"optimizer": {"name": "adamw", "rounding": "stochastic"}}, "rounding"),
        ({"optimizer": {"rounding": "up"}}, "rounding"),
        ({"optimizer": {"name": "sgd", "clip": {"mode": "delayed"}}}, "clip"),
        ({"optimizer": {"name": "sgd"}, "precision": "fp16"}, "precision"),
        ({"optimizer": {"learning_rate": -0.1}}, "learning_rate"),
        ({"optimizer": {"frozen": ["("]}}, "frozen"),
        ({"optimizer": {"param_groups": [{"pattern": ""}]}}, "pattern"),
        ({"optimizer": {"param_groups": [{"pattern": "a", "learning_rate_scale": -1}]}}, "learning_rate_scale"),
        ({"optimizer": {"param_groups": [{"pattern": "a", "weight_decay": -1}]}}, "weight_decay"),
        ({"optimizer": {"param_groups": [{}]}}, "optimizer.param_groups.pattern"),
        ({"early_stopping_patience": 0}, "early_stopping_patience"),
        ({"early_stopping_patience": 2}, "early_stopping_patience"),
        ({"early_stopping_patience": 2, "eval_every_steps": 5}, "early_stopping_patience"),
        ({"keep_best": True}, "keep_best"),
        ({"final_model": "best"}, "final_model"),
        ({"optimizer": {"learning_rate": 0}}, "learning_rate"),
        ({"optimizer": {"clip": {"mode": "bad"}}}, "mode"),
        ({"schedule": {"warmup_ratio": 1}}, "warmup_ratio"),
        ({"calibration": {"base_bytes": 1}}, "calibration.libraries_bytes"),
        ({"calibration": {"base_bytes": -1, "libraries_bytes": 0}}, "base_bytes"),
    ],
)
def test_a_bad_configuration_names_its_field(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_json(json.dumps({**MINIMAL, **changes}))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("gradient_accumulation_steps", "a fused update leaves no gradient to add to"),
        ("use_reentrant", "never reentrant, which would update a shared weight"),
        ("trust_remote_code", "code of a model folder is never run"),
    ],
)
def test_what_other_trainers_have_is_refused_with_the_reason(key: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        TrainConfig.from_json(json.dumps({**MINIMAL, key: True}))


@pytest.mark.parametrize(
    ("name", "rate", "rounding"),
    [
        ("lomo", 0.01, "stochastic"),
        ("adalomo", 5e-4, "stochastic"),
        ("sgd", 0.01, "nearest"),
        ("adamw", 2e-5, "nearest"),
    ],
)
def test_defaults_follow_the_rule(name: Any, rate: float, rounding: str) -> None:
    config = OptimizerConfig(name=name)
    assert (config.peak_learning_rate, config.weight_rounding) == (rate, rounding)
    assert OptimizerConfig(name=name, learning_rate=0.3, rounding="nearest").peak_learning_rate == 0.3


def test_text_that_is_not_json() -> None:
    with pytest.raises(ConfigError, match="not JSON"):
        TrainConfig.from_json("{")


def test_events_survive_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(step())
    journal.say("warn", "h\u00e9 \n \ud800")
    journal.close()
    first, second = [decode_line(line).event for line in journal.path.read_bytes().splitlines()]
    assert first == step()
    assert second == Message(level="warn", message="h\u00e9 \n ?")


def test_what_is_said_of_memory_survives_the_journal() -> None:
    memory = step().memory
    verdict = MemoryVerdict(step=2, planned=memory, measured=replace(memory, peak_bytes=20), ratio=0.75)
    failed = Failed(code="out_of_memory", message="m", memory=memory, suggestion={"batch_size": 2, "peak_bytes": 9})
    for event in (verdict, failed, replace(failed, memory=None, suggestion=None)):
        assert decode_line(encode_line(JournalLine(1.0, event))).event == event


def test_floats_that_are_not_finite_are_null_on_the_wire() -> None:
    raw = encode_line(JournalLine(1.0, step(loss=math.nan, grad_norm=math.inf)))
    assert json.loads(raw)["loss"] is None
    event = decode_line(raw).event
    assert isinstance(event, Step) and math.isnan(event.loss) and event.grad_norm is None


@pytest.mark.parametrize("raw", [b"{}", b'{"time": 1, "type": "nonsense"}', b'{"time": 1, "type": "message"}', b"{"])
def test_lines_that_are_no_events_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"event|unexpected end"):
        decode_line(raw)


def test_a_torn_line_is_dropped_and_the_journal_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.say("info", "one")
    journal.close()
    with journal.path.open("ab") as stream:
        stream.write(b'{"time": 1, "ty')
    again = Journal(tmp_path)
    again.say("info", "two")
    again.close()
    events = [decode_line(line).event for line in journal.path.read_bytes().splitlines()]
    assert [event.message for event in events if isinstance(event, Message)] == ["one", "two"]


def test_a_journal_of_one_torn_line_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b"x" * 200_000)
    Journal(tmp_path).close()
    assert (tmp_path / "journal.jsonl").read_bytes() == b""


def test_codes_are_one_to_one() -> None:
    assert len({error.code for error in EXIT_CODES.values()}) == len(EXIT_CODES)
    assert EXIT_CODES[1] is EngineError
    assert len(EVENT_TYPES) == 12
