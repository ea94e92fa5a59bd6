"""AdaLomo (arXiv 2310.10195): Adafactor's factored second moment and normalised update, fused into the backward pass.

State per matrix of m x n is m + n fp32 numbers (0.02 to 0.04 % of the model). Any rank works: dimensions before the
last two are a batch of matrices, vectors and scalars keep a full moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lomo_core.optim.clip import Clipping
from lomo_core.optim.fused import FusedOptimizer, Update, load_gradient
from lomo_core.optim.rounding import BLOCK

# Adafactor (arXiv 1804.04235), algorithm 5: eps_1, eps_2, the clipping threshold d and the decay exponent of section
# 7.2.
_EPS_GRADIENT = 1e-30
_EPS_WEIGHT = 1e-3
_UPDATE_RMS = 1.0
_DECAY_EXPONENT = -0.8


def adalomo_update(weight: Tensor, grad: Tensor, update: Update, *, clipping: Clipping) -> None:
    """One step of AdaLomo, in place; fp32 inside, a few blocks of scratch.

    weight, grad: [..., m, n], [n] or []; fp32, bf16 or fp16. With b = 1 - t^-0.8 and s = g^2 + 1e-30:
    `row [..., m] = b row + (1-b) mean_n(s)`, `col [..., n] = b col + (1-b) mean_m(s)`,
    `u = g / sqrt(row col^T / mean(row))` (vectors: `g / sqrt(v)`), `u /= max(1, RMS(u))`,
    `a = lr max(1e-3, RMS(w))`, `w = w (1 - a weight_decay) - a u`. RMS is over the whole tensor.
    Source: arXiv 2310.10195, algorithm 1, as in the authors' code; arXiv 1804.04235, algorithm 5.
    """
    if not weight.is_contiguous():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is not contiguous: call .contiguous() on it first")
    if weight.numel() == 0:
        return
    factored = weight.dim() >= 2
    view = (-1, weight.shape[-2], weight.shape[-1]) if factored else (1, 1, weight.numel())
    pair = _Pair(weight.view(view), grad.reshape(view), clipping, update)
    decay = 1.0 - update.step**_DECAY_EXPONENT
    factors = _factored(pair, weight.shape, decay) if factored else _full(pair, weight.shape, decay)
    sum_u, sum_w = _sums_of_squares(pair, factors)
    numel = weight.numel()
    step_size = (sum_w / numel).sqrt_().clamp_(min=_EPS_WEIGHT).mul_(update.lr).float()
    scale = -step_size / (sum_u / numel).sqrt_().div_(_UPDATE_RMS).clamp_(min=1.0).float()
    for block in pair.blocks():
        u = factors.direction(pair, block)
        w = pair.weight[block.batch, block.rows].view(-1)
        x = update.writer.load(w)
        if update.weight_decay:
            x.mul_(1.0 - step_size * update.weight_decay)
        x.addcmul_(u.view(-1), scale)
        update.writer.store(w, x, start=block.start)


class AdaLomo(FusedOptimizer):
    """Adafactor-like steps in the backward pass. See `FusedOptimizer` for the arguments.

    Steps are relative to the weights' own size: learning rates of 5e-4 to 1e-3; clipping is seldom needed, since each
    tensor's update is normalised.
    """

    def _apply(self, param: Tensor, grad: Tensor, update: Update, *, clipping: Clipping, start: int) -> None:
        assert start == 0
        adalomo_update(param, grad, update, clipping=clipping)


@dataclass(frozen=True, slots=True)
class _Block:
    """A contiguous piece of a [batch, m, n] tensor: either several whole matrices or rows of one."""

    batch: slice
    rows: slice
    start: int


@dataclass(frozen=True, slots=True)
class _Pair:
    """Weight and gradient as [batch, m, n]."""

    weight: Tensor
    grad: Tensor
    clipping: Clipping
    update: Update

    def blocks(self) -> Iterator[_Block]:
        """Cut so that a block has about `BLOCK` elements (at least one row)."""
        num_batch, num_rows, num_cols = self.weight.shape
        matrix = num_rows * num_cols
        if matrix <= BLOCK:
            per_block = BLOCK // matrix
            for first in range(0, num_batch, per_block):
                yield _Block(slice(first, first + per_block), slice(0, num_rows), first * matrix)
            return
        rows_per_block = max(BLOCK // num_cols, 1)
        for index in range(num_batch):
            for first in range(0, num_rows, rows_per_block):
                start = index * matrix + first * num_cols
                yield _Block(slice(index, index + 1), slice(first, first + rows_per_block), start)

    def gradient(self, block: _Block) -> Tensor:
        """The block's clipped gradient, fp32 [b, r, n]."""
        grad = self.grad[block.batch, block.rows]
        return load_gradient(grad.reshape(-1), self.update.writer, self.clipping).view(grad.shape)

    def scratch(self, shape: torch.Size) -> Tensor:
        """Uninitialised fp32 of that shape."""
        return self.update.writer.workspace.buffer("direction", shape.numel()).view(shape)


