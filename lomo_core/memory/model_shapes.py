"""What the memory of a model's training step depends on, as plain numbers: the input of `plan.py`, made by `shapes.py`.

Sizes that grow with the batch are polynomials in batch size B and sequence length T. A part of the model (a block, or
what surrounds the blocks) is described by what it leaves alive for the backward pass and by its moments: the bytes
alive after each of its operations, of which only those that can be the largest for some B and T are kept. Torch-free:
a server plans with it, and keeps it as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

FORMAT = 2
"""Of the JSON; another one is made anew."""


@dataclass(frozen=True, slots=True)
class Polynomial:
    """Bytes as a function of B rows of T tokens: `fixed + columns T + squares T^2 + tokens B T + pairs B T^2`."""

    fixed: int = 0
    columns: int = 0
    squares: int = 0
    tokens: int = 0
    pairs: int = 0

    def at(self, batch: int, seq: int) -> int:
        """Its value."""
        return (
            self.fixed
            + self.columns * seq
            + self.squares * seq * seq
            + self.tokens * batch * seq
            + self.pairs * batch * seq * seq
        )

    def never_exceeds(self, other: Polynomial) -> bool:
        """Whether no B, T >= 0 make it larger than `other` (each coefficient is at most the other's)."""
        return all(getattr(self, field.name) <= getattr(other, field.name) for field in dataclasses.fields(Polynomial))


Moments = tuple[Polynomial, ...]
Rows = Literal["one", "equal", "padded"]


def largest(moments: Moments, batch: int, seq: int) -> int:
    """The most bytes alive at any of the moments; 0 without one."""
    return max((moment.at(batch, seq) for moment in moments), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A part of a model under one dtype, attention and mask. Bytes above what was alive before the part's input;
    the input counts as its own as long as it lives, the output as the next part's input. Gradients of parameters are in
    `backward` as long as they live."""

    saved: Polynomial
    """Alive between the part's forward and backward pass."""
    forward: Moments
    backward: Moments
    """From the first operation to the last: `saved` falls to nothing, the gradient of the input remains."""


@dataclass(frozen=True, slots=True)
class BlockTraces:
    """A block's step, by what becomes of activations and gradients."""

    plain: Trace
    """All activations are kept; a parameter's gradient is dropped once it is complete (a fused update)."""
    plain_keeping: Trace
    """The same, with all gradients kept to the end."""
    checkpointed: Trace
    """Only the block's input is kept, the rest is made again in backward."""
    checkpointed_keeping: Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Under what a model was traced."""

    itemsize: int
    """Bytes of a weight: 4 (fp32) or 2 (bf16, fp16)."""
    attention: str
    """transformers' name of the attention's implementation: `sdpa`, `eager`."""
    rows: Rows
    """One row (operators then take other ways than with several), several of one length, or several that are padded to
    one: attention then needs a mask [B, 1, T, T]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """One variant of a model."""

    variant: Variant
    blocks: tuple[BlockTraces, ...]
    """One per kind of block."""
    arguments: Polynomial
    """What all blocks are called with beside hidden states (masks, positions): alive from before the first block to the
    end of its backward pass."""
    around: Trace
    """What comes before and after the blocks, embedding lookup and head excepted: `arguments`, the last norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockKind:
    """Blocks that are alike: same class, same shapes, same arguments."""

    name: str
    """The class's name."""
    count: int
    num_parameters: int
    """Elements of one block."""
    largest_parameter: int
    """Elements of its largest tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShapes:
    """A causal language model as far as memory goes. Tied weights count once."""

    architecture: str
    """transformers' class of the model."""
    parameters: tuple[tuple[tuple[int, ...], int], ...]
    """(shape, how many parameters have it), in the order of the model."""
    buffers_bytes: int
    vocab_size: int
    hidden_size: int
    is_tied: bool
    """Whether head and embedding share one weight."""
    has_plain_head: bool
    """Whether the logits are nothing but hidden states times the head's weight."""
    is_checkpointable: bool
    max_seq_length: int | None
    kinds: tuple[BlockKind, ...]
    order: tuple[int, ...]
    """The kind of each block, first to last."""
    traces: tuple[Traces, ...]

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(count * math.prod(shape) for shape, count in self.parameters)

    @property
    def largest_parameter(self) -> int:
        """Elements of the largest parameter."""
        return max(math.prod(shape) for shape, _ in self.parameters)

    def find_traces(self, variant: Variant) -> Traces | None:
        """The traces of a variant, where the model was traced under it."""
        return next((traces for traces in self.traces if traces.variant == variant), None)

    def to_json(self) -> str:
        """One line; `from_json` reads it back equal."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is not that, or of another version.
        """
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise ValueError("not the shapes of a model, or those of another version")
        try:
            return cls(
                **{
                    **raw,
                    "parameters": tuple((tuple(shape), count) for shape, count in raw["parameters"]),
                    "kinds": tuple(BlockKind(**kind) for kind in raw["kinds"]),
                    "order": tuple(raw["order"]),
                    "traces": tuple(map(_read_traces, raw["traces"])),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the shapes of a model: {error}") from error


def _read_traces(raw: dict[str, Any]) -> Traces:
    blocks = tuple(
        BlockTraces(**{name: _read_trace(trace) for name, trace in block.items()}) for block in raw["blocks"]
    )
    return Traces(
        variant=Variant(**raw["variant"]),
        blocks=blocks,
        arguments=Polynomial(**raw["arguments"]),
        around=_read_trace(raw["around"]),
    )


def _read_trace(raw: dict[str, Any]) -> Trace:
    return Trace(
        saved=Polynomial(**raw["saved"]),
        forward=tuple(Polynomial(**moment) for moment in raw["forward"]),
        backward=tuple(Polynomial(**moment) for moment in raw["backward"]),
    )
