"""Bytes that a training step takes, by category and phase, before it runs: arithmetic over a model's shapes.

Notation: N parameters of s bytes (4, or 2 in 16 bits), B rows of T tokens, H hidden size, V vocabulary, L blocks,
X = B T H s, a block's input. Activations of blocks come from traces (`model_shapes.py`); everything else is a formula
with its derivation beside it. What counts is memory asked for: libraries, an allocator's rounding and scratch
inside of operators come on top. Torch-free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lomo_core.config import BASELINES, OptimizerName, Precision, Rounding
from lomo_core.memory.model_shapes import BlockTraces, ModelShapes, Rows, Trace, Variant, largest

Norm = Literal["one_pass", "second_backward", "spill_memory", "spill_file"]
"""How the clipping gets its norm; `one_pass` where it needs none before the first update."""
Head = Literal["vocabulary_blocks", "logits", "transformers"]
"""`vocabulary_blocks` (vocabulary_head.py); `logits`: of the trained tokens, as a whole, in the weights' dtype
(head.py); `transformers`: the model's own loss, with a copy of the logits in fp32 or what its softmax keeps."""
Offload = Literal["none", "weights"]
PhaseName = Literal["forward", "loss", "backward", "embedding", "update"]

ITEMSIZE: dict[Precision, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
_FP32 = 4
_INT64 = 8
# optim/rounding.py: BLOCK elements of fp32 scratch per buffer; the pool of noise is 16 permutations of 2^16 int32 and
# one more block.
_BLOCK_BYTES = (1 << 18) * _FP32
_NOISE_BYTES = 16 * (1 << 16) * _FP32 + _BLOCK_BYTES
# vocabulary_head.py: elements of a block of logits and of its gradient, and the fewest rows.
_LOGITS_ELEMENTS, _GRADIENT_ELEMENTS, _LEAST_ROWS = 1 << 20, 1 << 21, 256
# head.py: rows of logits taken to fp32 at once.
_CHUNK_ROWS = 128
# optim/spill.py: elements read back at once.
_SPILL_PIECE = 1 << 22
_GATHERED_BLOCKS = 2
"""Blocks that are whole at once where weights are sharded or on the host: the one at work and the one after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What of a run decides its memory."""

    optimizer: OptimizerName = "lomo"
    precision: Precision = "bf16"
    batch_size: int = 1
    seq_length: int = 512
    """Tokens of the longest row."""
    activation_checkpointing: bool = True
    attention: str | None = None
    """transformers' name; None: the one that the model chooses."""
    is_padded: bool = True
    """Whether rows of a batch differ in length."""
    masks_one_row: bool = False
    """Whether a batch of one row needs a mask too: it is padded to a width, or several rows are packed in it."""
    trained_share: float = 1.0
    """Of the tokens: those with a loss reach the head, others do not."""
    norm: Norm = "one_pass"
    rounding: Rounding = "stochastic"
    head: Head = "vocabulary_blocks"
    fp32_master: bool = False
    """Weights in 16 bits, with a copy of them and the moments in fp32 (mixed precision as in arXiv 1710.03740): what
    the baselines of the papers do, not of this engine."""
    num_ranks: int = 1
    """Devices that share weights and optimizer state."""
    offload: Offload = "none"
    """`weights`: in host memory, except for the blocks at work."""

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return ITEMSIZE[self.precision]

    @property
    def rows(self) -> Rows:
        """Under which of a model's masks its rows come."""
        if self.batch_size == 1:
            return "padded" if self.masks_one_row else "one"
        return "padded" if self.is_padded else "equal"

    @property
    def is_fused(self) -> bool:
        """Whether a gradient is used and dropped as soon as it is complete."""
        return self.optimizer not in BASELINES


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The largest moment of a part of the step; bytes beside parameters, optimizer state and buffers."""

    name: PhaseName
    activations_bytes: int = 0
    gradients_bytes: int = 0
    transient_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All three."""
        return self.activations_bytes + self.gradients_bytes + self.transient_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A step's memory on one device.

    `gradients_bytes`, `activations_bytes` and `transient_bytes` are each one's own largest value, as the meter measures
    them; they need not coincide, so that `peak_bytes` can be less than the sum. `phases` tells what coincides.
    """

    parameters_bytes: int
    gradients_bytes: int
    """The most that is alive at once."""
    optimizer_bytes: int
    activations_bytes: int
    """What the forward pass leaves for the backward pass, loss included."""
    transient_bytes: int
    """Scratch of the update, and what operations of the largest phase make for themselves."""
    buffers_bytes: int
    peak_bytes: int
    peak_phase: PhaseName
    phases: tuple[Phase, ...]
    host_bytes: int = 0
    """In host memory: weights or gradients put aside there."""


def plan(shapes: ModelShapes, setting: Setting) -> Plan:
    """The memory of one training step.

    Raises:
        ValueError: the model was not traced with the setting's attention.
    """
    return _Planner(shapes, setting).plan()


class _Planner:
    """One plan in the making."""

    def __init__(self, shapes: ModelShapes, setting: Setting) -> None:
        self._shapes = shapes
        self._setting = setting
        self._size = (setting.batch_size, setting.seq_length)
        self._itemsize = setting.itemsize
        self._tokens = setting.batch_size * setting.seq_length
        self._trained = max(1, round(self._tokens * setting.trained_share))
        self._hidden_bytes = self._tokens * shapes.hidden_size * self._itemsize
        attention = setting.attention or shapes.traces[0].variant.attention
        variant = Variant(itemsize=self._itemsize, attention=attention, rows=setting.rows)
        traces = shapes.find_traces(variant)
        if traces is None:
            raise ValueError(f"{shapes.architecture} was not traced with {attention} attention")
        self._traces = traces
        self._checkpoints = setting.activation_checkpointing and shapes.is_checkpointable
        self._blocks = [self._trace(traces.blocks[kind]) for kind in shapes.order]
        self._saved = [block.saved.at(*self._size) for block in self._blocks]
        self._arguments = traces.arguments.at(*self._size)
        # Token ids, labels, positions and mask of the batch are the data's, not the step's, but the embedding keeps the
        # ids. Its output X is the first block's input.
        self._before_blocks = _INT64 * self._tokens + self._arguments
        self._is_in_blocks = setting.head == "vocabulary_blocks" and shapes.has_plain_head
        self._is_in_rows = self._is_in_blocks and setting.optimizer == "lomo"

    def plan(self) -> Plan:
        """All phases put together."""
        shapes, setting = self._shapes, self._setting
        phases = tuple(
            phase for phase in (self._forward(), self._loss(), self._backward(), self._embedding(), self._update())
        )
        peak = max(phases, key=lambda phase: phase.bytes)
        parameters, gathered = self._parameters_bytes()
        optimizer = optimizer_bytes(shapes, setting) // setting.num_ranks
        buffers = shapes.buffers_bytes + self._workspace_bytes()
        return Plan(
            parameters_bytes=parameters + gathered,
            gradients_bytes=max(phase.gradients_bytes for phase in phases),
            optimizer_bytes=optimizer,
            activations_bytes=self._after_forward() + self._head_saved_bytes(),
            transient_bytes=max(phase.transient_bytes for phase in phases),
            buffers_bytes=buffers,
            peak_bytes=parameters + gathered + optimizer + buffers + peak.bytes,
            peak_phase=peak.name,
            phases=phases,
            host_bytes=self._host_bytes(),
        )

    # -- what stays -----------------------------------------------------------------------------------------------

    def _parameters_bytes(self) -> tuple[int, int]:
        """(what stays on the device, what is there for a while beside it)."""
        shapes, setting = self._shapes, self._setting
        whole = shapes.num_parameters * self._itemsize
        if setting.num_ranks == 1 and setting.offload == "none":
            return whole, 0
        blocks = sum(kind.count * kind.num_parameters for kind in shapes.kinds) * self._itemsize
        around = whole - blocks
        block = max(kind.num_parameters for kind in shapes.kinds) * self._itemsize
        if setting.offload == "weights":
            return around, _GATHERED_BLOCKS * block
        # Sharded in equal parts; embedding and head are whole while they work, and no block is then.
        return -(-whole // setting.num_ranks), max(_GATHERED_BLOCKS * block, around)

    def _host_bytes(self) -> int:
        setting = self._setting
        whole = self._shapes.num_parameters * self._itemsize
        weights = whole if setting.offload == "weights" else 0
        return weights + (whole if setting.norm == "spill_memory" else 0)

    def _workspace_bytes(self) -> int:
        """Scratch of the update, which stays from the first step on (optim/rounding.py, Workspace)."""
        setting = self._setting
        if not setting.is_fused:
            return 0
        is_16_bit = self._itemsize == 2
        num_buffers = 2 * is_16_bit or 1
        num_buffers += setting.optimizer == "adalomo"
        return num_buffers * _BLOCK_BYTES + (_NOISE_BYTES if setting.rounding == "stochastic" and is_16_bit else 0)

    # -- what comes and goes --------------------------------------------------------------------------------------

    def _trace(self, block: BlockTraces) -> Trace:
        if self._checkpoints:
            return block.checkpointed if self._setting.is_fused else block.checkpointed_keeping
        return block.plain if self._setting.is_fused else block.plain_keeping

    def _after_forward(self) -> int:
        """Alive after the last norm: what the blocks and what surrounds them have kept."""
        return self._before_blocks - self._arguments + self._traces.around.saved.at(*self._size) + sum(self._saved)

    def _forward(self) -> Phase:
        before, most = self._before_blocks, 0
        for trace, saved in zip(self._blocks, self._saved, strict=True):
            most = max(most, before + largest(trace.forward, *self._size))
            before += saved
        around = before - self._arguments + largest(self._traces.around.forward, *self._size)
        return Phase(name="forward", activations_bytes=max(most, around))

    def _loss(self) -> Phase:
        """The head, forward and backward: both work on the same blocks, backward with more beside them."""
        kept = self._after_forward() + self._head_saved_bytes()
        return Phase(
            name="loss",
            activations_bytes=kept,
            gradients_bytes=self._waiting_gradient_bytes() + self._head_gradient_bytes(),
            transient_bytes=self._head_transient_bytes(),
        )

    def _backward(self) -> Phase:
        """The block whose backward pass has the most beside what the blocks before it have kept."""
        setting, size = self._setting, self._size
        retained = self._retained_bytes()
        waiting = self._waiting_gradient_bytes()
        before, best = self._before_blocks, Phase(name="backward")
        done = self._gradients_around_bytes() + sum(self._block_gradients())
        for kind, trace, saved, gradients in zip(
            self._shapes.order, self._blocks, self._saved, self._block_gradients(), strict=True
        ):
            # Gradients of the blocks after this one, where they are kept; its own are in its trace.
            done -= gradients
            kept = max(before, retained - saved) if retained else before
            moment = kept + largest(trace.backward, *size)
            own = self._shapes.kinds[kind].largest_parameter * self._itemsize if setting.is_fused else gradients
            phase = Phase(name="backward", activations_bytes=moment - own, gradients_bytes=waiting + done + own)
            best = max(best, phase, key=lambda phase: phase.bytes)
            before += saved
        return best

    def _embedding(self) -> Phase:
        """The gradient of the embedding's output X turns into the embedding's own."""
        shapes, setting = self._shapes, self._setting
        kept = self._before_blocks + self._hidden_bytes
        if self._is_in_rows and shapes.is_tied:
            # index_add of the gradient as fp32, then the sum in the weights' dtype.
            held = self._waiting_gradient_bytes()
            return Phase(
                name="embedding",
                activations_bytes=kept,
                gradients_bytes=held,
                transient_bytes=max(self._tokens * shapes.hidden_size * _FP32, held * self._itemsize // _FP32),
            )
        if self._is_in_blocks and shapes.is_tied:
            dense = self._waiting_gradient_bytes()
        else:
            # torch's embedding_dense_backward fills a whole [V, H]; tied, autograd adds it to the head's out of place.
            matrix = shapes.vocab_size * shapes.hidden_size * self._itemsize
            dense = matrix * (3 if shapes.is_tied else 1)
        others = 0 if setting.is_fused else shapes.num_parameters * self._itemsize - self._embedding_bytes()
        return Phase(name="embedding", activations_bytes=kept, gradients_bytes=dense + others)

    def _update(self) -> Phase:
        """After the backward pass: torch's optimizers, or gradients read back from where they were put aside."""
        shapes, setting = self._shapes, self._setting
        biggest = shapes.largest_parameter
        if setting.is_fused:
            if setting.norm not in ("spill_memory", "spill_file"):
                return Phase(name="update")
            elements = min(biggest, _SPILL_PIECE) if setting.optimizer == "lomo" else biggest
            return Phase(name="update", gradients_bytes=elements * self._itemsize)
        gradients = shapes.num_parameters * self._itemsize // setting.num_ranks
        # torch.optim.AdamW, one tensor at a time: the root of the second moment, and its quotient.
        state_itemsize = _FP32 if setting.fp32_master else self._itemsize
        transient = 2 * biggest * state_itemsize // setting.num_ranks if setting.optimizer == "adamw" else 0
        return Phase(name="update", gradients_bytes=gradients, transient_bytes=transient)

    def _retained_bytes(self) -> int:
        """What a first backward pass leaves as it is, because a second one walks the same graph; 0 without one.

        The baselines never need one: their gradients are all there.
        """
        is_walked_twice = self._setting.is_fused and self._setting.norm == "second_backward"
        return self._after_forward() + self._head_saved_bytes() if is_walked_twice else 0

    # -- gradients ------------------------------------------------------------------------------------------------

    def _block_gradients(self) -> list[int]:
        """Of each block, where they are kept until the end of the backward pass."""
        if self._setting.is_fused:
            return [0] * len(self._blocks)
        kinds = self._shapes.kinds
        return [kinds[kind].num_parameters * self._itemsize for kind in self._shapes.order]

    def _embedding_bytes(self) -> int:
        return self._shapes.vocab_size * self._shapes.hidden_size * self._itemsize

    def _gradients_around_bytes(self) -> int:
        """Head's and last norm's, where they are kept; the embedding's comes last."""
        if self._setting.is_fused:
            return 0
        blocks = sum(kind.count * kind.num_parameters for kind in self._shapes.kinds)
        rest = (self._shapes.num_parameters - blocks) * self._itemsize - self._embedding_bytes()
        # A tied weight's is in `_waiting_gradient_bytes`.
        return max(0, rest)

    def _waiting_gradient_bytes(self) -> int:
        """Of a tied weight: its head's part waits for the embedding's, at the very end of the backward pass."""
        shapes = self._shapes
        if not shapes.is_tied:
            return 0
        if self._is_in_rows:
            # Only rows that the batch looks up wait, in fp32.
            return min(self._tokens, shapes.vocab_size) * shapes.hidden_size * _FP32
        return self._embedding_bytes()

    def _head_gradient_bytes(self) -> int:
        shapes = self._shapes
        if self._is_in_rows:
            return self._block_rows() * shapes.hidden_size * self._itemsize
        return 0 if shapes.is_tied else self._embedding_bytes()

    # -- head -----------------------------------------------------------------------------------------------------

    def _block_rows(self) -> int:
        """Rows of the head's weight at once (vocabulary_head.py)."""
        shapes = self._shapes
        rows = max(_LEAST_ROWS, min(_LOGITS_ELEMENTS // self._trained, _GRADIENT_ELEMENTS // shapes.hidden_size))
        return min(rows, shapes.vocab_size)

    def _head_saved_bytes(self) -> int:
        """Kept between the head's forward and backward pass; of the hidden states those of the trained tokens."""
        shapes = self._shapes
        picked = self._trained * shapes.hidden_size * self._itemsize
        if self._is_in_blocks:
            # The trained tokens' hidden states, targets and log-sum-exp.
            return picked + self._trained * (_INT64 + _FP32)
        copies = self._itemsize + (_FP32 if self._setting.head == "transformers" else 0)
        return picked + self._trained * (shapes.vocab_size * copies + _INT64 + _FP32)

    def _head_transient_bytes(self) -> int:
        shapes, itemsize = self._shapes, self._itemsize
        trained, hidden = self._trained, shapes.hidden_size
        if self._is_in_blocks:
            # A block's logits in the weights' dtype and in fp32; the fp32 gradient of the hidden states, and one
            # block's part of it.
            logits = trained * self._block_rows() * (_FP32 + (itemsize if itemsize != _FP32 else 0))
            return logits + trained * hidden * (_FP32 + itemsize)
        # The gradient of the logits, and a chunk of them in fp32, twice.
        return trained * shapes.vocab_size * itemsize + 2 * min(_CHUNK_ROWS, trained) * shapes.vocab_size * _FP32


def optimizer_bytes(shapes: ModelShapes, setting: Setting) -> int:
    """Bytes of the optimizer's state, before it is shared by ranks.

    LOMO and SGD without momentum have none. AdaLomo keeps, in fp32, a row and a column of means for a matrix [.., m, n]
    (m + n numbers per matrix of the leading dimensions) and a full moment for a vector. AdamW keeps two moments in the
    weights' dtype. With an fp32 master copy: 4 bytes more per parameter, and the moments in fp32 too.
    """
    if setting.optimizer == "adalomo":
        return sum(count * _factored(shape) for shape, count in shapes.parameters) * _FP32
    num_moments = 2 if setting.optimizer == "adamw" else 0
    master = setting.fp32_master and not setting.is_fused
    per_parameter = (1 + num_moments) * _FP32 if master else num_moments * setting.itemsize
    return shapes.num_parameters * per_parameter


def _factored(shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    if len(shape) < 2 or count == 0:
        return count
    return count // shape[-1] + count // shape[-2]
