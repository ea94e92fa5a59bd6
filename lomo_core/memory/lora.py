"""What LoRA would need for the same run, beside a plan: weights that stay frozen, and small matrices that are trained.

LoRA (arXiv 2106.09685) adds B A to a frozen matrix W [m, n], with A [r, n] and B [m, r]. Adapters here are on every
matrix of the blocks, as where LoRA is to reach full fine-tuning (arXiv 2305.14314, section 4: on all linear layers), of
rank 16; embedding, head and tables of positions have none. Torch-free.
"""

from __future__ import annotations

import math
from dataclasses import replace

from lomo_core.memory.model_shapes import ModelShapes
from lomo_core.memory.plan import PhaseName, Plan, Setting, plan

RANK = 16
_FP32 = 4
# PEFT keeps adapters in fp32 (`autocast_adapter_dtype`): weight, gradient and AdamW's two moments.
_BYTES_PER_ELEMENT = 4 * _FP32
_PHASES: tuple[PhaseName, ...] = ("forward", "loss", "backward")


def lora_peak_bytes(shapes: ModelShapes, setting: Setting) -> int:
    """The least that a step of LoRA under AdamW takes on one device, the rest of the setting as it is.

        weights + buffers + 16 P + max over phases (activations + scratch + intermediates)

    - Weights: all of them, frozen, in the run's precision; they have no gradient, hence neither the head's [V, H] nor
      the update's scratch.
    - P = sum of r (m + n) over the adapted matrices, 16 bytes each. Gradients stay from one micro-batch to the next
      where several make up a step; of a single one a quarter of the 16 comes only as the backward pass goes on.
    - Activations and scratch of forward, loss and backward: the run's own. W's input is kept as in full fine-tuning,
      since A's gradient B^T dY x^T needs it as well. Of a block's backward its largest parameter's gradient is taken
      off; no gradient goes further than the first block, and the norm needs one pass, as the gradients are there.
    - Intermediates: A x, r numbers in fp32 per token and matrix, kept for B's gradient; with activation checkpointing
      those of the block at work alone.

    Not counted: PEFT's fp32 copy of each matrix's input, dropout's masks, the adapters' update. Nor what norms keep
    less when their weights are frozen: s H per token and norm. In 16 bits the copies (4 H per token and matrix) are the
    more, so that this is a lower bound; in fp32, where PEFT copies nothing, it is too high by those of the norms.

    Raises:
        ValueError: the model was not traced with the setting's attention.
    """
    own = replace(setting, optimizer="lomo", norm="one_pass", fp32_master=False, num_ranks=1, offload="none")
    found = plan(shapes, own)
    standing = found.parameters_bytes + shapes.buffers_bytes + _BYTES_PER_ELEMENT * adapter_elements(shapes)
    return standing + _moving_bytes(shapes, own, found)


def adapter_elements(shapes: ModelShapes) -> int:
    """Elements of all adapters: r (m + n) per matrix [m, n] of the blocks."""
    return sum(count * RANK * sum(shape) for shape, count in block_matrices(shapes))


def block_matrices(shapes: ModelShapes) -> list[tuple[tuple[int, ...], int]]:
    """(shape, how many) of the blocks' matrices: all that are neither embedding, nor head, nor a table of positions."""
    around = shapes.num_parameters - sum(kind.count * kind.num_parameters for kind in shapes.kinds)
    matrices = [(shape, count) for shape, count in shapes.parameters if len(shape) == 2]
    # Embedding and head have a row per token of the vocabulary.
    of_vocabulary = [(shape, count) for shape, count in matrices if shape[0] == shapes.vocab_size]
    left = around - sum(count * math.prod(shape) for shape, count in of_vocabulary)

    def is_table(shape: tuple[int, ...], count: int) -> bool:
        """At least a row per position (OPT's has two more), once, and among what is not the blocks'."""
        limit = shapes.max_seq_length
        return limit is not None and shape[0] >= limit and count == 1 and math.prod(shape) <= left

    return [(shape, count) for shape, count in matrices if shape[0] != shapes.vocab_size and not is_table(shape, count)]


def _moving_bytes(shapes: ModelShapes, setting: Setting, found: Plan) -> int:
    """The most that forward, loss and backward have beside weights and adapters."""
    num_matrices = sum(count for _, count in block_matrices(shapes))
    kept = dict.fromkeys(_PHASES, num_matrices)
    if setting.activation_checkpointing and shapes.is_checkpointable:
        kept = {"forward": 0, "loss": 0, "backward": num_matrices // len(shapes.order)}
    # Forward and backward are at their largest with the last block at work, where blocks are alike.
    per_matrix = setting.batch_size * setting.seq_length * RANK * _FP32
    return max(
        phase.activations_bytes + phase.transient_bytes + kept[phase.name] * per_matrix
        for phase in found.phases
        if phase.name in kept
    )
