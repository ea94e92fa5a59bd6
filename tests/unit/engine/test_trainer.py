"""What the trainer says and refuses: events, warnings, non-finite losses, memory that runs out."""

from __future__ import annotations

import dataclasses
import errno
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_core.build import build_optimizer
from lomo_core.config import ClipConfig, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from lomo_core.errors import ConfigError, DataError, ModelError, OutOfMemoryError
from lomo_core.events import Evaluation, Finished, Message, Started, Step
from lomo_core.execute.plain import PlainExecutor
from lomo_core.head import batch_loss
from lomo_core.journal import Journal
from lomo_core.memory.meter import Meter, live_bytes_function, resident_peak_bytes
from lomo_core.model import load_model
from lomo_core.oom import out_of_memory_named
from lomo_core.optim import AdaLomo, Lomo
from lomo_core.optim.fused import FusedOptimizer
from lomo_core.stop import StopRequest
from lomo_core.trainer import Trainer
from tests.support.engine_runs import MakeConfig, events_of, rewrite_json, run_here
from tests.support.tiny_model import chat, chat_rows, make_tiny_model, write_jsonl

CPU = torch.device("cpu")


def messages_of(config: TrainConfig) -> list[Message]:
    """Without the words on what is going on."""
    return [message for message in events_of(config.run_dir, Message) if message.level != "info"]


def test_a_run_says_what_it_does(make_config: MakeConfig) -> None:
    config = make_config(validation="choices.jsonl", schedule=ScheduleConfig(warmup_ratio=0.25))
    events = run_here(config)
    (started,) = events_of(config.run_dir, Started)
    assert (started.step, started.total_steps, started.num_train_rows, started.num_truncated_rows) == (0, 8, 12, 0)
    assert started.num_parameters == 106_816
    steps = events_of(config.run_dir, Step)
    assert [step.step for step in steps] == list(range(1, 9))
    assert [round(step.epoch, 3) for step in steps] == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    assert [step.learning_rate for step in steps][:3] == pytest.approx([0.025, 0.05, 0.05])
    assert steps[-1].num_trained_tokens == 2 * started.num_trainable_tokens
    assert all(math.isfinite(step.loss) and step.grad_norm is not None and step.grad_norm > 0 for step in steps)
    assert all(0 <= (step.mean_token_accuracy or 0) <= 1 for step in steps)
    assert {event.step: event.choice_accuracy is not None for event in events_of(config.run_dir, Evaluation)} == {
        0: True,
        8: True,
    }
    assert isinstance(events[-1], Finished)
    assert not messages_of(config)


