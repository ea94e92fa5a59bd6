"""Runs a part of a model on tensors without storage and notes how many bytes are alive after each operation.

`FakeTensorMode` gives every operation its real output's shape, dtype and device, and takes the real kernel's path
(scaled dot product attention, for one, keeps what its fused CPU kernel keeps). A dispatch mode on top of it counts
storages: once each, from the operation that makes them to the end of their last reference. The same part at several
sizes gives, operation by operation, polynomials in batch and sequence length (`model_shapes.Polynomial`).

Not seen: scratch inside an operation, and what the allocator adds.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lomo_core.memory.model_shapes import Moments, Polynomial, Trace

# (rows, tokens per row): as many as there are coefficients, and one that checks them. Large enough for every kernel to
# take the way that it takes in training, small enough for models of 512 positions. With one row, B T is T.
SIZES_OF_ONE_ROW = ((1, 128), (1, 256), (1, 384), (1, 512))
SIZES_OF_ROWS = ((2, 128), (2, 256), (2, 384), (3, 128), (3, 256), (4, 512))
# Of the check: an operation may pad or align.
_TOLERANCE = 0.002
_NEGLIGIBLE_BYTES = 1 << 20


class TraceError(Exception):
    """A part's memory does not follow from its sizes alone; the text says where."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes alive at one size: after the forward pass, and after each operation of either pass."""

    saved: int
    """The part's input included, if the part keeps it; its output only if the part itself does."""
    forward: list[int]
    backward: list[int]
    backward_keeping: list[int]
    """The same with all gradients kept to the end."""
    left: int
    """After the backward pass."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the bytes of storages that come into being inside of it, after each operation."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.dropped = 0
        """Bytes of gradients that were dropped while others would have been kept."""
        self.moments: list[tuple[int, int]] = []
        """(alive, alive if no gradient had been dropped)."""
        self._alive = {_key(tensor.untyped_storage()) for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what is alive."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        self.moments.append((self.live, self.live + self.dropped))
        return result

    def take_moments(self) -> list[tuple[int, int]]:
        """The moments since the last call."""
        moments, self.moments = self.moments, []
        return moments

    def drop_gradient(self, param: Tensor) -> None:
        """Hook of a parameter: its gradient is complete, used and gone."""
        assert param.grad is not None
        self.dropped += param.grad.nbytes
        param.grad = None

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = _key(storage), storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.live += num_bytes
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self.live -= num_bytes


def run_part(part: Callable[[Tensor], Tensor], source: Tensor, *, known: Sequence[Tensor]) -> Run:
    """Run a part forward and backward on a fake tensor [B, T, H] like `source`, in a `FakeTensorMode`.

    `known` was there before: parameters, buffers, the part's other arguments. Gradients of parameters are dropped when
    they are complete.
    """
    anchor = torch.zeros(0, requires_grad=True)
    live = LiveBytes([anchor, *known])
    handles: list[Any] = [
        tensor.register_post_accumulate_grad_hook(live.drop_gradient)  # type: ignore[no-untyped-call]
        for tensor in known
        if _is_leaf(tensor)
    ]
    try:
        with live:
            # Nobody but the part has its input: whether it is kept shows.
            root = _Root.apply(part(_Source.apply(anchor, source)))  # type: ignore[no-untyped-call]
            saved, forward = live.live, live.take_moments()
            root.backward()
            backward = live.take_moments()
    finally:
        for handle in handles:
            handle.remove()
    alive, keeping = ([moment[index] for moment in backward] for index in (0, 1))
    return Run(saved, [moment for moment, _ in forward], alive, keeping, live.live)


def checkpointed(part: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The part, made again in the backward pass from its input."""
    return lambda source: checkpoint(part, source, use_reentrant=False, preserve_rng_state=False)