@dataclass(frozen=True, slots=True)
class _Factors:
    """1 / sqrt(second moment), as factors that broadcast over a block: rows [batch, m, 1] and columns [batch, 1 or m,
    n]."""

    rows: Tensor | None
    columns: Tensor

    def direction(self, pair: _Pair, block: _Block) -> Tensor:
        """u before its normalisation: fp32 [b, r, n], in scratch."""
        g = pair.gradient(block)
        u = torch.mul(g, self.columns[block.batch], out=pair.scratch(g.shape))
        return u if self.rows is None else u.mul_(self.rows[block.batch, block.rows])


def _moment(pair: _Pair, name: str, shape: tuple[int, ...]) -> Tensor:
    state = pair.update.state
    if name not in state:
        state[name] = torch.zeros(shape, dtype=torch.float32, device=pair.weight.device)
    return state[name]


def _factored(pair: _Pair, shape: torch.Size, decay: float) -> _Factors:
    num_batch, num_rows, num_cols = pair.weight.shape
    row = _moment(pair, "exp_avg_sq_row", shape[:-1]).view(num_batch, num_rows)
    col = _moment(pair, "exp_avg_sq_col", shape[:-2] + shape[-1:]).view(num_batch, num_cols)
    row_mean, col_sum = torch.empty_like(row), torch.zeros_like(col)
    for block in pair.blocks():
        g = pair.gradient(block)
        square = torch.mul(g, g, out=pair.scratch(g.shape)).add_(_EPS_GRADIENT)
        row_mean[block.batch, block.rows] = square.mean(dim=-1)
        col_sum[block.batch] += square.sum(dim=-2)
    row.mul_(decay).add_(row_mean, alpha=1.0 - decay)
    col.mul_(decay).add_(col_sum, alpha=(1.0 - decay) / num_rows)
    rows = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return _Factors(rows=rows, columns=col.rsqrt().unsqueeze(-2))


def _full(pair: _Pair, shape: torch.Size, decay: float) -> _Factors:
    moment = _moment(pair, "exp_avg_sq", shape).view(pair.weight.shape)
    for block in pair.blocks():
        g = pair.gradient(block)
        square = torch.mul(g, g, out=pair.scratch(g.shape)).add_(_EPS_GRADIENT)
        moment[block.batch, block.rows].mul_(decay).add_(square, alpha=1.0 - decay)
    return _Factors(rows=None, columns=moment.rsqrt())


def _sums_of_squares(pair: _Pair, factors: _Factors) -> tuple[Tensor, Tensor]:
    """Sum of u^2 and of w^2 over the whole tensor: fp64, 0-dim, on the device."""
    sum_u = torch.zeros((), dtype=torch.float64, device=pair.weight.device)
    sum_w = torch.zeros_like(sum_u)
    for block in pair.blocks():
        u = factors.direction(pair, block)
        sum_u += u.mul_(u).sum()
        w = pair.update.writer.load(pair.weight[block.batch, block.rows].reshape(-1))
        scratch = pair.update.writer.workspace.buffer("direction", w.numel())
        sum_w += torch.mul(w, w, out=scratch).sum()
    return sum_u, sum_w
