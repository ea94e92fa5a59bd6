"""What a model's step keeps, read from its configuration alone: against figures computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig

from lomo_core.errors import ModelError
from lomo_core.memory.meter import reset_resident_peak, resident_peak_bytes
from lomo_core.memory.model_shapes import ModelShapes, Polynomial, Variant, largest
from lomo_core.memory.paper import llama
from lomo_core.memory.shapes import read_shapes

pytestmark = pytest.mark.slow

H, INNER, HEADS, LAYERS, VOCAB = 64, 176, 4, 3, 512


def _llama(**changes: Any) -> LlamaConfig:
    sizes = {
        "hidden_size": H,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
    }
    return LlamaConfig(**(sizes | changes))


@pytest.fixture(scope="module")
def shapes() -> ModelShapes:
    return read_shapes(_llama(tie_word_embeddings=True))


def test_parameters_are_counted_once(shapes: ModelShapes) -> None:
    block = 4 * H * H + 3 * H * INNER + 2 * H
    assert shapes.num_parameters == VOCAB * H + LAYERS * block + H
    assert shapes.is_tied and shapes.has_plain_head and shapes.is_checkpointable
    assert shapes.order == (0,) * LAYERS
    assert [(kind.name, kind.count, kind.num_parameters) for kind in shapes.kinds] == [
        ("LlamaDecoderLayer", LAYERS, block)
    ]
    assert shapes.largest_parameter == VOCAB * H
    untied = read_shapes(_llama(tie_word_embeddings=False))
    assert untied.num_parameters == shapes.num_parameters + VOCAB * H


@pytest.mark.parametrize(("itemsize", "rows"), [(2, "one"), (2, "equal"), (4, "one"), (4, "equal")])
def test_a_llama_block_keeps_what_its_formulas_need(shapes: ModelShapes, itemsize: int, rows: Any) -> None:
    # Per token. RMSNorm, twice: its input in fp32 (of which a fp32 model has no second copy, but its result of the
    # product instead), 1 / RMS, the normalised value before and after the weight.
    s = itemsize
    norm = 4 * H + 4 + s * H + s * H if s == 2 else 4 + 2 * s * H
    # Rotated queries and keys, values, attention's output, its log-sum-exp per head.
    attention = 4 * s * H + 4 * HEADS
    # Gate, silu(gate), the other branch, their product.
    mlp = 4 * s * INNER
    traces = shapes.find_traces(Variant(itemsize=s, attention="sdpa", rows=rows))
    assert traces is not None
    saved = traces.blocks[0].plain.saved
    per_token = saved.columns if rows == "one" else saved.tokens
    if s == 2:
        # Neither the block's input nor the residual: the norms keep their fp32 copies.
        assert per_token == 2 * norm + attention + mlp
    else:
        # The first norm's input is the block's own, the second's is the residual.
        assert per_token == 2 * norm + attention + mlp + 2 * s * H
    assert saved.squares == saved.pairs == 0
    again = traces.blocks[0].checkpointed.saved
    assert (again.columns if rows == "one" else again.tokens) == s * H  # the input


def test_padding_costs_a_mask_and_eager_attention_the_scores() -> None:
    shapes = read_shapes(_llama(), with_eager=True)

    def saved(attention: str, rows: Any) -> Polynomial:
        traces = shapes.find_traces(Variant(itemsize=2, attention=attention, rows=rows))
        assert traces is not None
        return traces.blocks[0].plain.saved

    # The mask as numbers, for each block anew; for eager attention softmax in fp32 and once more in bf16.
    assert saved("sdpa", "padded").pairs == 2
    assert saved("eager", "equal").pairs == HEADS * (4 + 2)


def test_gradients_that_are_kept_add_up_to_the_blocks_own(shapes: ModelShapes) -> None:
    traces = shapes.find_traces(Variant(itemsize=4, attention="sdpa", rows="one"))
    assert traces is not None
    block = traces.blocks[0]
    more = max(moment.fixed for moment in block.plain_keeping.backward)
    num_bytes = 4 * shapes.kinds[0].num_parameters
    assert abs(more - num_bytes) < 64  # the part's scalar root beside it
    assert largest(block.plain_keeping.backward, 1, 128) > largest(block.plain.backward, 1, 128)


def test_json_reads_back_equal(shapes: ModelShapes) -> None:
    assert ModelShapes.from_json(shapes.to_json()) == shapes
    for text in ("[]", '{"format": 0}', '{"format": 1}'):
        with pytest.raises(ValueError, match="shapes"):
            ModelShapes.from_json(text)


def test_the_papers_llama_is_read_as_it_is_kept() -> None:
    config = LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    assert read_shapes(config) == llama("13B")


def test_other_architectures_are_found_without_their_names() -> None:
    gpt2 = read_shapes(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=512, n_positions=1024))
    assert [(kind.name, kind.count) for kind in gpt2.kinds] == [("GPT2Block", 2)]
    gemma = read_shapes(
        Gemma2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=512,
        )
    )
    assert not gemma.has_plain_head  # it caps its logits


def test_no_tensor_of_the_models_size_is_made() -> None:
    assert reset_resident_peak()
    before = resident_peak_bytes()
    shapes = read_shapes(_llama(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, vocab_size=128256))
    assert shapes.num_parameters * 2 > 8 * 2**30
    assert resident_peak_bytes() - before < 256 * 2**20


def test_a_model_whose_work_depends_on_its_data_is_refused_with_a_reason() -> None:
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        num_local_experts=4,
    )
    with pytest.raises(ModelError, match="memory cannot be foreseen"):
        read_shapes(config)
