"""Sampled steps of the meter: what autograd keeps, against figures computed by hand and against the heap's growth."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lomo_core.config import ClipConfig, OptimizerConfig
from lomo_core.data.batches import Batch, positions
from lomo_core.events import Finished, MemoryProfile, Step
from lomo_core.execute.plain import PlainExecutor
from lomo_core.memory import meter as meters
from lomo_core.memory.allocator import find_live_heap_bytes
from lomo_core.memory.meter import METER_EVERY_STEPS, Meter
from lomo_core.memory.saved import SavedTensors
from lomo_core.model import enable_activation_checkpointing
from lomo_core.optim import Lomo
from tests.support.engine_runs import MakeConfig, events_of, read_events, rewrite_json, run_here
from tests.support.tiny_model import make_tiny_model

CPU = torch.device("cpu")
H, INNER, HEADS, LAYERS, VOCAB = 64, 176, 4, 3, 512
B, T = 4, 128
TOKENS = B * T
TRAINED = TOKENS - B
FP32, INT64 = 4, 8
X = TOKENS * H * FP32  # hidden states
needs_glibc = pytest.mark.skipif(find_live_heap_bytes() is None, reason="the C library is not glibc 2.33 or later")

# Token ids, for the embedding. Cosine and sine of a head's width.
LOOKUP = INT64 * TOKENS
ROTATION = 2 * FP32 * TOKENS * H // HEADS
# The last norm: its input, which is the last block's output, 1 / RMS, the normalised value before the weight. Then the
# trained tokens' places, hidden states, targets and log-sum-exp.
AFTER_BLOCKS = 2 * X + FP32 * TOKENS + TRAINED * (INT64 + FP32 * H + INT64 + FP32)
# Two norms: 1 / RMS, the value before and after the weight. Rotated queries and keys, values, attention's output and
# its log-sum-exp per head. Gate, silu(gate), the other branch, their product. Block's input and residual.
BLOCK = 2 * (2 * X + FP32 * TOKENS) + 4 * X + FP32 * HEADS * TOKENS + 4 * FP32 * INNER * TOKENS + 2 * X


def make_llama(*, checkpointing: bool) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=H,
            intermediate_size=INNER,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            num_hidden_layers=LAYERS,
            vocab_size=VOCAB,
            tie_word_embeddings=False,
        )
    )
    if checkpointing:
        enable_activation_checkpointing(model)
    return model.train()


def make_batch(*, padding: int = 0) -> Batch:
    ids = torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return Batch(ids, mask, positions(mask), ids.clone(), num_tokens=TOKENS, num_trained=TRAINED)


def make_training(*, checkpointing: bool) -> tuple[Any, PlainExecutor, Meter]:
    model = make_llama(checkpointing=checkpointing)
    optimizer = Lomo(model.parameters())
    meter = Meter(model, optimizer, CPU)
    return model, PlainExecutor(model, optimizer, meter), meter


def saved_bytes(*, checkpointing: bool, padding: int = 0) -> int:
    model, executor, _ = make_training(checkpointing=checkpointing)
    saved = SavedTensors(model)
    with saved.counting():
        executor.loss_of(make_batch(padding=padding))
    return saved.num_bytes


def test_a_plain_llama_saves_what_its_formulas_need() -> None:
    assert saved_bytes(checkpointing=False) == LOOKUP + ROTATION + LAYERS * BLOCK + AFTER_BLOCKS
    # Padding: each block keeps the mask as numbers.
    padded = saved_bytes(checkpointing=False, padding=9)
    assert padded == LOOKUP + ROTATION + LAYERS * (BLOCK + B * T * T * FP32) + AFTER_BLOCKS


def test_a_checkpointed_llama_saves_its_blocks_inputs_and_arguments() -> None:
    arguments = ROTATION + INT64 * TOKENS  # positions
    assert saved_bytes(checkpointing=True) == LOOKUP + arguments + LAYERS * X + AFTER_BLOCKS
    # Padding: one mask of booleans, which all blocks are called with.
    arguments += B * T * T
    assert saved_bytes(checkpointing=True, padding=9) == LOOKUP + arguments + LAYERS * X + AFTER_BLOCKS


@needs_glibc
@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_is_saved_is_what_the_heap_grows_by(*, checkpointing: bool) -> None:
    _, executor, meter = make_training(checkpointing=checkpointing)
    batch = make_batch()
    for _ in range(2):
        meter.begin_step()
        executor.run([batch])
        meter.end_step()
    meter._num_steps = 0
    meter.begin_step()
    executor.run([batch])
    meter.end_step()
    profile = meter.find_profile(step=1)
    assert profile is not None
    # Of the batch, which is older than the step.
    data = INT64 * TOKENS * (1 + checkpointing)
    # The graph's own nodes, about 43 kB a block, whatever the batch.
    nodes = profile.after_forward_bytes - (profile.saved_bytes - data)
    assert 0 < nodes < 60_000 * (LAYERS + 1)
    assert -16_384 < profile.after_backward_bytes < 60_000 * (LAYERS + 1)
    assert abs(profile.after_step_bytes) < 16_384


@needs_glibc
def test_a_graph_that_was_counted_ends_with_its_last_reference() -> None:
    """Python's collector stays off: a graph that holds itself would be alive afterwards."""
    layer = torch.nn.Linear(1024, 1024)
    source = torch.ones(1024, 1024)
    saved = SavedTensors(layer)
    live = meters.live_bytes_function(CPU)
    layer(source).exp().sum().backward()
    before = live()
    gc.disable()
    try:
        with saved.counting():
            output = layer(source).exp()
        assert saved.num_bytes == 2 * 4 * 1024 * 1024  # the input, and exp's own result
        assert live() - before > 4_000_000
        del output
        assert abs(live() - before) < 100_000
    finally:
        gc.enable()


