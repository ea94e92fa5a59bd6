"""Packed rows train as they do alone, in every architecture that says so, and others are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lomo_core.config import DataConfig
from lomo_core.data.batches import IGNORE, collate, collate_packed
from lomo_core.data.packing import PackedPlan
from lomo_core.data.packing_check import check_packing
from lomo_core.data.template import EncodedRow
from lomo_core.errors import ConfigError
from lomo_core.events import Checkpoint, Finished, Message, Started, Step
from lomo_core.head import batch_loss
from tests.support.engine_runs import MakeConfig, events_of, run_here

VOCAB_SIZE = 64
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
# Rotary positions, the same with biases, a window shorter than a row, and learned positions.
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**_SHAPE)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**_SHAPE)),
    "mistral": (MistralForCausalLM, MistralConfig(**_SHAPE, sliding_window=6)),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
}


def make_model(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    cls, config = ARCHITECTURES[name]
    torch.manual_seed(0)
    return cls._from_config(copy.deepcopy(config), attn_implementation=attention).to(dtype).eval()


def some_rows(lengths: list[int]) -> list[EncodedRow]:
    generator = np.random.default_rng(0)
    rows = []
    for length in lengths:
        trained = np.ones(length, dtype=np.bool_)
        trained[: 1 + length // 4] = False
        rows.append(EncodedRow(generator.integers(0, VOCAB_SIZE, length).astype(np.int32), trained, is_cut=False))
    return rows


def token_losses(model: Any, batch: Any) -> list[torch.Tensor]:
    """Losses of the trained tokens of each sequence."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits[:, :-1]
    losses = functional.cross_entropy(
        logits.transpose(1, 2), batch.labels[:, 1:], reduction="none", ignore_index=IGNORE
    )
    return [found[labels != IGNORE] for found, labels in zip(losses, batch.labels[:, 1:], strict=True)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_row_has_the_losses_that_it_has_alone(name: str, attention: str) -> None:
    model = make_model(name, attention)
    rows = some_rows([9, 17, 5, 3, 20, 7])
    batch = collate_packed([rows[:4], rows[4:5], rows[5:]], pad_token_id=0)
    with torch.no_grad():
        alone = [token_losses(model, collate([row], pad_token_id=0))[0] for row in rows]
        packed = token_losses(model, batch)
    torch.testing.assert_close(packed[0], torch.cat(alone[:4]), atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[1], alone[4], atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[2], alone[5], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_padded_rows(name: str) -> None:
    model = make_model(name)
    rows = some_rows([9, 17, 5, 3])
    found = batch_loss(model, collate_packed([rows[:2], rows[2:]], pad_token_id=0))
    expected = batch_loss(model, collate(rows, pad_token_id=0))
    assert float(found.loss.detach()) == pytest.approx(float(expected.loss.detach()), abs=1e-5)
    assert int(found.num_correct) == int(expected.num_correct)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(found.loss, parameters), torch.autograd.grad(expected.loss, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_packed_batch() -> None:
    rows = some_rows([3, 5, 2])
    batch = collate_packed([rows[:2], rows[2:]], pad_token_id=7)
    assert batch.input_ids.tolist() == [[*rows[0].ids, *rows[1].ids], [7] * 6 + list(rows[2].ids)]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0] * 6 + [0, 1]]
    assert batch.attention_mask is None and batch.to(torch.device("meta")).attention_mask is None
    # No row's first token is predicted by the row before.
    assert batch.labels[0, [0, 3]].tolist() == [IGNORE, IGNORE] and batch.labels[1, 6] == IGNORE
    assert (batch.num_tokens, batch.num_trained) == (10, sum(row.num_trained for row in rows))
    # Widths stay few: multiples of 8.
    assert collate_packed([rows], pad_token_id=7).input_ids.shape == (1, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_that_keep_rows_apart_pass(name: str, attention: str, dtype: torch.dtype) -> None:
    model = make_model(name, attention, dtype).train()
    check_packing(model)
    assert model.training


class SeesAll(LlamaForCausalLM):
    """Packed rows see each other: the mask is a full one, as in architectures that make their own."""

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **options: Any) -> Any:
        mask = torch.ones_like(input_ids)
        return super().forward(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, **options)


class CountsOn(GPT2LMHeadModel):
    """Packed rows are kept apart, but their positions do not begin anew."""

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **options: Any) -> Any:
        if attention_mask is None:
            segments = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
            is_hidden = (segments[:, None, :, None] != segments[:, None, None, :]) | torch.ones(
                segments.shape[1], segments.shape[1], dtype=torch.bool
            ).triu(1)
            attention_mask = is_hidden.float() * torch.finfo(torch.float32).min
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=None, **options)


