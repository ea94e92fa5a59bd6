"""The engine's own plan of a run, its verdict, and what is proposed where memory does not suffice."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig

from lomo_core.config import CalibrationConfig, ClipConfig, OptimizerConfig, TrainConfig
from lomo_core.data.batches import IGNORE, collate, collate_packed
from lomo_core.data.template import EncodedRow
from lomo_core.events import Finished, MemoryBytes, MemoryVerdict, Message, Started, Step
from lomo_core.journal import Journal
from lomo_core.memory.model_shapes import FORMAT, ModelShapes
from lomo_core.memory.paper import llama
from lomo_core.memory.plan import Norm, Plan, Setting, plan
from lomo_core.memory.process import Calibration, process_peak_bytes
from lomo_core.memory.shapes import read_shapes
from lomo_core.plan_command import read_config
from lomo_core.run_identity import run_sha256
from lomo_core.run_memory import BatchShape, RunMemory
from lomo_core.stop import StopRequest
from lomo_core.trainer import Trainer
from tests.support.engine_runs import MakeConfig, events_of, run_here
from tests.support.tiny_model import chat, make_tiny_model, write_jsonl

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 1 << 20


@pytest.fixture(scope="module")
def shapes(tiny_model: Path) -> ModelShapes:
    """Of the tiny model, under sdpa. Costs about 2 s, once."""
    return read_shapes(read_config(tiny_model))


@pytest.fixture
def shapes_path(shapes: ModelShapes, tmp_path: Path) -> str:
    """The same as a file."""
    path = tmp_path / "shapes.json"
    path.write_text(shapes.to_json(), encoding="utf-8")
    return str(path)


def planned_of(config: TrainConfig) -> MemoryBytes | None:
    (started,) = events_of(config.run_dir, Started)
    return started.planned


def warnings_of(config: TrainConfig) -> list[str]:
    return [event.message for event in events_of(config.run_dir, Message) if event.level == "warn"]


def as_measured(found: Plan, peak_bytes: int) -> MemoryBytes:
    parts = (found.parameters_bytes, found.gradients_bytes, found.optimizer_bytes, found.activations_bytes)
    return MemoryBytes(
        parameters_bytes=parts[0],
        gradients_bytes=parts[1],
        optimizer_bytes=parts[2],
        activations_bytes=parts[3],
        other_bytes=max(0, peak_bytes - sum(parts)),
        peak_bytes=peak_bytes,
    )


def row(num_tokens: int, *, trained: int = 1) -> EncodedRow:
    ids = torch.arange(num_tokens, dtype=torch.int32).numpy()
    return EncodedRow(ids, ids >= num_tokens - trained, is_cut=False)


@pytest.mark.parametrize(
    ("rows", "is_masked"),
    [([row(16), row(16)], False), ([row(16), row(15)], True), ([row(16)], False), ([row(13)], True)],
)
def test_rows_need_a_mask_where_one_is_padded(rows: list[EncodedRow], is_masked: bool) -> None:
    found = BatchShape.of(collate(rows, pad_token_id=0))
    assert found == BatchShape(
        rows=len(rows), width=16, is_masked=is_masked, trained_tokens=len(rows), trained_columns=1
    )


@pytest.mark.parametrize(
    ("sequences", "is_masked"),
    [
        ([[row(16)]], False),
        ([[row(10), row(6)]], True),
        ([[row(16)], [row(8), row(8)]], True),
        ([[row(15)]], True),  # a column of padding is a row of its own
    ],
)
def test_packed_rows_need_a_mask_unless_each_fills_its_sequence(
    sequences: list[list[EncodedRow]], is_masked: bool
) -> None:
    assert BatchShape.of(collate_packed(sequences, pad_token_id=0)).is_masked is is_masked


def test_a_tokens_loss_belongs_to_the_column_before_it() -> None:
    found = BatchShape.of(collate([row(8, trained=8), row(8, trained=2)], pad_token_id=0))
    assert (found.trained_tokens, found.trained_columns) == (7 + 2, 7)


HOST = CalibrationConfig(base_bytes=300 * MIB, libraries_bytes=40 * MIB)
CALIBRATION = Calibration(base_bytes=300 * MIB, libraries_bytes=40 * MIB)


@pytest.mark.parametrize(
    ("clip", "is_first", "norm"),
    [
        (ClipConfig(mode="group"), True, "one_pass"),
        (ClipConfig(mode="norm"), False, "second_backward"),
        (ClipConfig(mode="norm", exact="spill_file"), False, "spill_file"),
        (ClipConfig(mode="norm", exact="spill_memory"), False, "spill_memory"),
        # The first step has no norm of a step before.
        (ClipConfig(mode="delayed"), True, "second_backward"),
        (ClipConfig(mode="delayed"), False, "one_pass"),
    ],
)
def test_the_plan_is_of_the_longest_batch_as_it_will_run(
    make_config: MakeConfig,
    shapes: ModelShapes,
    shapes_path: str,
    clip: Any,
    is_first: bool,
    norm: Norm,
) -> None:
    config = make_config(
        shapes_path=shapes_path,
        calibration=HOST,
        activation_checkpointing=False,
        optimizer=OptimizerConfig(learning_rate=0.05, clip=clip),
    )
    if is_first:
        write_jsonl(Path(config.data.train_path), [chat("please tell", "day")] * 12)
    with closing(Journal(config.run_dir)) as journal:
        trainer = Trainer(config, journal, StopRequest())
    assert (trainer._longest_step == 0) is is_first
    batch = trainer._data.batch(trainer._longest_step or 0)
    rows, width = batch.input_ids.shape
    setting = Setting(
        precision="fp32",
        batch_size=rows,
        seq_length=width,
        activation_checkpointing=False,
        attention="sdpa",
        is_padded=batch.num_tokens < rows * width,
        trained_share=batch.num_trained / (rows * width),
        norm=norm,
    )
    found = plan(shapes, setting)
    peak = process_peak_bytes(found, CALIBRATION)
    assert planned_of(config) == as_measured(found, peak)


def test_a_run_is_planned_and_judged(make_config: MakeConfig, shapes_path: str) -> None:
    config = make_config(shapes_path=shapes_path)
    events = run_here(config)
    steps = events_of(config.run_dir, Step)
    verdict, finished = events[-2:]
    assert isinstance(verdict, MemoryVerdict) and isinstance(finished, Finished)
    highest = max(steps, key=lambda step: step.memory.peak_bytes)
    assert (verdict.step, verdict.measured) == (highest.step, highest.memory)
    assert verdict.planned == planned_of(config)
    assert verdict.planned.parameters_bytes == verdict.measured.parameters_bytes
    assert verdict.ratio == verdict.planned.peak_bytes / highest.memory.peak_bytes
    written = json.loads((Path(config.run_dir) / "memory.json").read_text(encoding="utf-8"))
    assert written["measured"]["peak_bytes"] == highest.memory.peak_bytes
    assert not (Path(finished.model_path) / "memory.json").exists()
    assert not warnings_of(config)


def test_without_shapes_nothing_is_planned(make_config: MakeConfig) -> None:
    config = make_config(max_steps=1)
    run_here(config)
    assert planned_of(config) is None
    assert not events_of(config.run_dir, MemoryVerdict) and not (Path(config.run_dir) / "memory.json").exists()
    assert not warnings_of(config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "No such file"),
        ((f'"format":{FORMAT}', '"format":0'), "not the shapes of a model, or those of another version"),
        (
            ("LlamaFor", "OtherFor"),
            "they are of a OtherForCausalLM with 106,816 parameters, and this is a LlamaForCausalLM",
        ),
        (('"attention":"sdpa"', '"attention":"eager"'), "LlamaForCausalLM was not traced with sdpa attention"),
    ],
)
def test_shapes_that_cannot_be_used_are_warned_about_and_the_run_goes_on(
    make_config: MakeConfig, shapes: ModelShapes, tmp_path: Path, change: tuple[str, str] | None, reason: str
) -> None:
    path = tmp_path / "given.json"
    if change is not None:
        path.write_text(shapes.to_json().replace(*change), encoding="utf-8")
    config = make_config(shapes_path=str(path), max_steps=1)
    run_here(config)
    (warning,) = warnings_of(config)
    assert warning.startswith("the run's memory is not planned: the model's shapes cannot be used (")
    assert reason in warning
    assert planned_of(config) is None
    assert events_of(config.run_dir, Finished) and not events_of(config.run_dir, MemoryVerdict)


def test_a_head_of_the_models_own_makes_whole_columns_of_logits(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "granite")
    config = LlamaConfig.from_pretrained(folder)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id")}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    GraniteForCausalLM(GraniteConfig(**sizes, **heads, tie_word_embeddings=True, logits_scaling=8.0)).save_pretrained(
        folder
    )
    shapes = read_shapes(read_config(folder))
    (tmp_path / "granite.json").write_text(shapes.to_json(), encoding="utf-8")
    run = replace(make_config(shapes_path=str(tmp_path / "granite.json"), calibration=HOST), model_path=str(folder))
    with closing(Journal(run.run_dir)) as journal:
        trainer = Trainer(run, journal, StopRequest())
    batch = trainer._data.batch(trainer._longest_step or 0)
    rows, width = batch.input_ids.shape
    columns = int((batch.labels[:, 1:] != IGNORE).any(dim=0).sum())
    setting = Setting(precision="fp32", batch_size=rows, seq_length=width, trained_share=columns / width, head="logits")
    found = plan(shapes, setting)
    assert columns > batch.num_trained / rows
    assert planned_of(run) == as_measured(found, process_peak_bytes(found, CALIBRATION))


def test_a_resumed_run_is_judged_by_its_own_steps(make_config: MakeConfig, shapes_path: str) -> None:
    first = make_config(run="first")
    run_here(first)
    checkpoint = str(Path(first.run_dir) / "checkpoints" / "step-6")
    # Neither shapes nor calibration make it another run.
    resumed = make_config(run="resumed", shapes_path=shapes_path, calibration=HOST, resume_from=(checkpoint,))
    assert run_sha256(resumed) == run_sha256(first)
    run_here(resumed)
    (verdict,) = events_of(resumed.run_dir, MemoryVerdict)
    assert verdict.step in (7, 8)
    done = make_config(
        run="done",
        shapes_path=shapes_path,
        resume_from=(str(Path(first.run_dir) / "checkpoints" / "step-8"),),
    )
    run_here(done)
    assert planned_of(done) is None and not events_of(done.run_dir, MemoryVerdict)
    hashes = {events_of(run.run_dir, Finished)[0].weights_sha256 for run in (first, resumed, done)}
    assert len(hashes) == 1


LONGEST = BatchShape(rows=16, width=256, is_masked=False, trained_tokens=160, trained_columns=20)


def memory_of(config: TrainConfig, *, device: torch.device, longest_row: int = 256) -> RunMemory:
    with closing(Journal(config.run_dir)) as journal:
        return RunMemory(config, LONGEST, longest_row=longest_row, device=device, journal=journal)


def held(peak_bytes: int) -> MemoryBytes:
    return MemoryBytes(
        parameters_bytes=0,
        gradients_bytes=0,
        optimizer_bytes=0,
        activations_bytes=0,
        other_bytes=peak_bytes,
        peak_bytes=peak_bytes,
    )


def test_checkpointing_is_proposed_for_the_same_batches(
    make_config: MakeConfig, shapes: ModelShapes, shapes_path: str
) -> None:
    config = make_config(shapes_path=shapes_path, activation_checkpointing=False, batch_size=16)
    memory = memory_of(config, device=CUDA, longest_row=512)
    planned = memory.planned
    assert planned is not None
    found = memory.suggest(held(planned.peak_bytes * 2))  # the plan was too low: still nothing as large is proposed
    assert found is not None
    setting = Setting(precision="fp32", batch_size=16, seq_length=256, is_padded=False, trained_share=160 / (16 * 256))
    assert found.changes == {"activation_checkpointing": True}
    assert found.peak_bytes == plan(shapes, setting).peak_bytes < 0.95 * planned.peak_bytes
    assert found.sentence() == (f"activation_checkpointing needs {found.peak_bytes / MIB:.0f} MiB and would fit")


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_other_batches_are_taken_for_the_worst_of_the_data(
    make_config: MakeConfig, shapes: ModelShapes, shapes_path: str, device: torch.device
) -> None:
    config = make_config(shapes_path=shapes_path, calibration=HOST, batch_size=16)
    memory = memory_of(config, device=device, longest_row=505)
    assert memory.planned is not None
    found = memory.suggest(held(memory.planned.peak_bytes))
    assert found is not None
    assert list(found.changes) == ["batch_size"]
    worst = Setting(
        precision="fp32", batch_size=found.changes["batch_size"], seq_length=512, masks_one_row=True, attention="sdpa"
    )
    longest = replace(worst, batch_size=16, seq_length=256, is_padded=False, trained_share=160 / (16 * 256))
    capacity = 0.95 * plan(shapes, longest).peak_bytes
    assert (
        plan(shapes, worst).peak_bytes
        <= capacity
        < plan(shapes, replace(worst, batch_size=worst.batch_size + 1)).peak_bytes
    )
    on_host = process_peak_bytes(plan(shapes, worst), CALIBRATION)
    assert found.peak_bytes == (on_host if device == CPU else plan(shapes, worst).peak_bytes)
    assert found.sentence().startswith(f"batch_size {worst.batch_size} needs ")


def test_lomo_in_place_of_a_baseline_is_planned_with_its_own_way_to_the_norm(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    shapes = llama("7B")
    (tmp_path / "7B.json").write_text(shapes.to_json(), encoding="utf-8")
    adamw = OptimizerConfig(name="adamw", clip=ClipConfig(mode="norm"))
    config = make_config(shapes_path=str(tmp_path / "7B.json"), optimizer=adamw, precision="bf16")
    # Weights, gradients and moments in bf16 alone are 8 bytes a parameter.
    found = memory_of(config, device=CUDA).suggest(held(6 * shapes.num_parameters))
    assert found is not None
    assert found.changes == {"optimizer": "lomo"}
    longest = Setting(batch_size=16, seq_length=256, is_padded=False, trained_share=160 / (16 * 256))
    assert found.peak_bytes == plan(shapes, replace(longest, norm="second_backward")).peak_bytes
    assert found.peak_bytes > plan(shapes, longest).peak_bytes


def test_where_nothing_would_fit_nothing_is_proposed(make_config: MakeConfig, shapes_path: str) -> None:
    memory = memory_of(make_config(shapes_path=shapes_path), device=CPU)
    assert memory.suggest(held(100 * MIB)) is None  # less than a process has before its model
    assert memory_of(make_config(), device=CPU).suggest(held(1 << 40)) is None