def test_each_storage_counts_once_and_the_models_own_not_at_all() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(10))
            self.register_buffer("scale", torch.ones(10))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.weight * self.scale
            return y * y + y[5:].sum() * y

    model, source = Twice(), torch.ones(10)
    saved = SavedTensors(model)
    for _ in range(2):  # a second count begins anew
        with saved.counting():
            loss = model(source).sum()
        # x, y (also where a view of it is saved) and the sum.
        assert saved.num_bytes == 40 + 40 + 4
    loss.backward()
    assert model.weight.grad is not None


def test_hooks_are_gone_after_the_count() -> None:
    model, executor, _ = make_training(checkpointing=True)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    saved = SavedTensors(model)
    with pytest.raises(RuntimeError, match="broke off"), saved.counting():
        raise RuntimeError("broke off")
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    executor.loss_of(make_batch())
    assert saved.num_bytes == 0


@needs_glibc
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("name", "mode", "exact"),
    [
        ("lomo", "norm", "second_backward"),
        ("lomo", "norm", "spill_memory"),
        ("adalomo", "group", "auto"),
        ("adamw", "norm", "auto"),
    ],
)
def test_sampling_changes_no_bit(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    name: Any,
    mode: Any,
    exact: Any,
    checkpointing: bool,
) -> None:
    model = make_tiny_model(tmp_path / "dropout")
    rewrite_json(model / "config.json", attention_dropout=0.3)
    rule = OptimizerConfig(name=name, learning_rate=0.001, clip=ClipConfig(mode=mode, exact=exact))
    found = {}
    for is_sampled in (True, False):
        monkeypatch.setattr(meters, "METER_EVERY_STEPS", 1)
        if not is_sampled:
            monkeypatch.setattr(meters, "find_live_heap_bytes", lambda: None)
        config = make_config(
            run=f"run-{is_sampled}",
            optimizer=rule,
            precision="bf16",
            max_steps=4,
            checkpoint_every_steps=0,
            activation_checkpointing=checkpointing,
        )
        config = dataclasses.replace(config, model_path=str(model))
        run_here(config)
        assert len(events_of(config.run_dir, MemoryProfile)) == (4 if is_sampled else 0)
        steps = [(event.loss, event.grad_norm) for event in events_of(config.run_dir, Step)]
        found[is_sampled] = (steps, events_of(config.run_dir, Finished)[0].weights_sha256)
    assert found[True] == found[False]


@needs_glibc
def test_an_attempts_first_step_is_sampled_and_then_one_per_interval(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert METER_EVERY_STEPS == 50
    monkeypatch.setattr(meters, "METER_EVERY_STEPS", 3)
    config = make_config(max_steps=5)
    run_here(config)
    events = read_events(config.run_dir)
    profiles = [event for event in events if isinstance(event, MemoryProfile)]
    assert [profile.step for profile in profiles] == [1, 4]
    for profile in profiles:
        step = events[events.index(profile) - 1]
        assert isinstance(step, Step) and step.step == profile.step
        assert profile.after_forward_bytes == step.memory.activations_bytes
        assert 0 < profile.saved_bytes < profile.after_forward_bytes
    # The update's scratch came with the first step and stayed.
    assert profiles[0].after_step_bytes > profiles[0].after_forward_bytes
    assert profiles[1].after_step_bytes < profiles[1].after_forward_bytes
    # Another attempt, from the checkpoint of step 4.
    resumed = dataclasses.replace(config, resume_from=(str(Path(config.run_dir) / "checkpoints" / "step-4"),))
    resumed = dataclasses.replace(resumed, max_steps=5)
    run_here(resumed)
    assert [profile.step for profile in events_of(config.run_dir, MemoryProfile)] == [1, 4, 5]


@needs_glibc
def test_torchs_optimizers_leave_their_gradients_to_the_end_of_the_step(make_config: MakeConfig) -> None:
    config = make_config(optimizer=OptimizerConfig(name="adamw", learning_rate=1e-4), max_steps=1)
    run_here(config)
    (profile,) = events_of(config.run_dir, MemoryProfile)
    (step,) = events_of(config.run_dir, Step)
    size = step.memory.parameters_bytes
    assert profile.after_backward_bytes > size
    # The first step leaves two moments per parameter.
    assert profile.after_step_bytes == pytest.approx(2 * size, rel=0.2)
