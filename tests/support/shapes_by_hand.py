"""Shapes of a model made by hand, for plans that can be computed by hand."""

from __future__ import annotations

from lomo_core.memory.model_shapes import (
    BlockKind,
    BlockTraces,
    ModelShapes,
    Polynomial,
    Trace,
    Traces,
    Variant,
)
from lomo_core.memory.plan import Setting

H, VOCAB, LAYERS = 8, 1000, 2
BLOCK = 2 * H * H + H
X = H * 4  # bytes of hidden states, per token, in fp32


def _trace(saved: int, backward: int, fixed: int = 0) -> Trace:
    return Trace(
        saved=Polynomial(columns=saved),
        forward=(Polynomial(columns=saved),),
        backward=(Polynomial(fixed=fixed, columns=backward),),
    )


def shapes_by_hand(*, is_tied: bool = False) -> ModelShapes:
    """Two blocks of two 8 x 8 matrices and a vector; a block keeps 100 bytes a token, 150 at its backward's peak, where
    a matrix' gradient is alive."""
    block = BlockTraces(
        _trace(100, 150, 4 * H * H), _trace(100, 150, 4 * BLOCK), _trace(X, 150, 4 * H * H), _trace(X, 150, 4 * BLOCK)
    )
    around = _trace(5 + X, 40)
    variant = Variant(itemsize=4, attention="sdpa", rows="one")
    traces = Traces(variant=variant, blocks=(block,), arguments=Polynomial(columns=5), around=around)
    return ModelShapes(
        architecture="ByHand",
        parameters=(((VOCAB, H), 1 if is_tied else 2), ((H, H), 2 * LAYERS), ((H,), LAYERS + 1)),
        buffers_bytes=16,
        vocab_size=VOCAB,
        hidden_size=H,
        is_tied=is_tied,
        has_plain_head=True,
        is_checkpointable=True,
        max_seq_length=None,
        kinds=(BlockKind(name="Block", count=LAYERS, num_parameters=BLOCK, largest_parameter=H * H),),
        order=(0,) * LAYERS,
        traces=(traces,),
    )


LOMO = Setting(precision="fp32", seq_length=10, activation_checkpointing=False)
# Of the batch: hidden states, int64 ids, and what the blocks are called with.
BEFORE_BLOCKS = 10 * (8 + 5)