def test_learning_happens(make_config: MakeConfig, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", chat_rows(28))
    config = make_config(n_epochs=12, batch_size=4, checkpoint_every_steps=0, precision="bf16")
    write_jsonl(tmp_path / "train.jsonl", chat_rows(28))
    run_here(config)
    losses = [step.loss for step in events_of(config.run_dir, Step)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_memory_by_category(make_config: MakeConfig) -> None:
    config = make_config(optimizer=OptimizerConfig(name="adalomo", learning_rate=0.001), max_steps=2)
    run_here(config)
    memory = events_of(config.run_dir, Step)[-1].memory
    assert memory.parameters_bytes == 4 * 106_816
    # The tied embedding's waits for the end of the backward pass, beside one other at a time.
    assert memory.gradients_bytes == 4 * (512 * 64 + 128 * 64)
    assert 0 < memory.optimizer_bytes < 0.1 * memory.parameters_bytes
    assert memory.activations_bytes > 0 and memory.other_bytes >= 0
    known = memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes + memory.activations_bytes
    assert memory.peak_bytes == known + memory.other_bytes


def test_activation_checkpointing_keeps_less_and_changes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    found = {}
    for on in (True, False):
        config = make_config(run=f"run-{on}", activation_checkpointing=on)
        rows = [chat("word " * 60, "answer " * 60)] * 12
        write_jsonl(tmp_path / "train.jsonl", rows)  # type: ignore[arg-type]
        run_here(config)
        (end,) = events_of(config.run_dir, Finished)
        found[on] = (events_of(config.run_dir, Step)[-1].memory.activations_bytes, end.weights_sha256)
    assert found[True][0] < 0.7 * found[False][0]
    assert found[True][1] == found[False][1]


def test_the_meter_sees_a_tensor_of_the_forward_pass() -> None:
    live = live_bytes_function(CPU)
    before = live()
    tensor = torch.empty(10_000_000)
    assert live() - before == pytest.approx(40_000_000, abs=100_000)
    del tensor
    assert resident_peak_bytes() > 50_000_000


@pytest.mark.parametrize(
    ("name", "rate", "expected"),
    [
        ("lomo", 5e-5, "Adam's scale"),
        ("lomo", 5e-4, None),
        ("sgd", 5e-5, "Adam's scale"),
        ("adalomo", 5e-5, None),
        ("adamw", 0.01, "LOMO's scale"),
        ("adamw", 5e-5, None),
    ],
)
def test_a_rate_of_another_familys_scale_is_warned_about(
    make_config: MakeConfig, name: Any, rate: float, expected: str | None
) -> None:
    config = make_config(optimizer=OptimizerConfig(name=name, learning_rate=rate), max_steps=1)
    run_here(config)
    found = [message.message for message in messages_of(config)]
    assert not found if expected is None else expected in found[0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("unable to mmap 4096 bytes from file </m/model.safetensors>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_memory_that_runs_out_is_named_with_figures(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config = make_config()
    trainer = Trainer(config, Journal(config.run_dir), StopRequest())
    trainer._train_step()

    def run(_: Any) -> None:
        raise error

    monkeypatch.setattr(trainer._training.executor, "run", run)
    with pytest.raises(OutOfMemoryError, match=r"in step 2\. It held: parameters 0 MiB.*batch_size") as caught:
        trainer._train_step()
    assert caught.value.memory is not None and caught.value.memory.peak_bytes > 0
    assert caught.value.suggestion is None, "without a plan nothing is known to fit"
    trainer._journal.close()


def test_other_runtime_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_named("here", lambda: None):
        raise RuntimeError("shapes do not match")
    with pytest.raises(FileNotFoundError), out_of_memory_named("here", lambda: None):
        raise FileNotFoundError(errno.ENOENT, "no such file")


def test_the_plain_executor_takes_one_micro_batch(tiny_model: Path) -> None:
    model = load_model(tiny_model, precision="fp32", device=CPU)
    optimizer = Lomo(model.parameters())
    executor = PlainExecutor(model, optimizer, Meter(model, optimizer, CPU))
    with pytest.raises(ValueError, match="exactly one"):
        executor.run([])


@pytest.mark.parametrize(
    ("clip", "cls"), [(ClipConfig(mode="none"), Lomo), (ClipConfig(mode="value", threshold=0.1), AdaLomo)]
)
def test_the_optimizer_of_a_configuration(
    make_config: MakeConfig, tiny_model: Path, clip: ClipConfig, cls: type
) -> None:
    model = load_model(tiny_model, precision="bf16", device=CPU)
    rule = OptimizerConfig(name="lomo" if cls is Lomo else "adalomo", weight_decay=0.5, clip=clip)
    optimizer = build_optimizer(make_config(optimizer=rule, seed=3), model, way=None)
    assert isinstance(optimizer, FusedOptimizer) and type(optimizer) is cls
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert (optimizer._clip_mode, optimizer._rounding, optimizer._seed) == (clip.mode, "stochastic", 3)


def test_training_data_that_is_wrong(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    write_jsonl(tmp_path / "train.jsonl", [{"messages": []}])
    with pytest.raises(DataError, match="line 1") as caught:
        run_here(config)
    assert caught.value.param == "training_file"


def test_validation_data_that_is_wrong(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(validation="valid.jsonl")
    write_jsonl(tmp_path / "valid.jsonl", [{"messages": []}])
    with pytest.raises(DataError) as caught:
        run_here(config)
    assert caught.value.param == "validation_file"


def test_rows_longer_than_the_model(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        data=DataConfig(train_path=str(tmp_path / "train.jsonl"), max_seq_length=1000),
    )
    write_jsonl(tmp_path / "train.jsonl", [chat("word " * 800, "x")])
    with pytest.raises(ConfigError, match="the model takes 512") as caught:
        run_here(config)
    assert caught.value.param == "max_seq_length"


def test_cut_rows_are_counted(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(data=DataConfig(train_path=str(tmp_path / "train.jsonl"), max_seq_length=16), max_steps=1)
    run_here(config)
    (started,) = events_of(config.run_dir, Started)
    assert started.num_truncated_rows == 12


def test_a_tokenizer_of_another_model(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    rewrite_json(folder / "config.json", vocab_size=512)
    other = load_model(folder, precision="fp32", device=CPU)
    other.resize_token_embeddings(300)
    other.save_pretrained(folder)
    with pytest.raises(ConfigError, match="do not belong together"):
        run_here(dataclasses.replace(make_config(), model_path=str(folder)))


def test_a_model_that_is_missing(make_config: MakeConfig) -> None:
    with pytest.raises(ModelError, match="no model folder 'none'"):
        run_here(dataclasses.replace(make_config(), model_path="/none"))


def test_a_batch_moves_to_its_device(make_config: MakeConfig) -> None:
    config = make_config()
    trainer = Trainer(config, Journal(config.run_dir), StopRequest())
    batch = trainer._data.batch(0).to(torch.device("meta"))
    assert batch.labels.device.type == batch.position_ids.device.type == "meta"
    trainer._journal.close()


@pytest.mark.parametrize("checkpointing", [True, False])
def test_two_passes_through_a_model_equal_clip_grad_norm(
    make_config: MakeConfig, tiny_model: Path, checkpointing: bool
) -> None:
    clip = ClipConfig(mode="norm", threshold=0.5)
    config = make_config(
        optimizer=OptimizerConfig(learning_rate=0.05, clip=clip),
        schedule=ScheduleConfig(name="constant", warmup_ratio=0.0),
        activation_checkpointing=checkpointing,
        max_steps=3,
    )
    trainer = Trainer(config, Journal(config.run_dir), StopRequest())
    model = load_model(tiny_model, precision="fp32", device=CPU)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, foreach=False)
    for step in range(3):
        batch_loss(model, trainer._data.batch(step)).loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        sgd.step()
        sgd.zero_grad()
        trainer._train_step()
        assert events_of(config.run_dir, Step)[-1].grad_norm == pytest.approx(norm, rel=1e-5)
    trainer._journal.close()
    for a, b in zip(trainer._training.model.parameters(), model.parameters(), strict=True):
        # One unit in the last place at 1.0: the two heads sum in another order.
        torch.testing.assert_close(a, b, atol=1.2e-7, rtol=0)


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_model_with_a_head_of_its_own_is_named(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, is_plain: bool
) -> None:
    if not is_plain:
        real = torch.nn.Linear.forward
        # A cap on the logits, as Gemma 2 has: only a model's own forward pass goes through the module.
        monkeypatch.setattr(
            torch.nn.Linear,
            "forward",
            lambda module, x: real(module, x).tanh() if module.out_features == 512 else real(module, x),
        )
    config = make_config(max_steps=1)
    run_here(config)
    said = [event.message for event in events_of(config.run_dir, Message)]
    assert any("logits are made as a whole" in text for text in said) is not is_plain