def test_architectures_that_do_not_are_refused() -> None:
    torch.manual_seed(0)
    broken = make_model("llama")
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    # Its positions come from the attention mask.
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=VOCAB_SIZE, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    )
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4))
    for model, reason in (
        (SeesAll(ARCHITECTURES["llama"][1]), r"a SeesAll cannot be packed \(a row sees the rows before it\)"),
        (SeesAll(ARCHITECTURES["llama"][1]).bfloat16(), "a row sees the rows before it"),
        (opt, "a row sees the rows before it"),
        (broken, "a row sees the rows before it"),
        (CountsOn(ARCHITECTURES["gpt2"][1]), "not those of the row alone"),
        (bloom, r"a BloomForCausalLM cannot be packed \(it takes no positions\): set packing to false"),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            check_packing(model)
        assert caught.value.param == "packing"


def test_every_row_is_packed_once_and_little_room_is_left() -> None:
    lengths = np.random.default_rng(0).integers(2, 200, 10_000)
    plan = PackedPlan(lengths.astype(np.int32), max_seq_length=256, batch_size=4, seed=3)
    assert plan.batches_per_epoch == -(-plan.num_sequences // 4)
    epochs = [
        [sequence for step in range(first, first + plan.batches_per_epoch) for sequence in plan.sequences_of(step)]
        for first in (0, plan.batches_per_epoch)
    ]
    for sequences in epochs:
        assert sorted(row for sequence in sequences for row in sequence) == list(range(10_000))
        fills = [int(lengths[sequence].sum()) for sequence in sequences]
        assert max(fills) <= 256 and sum(fills) > 0.99 * 256 * len(fills)
    assert epochs[0] != epochs[1]
    assert [row for sequence in plan.sequences_of(5) for row in sequence] == plan.rows_of(5)
    # Asking in any order gives the same: the position in the data is the step number.
    again = PackedPlan(lengths, max_seq_length=256, batch_size=4, seed=3)
    step = plan.batches_per_epoch + 7
    assert again.sequences_of(step) == plan.sequences_of(step)
    other = PackedPlan(lengths, max_seq_length=256, batch_size=4, seed=4)
    assert other.sequences_of(0) != plan.sequences_of(0)


def test_rows_as_long_as_a_sequence_and_a_single_row() -> None:
    assert PackedPlan([8, 8, 8], max_seq_length=8, batch_size=2, seed=0).num_sequences == 3
    assert PackedPlan([2], max_seq_length=8, batch_size=2, seed=0).sequences_of(3) == [[0]]


def test_the_longest_packed_step() -> None:
    lengths = np.random.default_rng(1).integers(2, 30, 60)
    plan = PackedPlan(lengths, max_seq_length=64, batch_size=3, seed=1)

    def cells(step: int) -> int:
        sequences = plan.sequences_of(step)
        return len(sequences) * -(-max(int(lengths[sequence].sum()) for sequence in sequences) // 8) * 8

    for first, total in ((0, 2), (3, 30), (8, 9)):
        assert plan.longest_step(first=first, total_steps=total) == max(range(first, total), key=cells)


def packed_config(make_config: MakeConfig, tmp_path: Path, **fields: Any) -> Any:
    data = DataConfig(train_path=str(tmp_path / "train.jsonl"), packing=True, max_seq_length=96)
    return make_config(data=data, batch_size=1, n_epochs=3, keep_checkpoints=9, **fields)


def test_a_packed_run_goes_on_bit_identically(make_config: MakeConfig, tmp_path: Path) -> None:
    make_config()
    straight = packed_config(make_config, tmp_path, run="straight")
    run_here(straight)
    (started,) = events_of(straight.run_dir, Started)
    assert started.num_train_rows == 12 and started.total_steps < 3 * 12
    assert any("12 rows are packed into" in event.message for event in events_of(straight.run_dir, Message))
    path = next(event.path for event in events_of(straight.run_dir, Checkpoint) if event.step == 4)
    resumed = packed_config(make_config, tmp_path, run="resumed", resume_from=(path,))
    run_here(resumed)
    steps = [event.loss for event in events_of(straight.run_dir, Step)]
    assert [event.loss for event in events_of(resumed.run_dir, Step)] == steps[4:]
    first, second = (events_of(config.run_dir, Finished)[0] for config in (straight, resumed))
    assert first.weights_sha256 == second.weights_sha256
    assert steps[-1] < steps[0]
