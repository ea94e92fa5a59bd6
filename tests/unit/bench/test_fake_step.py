"""A plan against the whole model on tensors without storage, followed by torch's own tracker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from bench.fake_step import track_step
from lomo_core.memory.model_shapes import ModelShapes
from lomo_core.memory.plan import Setting, plan
from lomo_core.memory.shapes import read_shapes

pytestmark = pytest.mark.slow

ARCHITECTURES: dict[str, Any] = {
    "llama": LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=2048,
        tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(n_embd=128, n_layer=4, n_head=4, vocab_size=2048, bos_token_id=0, eos_token_id=1),
}
SETTING = Setting(precision="fp32", batch_size=4, seq_length=256, is_padded=False)


@pytest.fixture(scope="module")
def shapes() -> dict[str, ModelShapes]:
    return {name: read_shapes(config) for name, config in ARCHITECTURES.items()}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"optimizer": "adamw"}])
def test_a_plan_agrees_with_the_whole_model(
    shapes: dict[str, ModelShapes], name: str, changes: dict[str, Any], *, checkpointing: bool
) -> None:
    setting = replace(SETTING, activation_checkpointing=checkpointing, **changes)
    planned, tracked = plan(shapes[name], setting), track_step(ARCHITECTURES[name], setting)
    assert planned.activations_bytes == pytest.approx(tracked.activations_bytes, rel=0.01)
    assert planned.peak_bytes == pytest.approx(tracked.peak_bytes, rel=0.05)


def test_what_needs_data_is_refused() -> None:
    for setting in (replace(SETTING, is_padded=True), replace(SETTING, trained_share=0.5)):
        with pytest.raises(ValueError, match="without data"):
            track_step(ARCHITECTURES["llama"], setting)
