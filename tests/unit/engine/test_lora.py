"""LoRA's memory beside a plan, against figures computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lomo_core.memory.lora import RANK, adapter_elements, block_matrices, lora_peak_bytes
from lomo_core.memory.paper import llama
from lomo_core.memory.plan import Setting, plan
from tests.support.shapes_by_hand import BEFORE_BLOCKS, BLOCK, LAYERS, LOMO, VOCAB, H, X, shapes_by_hand

# Two 8 x 8 matrices a block.
ADAPTERS = LAYERS * 2 * 16 * (H + H)
WEIGHTS = 4 * (2 * VOCAB * H + LAYERS * BLOCK + H)
TOKENS = LOMO.seq_length


def test_the_blocks_matrices_are_those_that_are_neither_the_vocabularys_nor_a_table() -> None:
    shapes = shapes_by_hand()
    assert block_matrices(shapes) == [((H, H), 2 * LAYERS)]
    assert adapter_elements(shapes) == ADAPTERS
    positions = 24
    with_table = replace(
        shapes, parameters=(*shapes.parameters, ((positions, H), 1)), max_seq_length=positions, is_tied=False
    )
    assert block_matrices(with_table) == [((H, H), 2 * LAYERS)]


def test_without_checkpointing_the_loss_has_the_most_beside_the_adapters() -> None:
    shapes = shapes_by_hand()
    phases = {phase.name: phase for phase in plan(shapes, LOMO).phases}
    # What the forward pass leaves: the blocks' own, the trained tokens' hidden states, targets and log-sum-exp.
    kept = BEFORE_BLOCKS + LAYERS * TOKENS * 100 + TOKENS * X + TOKENS * (X + 8 + 4)
    # All of the vocabulary is one block: its logits in fp32, the hidden states' gradient, and a block's part of it.
    scratch = TOKENS * VOCAB * 4 + TOKENS * H * (4 + 4)
    assert phases["loss"].activations_bytes == kept
    assert phases["loss"].transient_bytes == scratch
    intermediates = LAYERS * 2 * TOKENS * RANK * 4
    assert lora_peak_bytes(shapes, LOMO) == WEIGHTS + 16 + 16 * ADAPTERS + kept + scratch + intermediates


def test_with_checkpointing_only_one_blocks_intermediates_are_alive() -> None:
    shapes = shapes_by_hand()
    # 400 tokens of which one has a loss: the backward pass has the most.
    setting = replace(LOMO, seq_length=400, activation_checkpointing=True, trained_share=1 / 400)
    before = 400 * (8 + 5)
    # The first block's input, the last block made again; the norm is not walked twice, whatever LOMO's way was.
    backward = before + 400 * X + 400 * 150 + 2 * 400 * RANK * 4
    expected = WEIGHTS + 16 + 16 * ADAPTERS + backward
    assert lora_peak_bytes(shapes, setting) == expected
    assert lora_peak_bytes(shapes, replace(setting, norm="second_backward", optimizer="adamw")) == expected


@pytest.mark.parametrize("checkpointing", [True, False])
def test_lomo_takes_less_than_lora_on_llama_7b(checkpointing: bool) -> None:
    setting = Setting(batch_size=4, activation_checkpointing=checkpointing, attention="sdpa")
    shapes = llama("7B")
    # q, k, v, o: 4096 x 4096; gate, up, down: 4096 x 11008.
    assert adapter_elements(shapes) == 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert plan(shapes, setting).peak_bytes < lora_peak_bytes(shapes, setting)