def fit(runs: Sequence[Run], *, keeping: bool = False) -> Trace:
    """Polynomials through the runs of one part at `SIZES_OF_ONE_ROW` or `SIZES_OF_ROWS`.

    Raises:
        TraceError: the sizes do not run through the same operations, or do not lie on one polynomial.
    """
    return Trace(
        saved=_polynomial([run.saved for run in runs]),
        forward=_envelope([run.forward for run in runs]),
        backward=_envelope([run.backward_keeping if keeping else run.backward for run in runs]),
    )


def fit_left(runs: Sequence[Run]) -> Polynomial:
    """What the runs of one part leave alive (sizes: see `fit`).

    Raises:
        TraceError: the sizes do not lie on one polynomial.
    """
    return _polynomial([run.left for run in runs])


def _key(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)  # noqa: SLF001 - a storage's only identity


def _is_leaf(tensor: Tensor) -> bool:
    return tensor.is_leaf and tensor.requires_grad


class _Source(torch.autograd.Function):
    """Stands for what comes before: makes the part's input, and takes its gradient."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, like: Tensor) -> Tensor:
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        return None, None


class _Root(torch.autograd.Function):
    """Stands for what follows: lets go of the part's output, and brings it a gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.like = (output.shape, output.dtype, output.device)
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        shape, dtype, device = ctx.like
        return torch.empty(shape, dtype=dtype, device=device)


def _envelope(runs: Sequence[list[int]]) -> Moments:
    """The moments that can be the largest."""
    if len({len(run) for run in runs}) != 1:
        raise TraceError(f"its number of operations depends on the batch: {[len(run) for run in runs]}")
    distinct = set(zip(*runs, strict=True))
    found: list[Polynomial] = []
    for values in sorted(distinct, key=lambda values: values[-1], reverse=True):
        moment = _polynomial(values)
        if not any(moment.never_exceeds(other) for other in found):
            found = [other for other in found if not other.never_exceeds(moment)]
            found.append(moment)
    return tuple(found)


def _polynomial(values: Sequence[int]) -> Polynomial:
    """The polynomial through the values, exactly; the last one is a check."""
    *given, last = values
    inverse, denominator = _INVERSES[len(given)]
    coefficients = [round(Fraction(sum(map(operator.mul, row, given)), denominator)) for row in inverse]
    polynomial = Polynomial(*coefficients)
    expected = polynomial.at(*_SIZES[len(given)][-1])
    if abs(expected - last) > _TOLERANCE * max(last, _NEGLIGIBLE_BYTES):
        raise TraceError(f"its memory is no polynomial of the batch: {expected} bytes expected, {last} found")
    return polynomial


def _inverse(matrix: list[list[int]]) -> tuple[list[list[int]], int]:
    """The inverse of a small regular matrix, as integers over one denominator (Gauss-Jordan elimination)."""
    size = len(matrix)
    rows = [
        [*map(Fraction, row), *(Fraction(index == column) for column in range(size))]
        for index, row in enumerate(matrix)
    ]
    for column in range(size):
        pivot = next(index for index in range(column, size) if rows[index][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [x / rows[column][column] for x in rows[column]]
        for index, row in enumerate(rows):
            if index != column and row[column]:
                rows[index] = [x - row[column] * y for x, y in zip(row, rows[column], strict=True)]
    parts = [row[size:] for row in rows]
    denominator = math.lcm(*(x.denominator for part in parts for x in part))
    return [[int(x * denominator) for x in part] for part in parts], denominator


def _powers(batch: int, seq: int, *, count: int) -> list[int]:
    """1, T, T^2, B T, B T^2: the first `count`."""
    return [1, seq, seq * seq, batch * seq, batch * seq * seq][:count]


# By the number of coefficients.
_SIZES: dict[int, tuple[tuple[int, int], ...]] = {len(sizes) - 1: sizes for sizes in (SIZES_OF_ONE_ROW, SIZES_OF_ROWS)}
_INVERSES = {count: _inverse([_powers(*size, count=count) for size in sizes[:-1]]) for count, sizes in _SIZES.items()}
