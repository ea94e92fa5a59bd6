"""LOMO (arXiv 2306.09782, algorithm 1): plain SGD, fused into the backward pass so that no two gradients exist at
once."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lomo_core.optim.clip import NO_CLIPPING, Clipping
from lomo_core.optim.fused import FusedOptimizer, Update, blocks_of, load_gradient
from lomo_core.optim.rounding import BLOCK


def lomo_update(weight: Tensor, grad: Tensor, update: Update, *, clipping: Clipping, start: int = 0) -> None:
    """`w = w (1 - lr * weight_decay) - lr * clip(g)`, in place; fp32 inside, a block of scratch.

    weight, grad: the same shape, any rank; fp32, bf16 or fp16. `start` is the global flat index of their first element
    (of the rounding noise). In fp32, undecayed, bit-equal to `torch.optim.SGD` on the clipped gradient. Source: arXiv
    2306.09782, algorithm 1; decoupled weight decay as in the authors' package (lomo_optim 0.1.1).
    """
    decay = 1.0 - update.lr * update.weight_decay
    if clipping is NO_CLIPPING and weight.dtype == torch.float32 == grad.dtype:
        # Nothing needs scratch.
        _step_(weight, grad, decay=decay, lr=update.lr)
        return
    for at, w, g in blocks_of(weight, grad):
        g32 = load_gradient(g, update.writer, clipping)
        x = update.writer.load(w)
        _step_(x, g32, decay=decay, lr=update.lr)
        update.writer.store(w, x, start=start + at)


def lomo_update_rows(weight: Tensor, grad: Tensor, rows: Tensor, update: Update, *, clipping: Clipping) -> None:
    """As `lomo_update` for the rows `rows` (int64 [n], each once) of a matrix `weight` [V, H]; grad [n, H]."""
    decay = 1.0 - update.lr * update.weight_decay
    num_rows = max(1, BLOCK // weight.shape[1])
    for some, g in zip(torch.split(rows, num_rows), torch.split(grad, num_rows), strict=True):
        g32 = load_gradient(g.reshape(-1), update.writer, clipping).view(g.shape)
        x = weight.index_select(0, some).float()
        _step_(x, g32, decay=decay, lr=update.lr)
        update.writer.store_rows(weight, x, some)


def _step_(x: Tensor, g: Tensor, *, decay: float, lr: float) -> None:
    if decay != 1.0:
        x.mul_(decay)
    x.add_(g, alpha=-lr)


class Lomo(FusedOptimizer):
    """SGD in the backward pass: no optimizer state, one gradient at a time. See `FusedOptimizer` for the arguments.

    Learning rates are SGD's, not Adam's: about 5e-4 to 5e-2 with clipping at 1.0.
    """

    is_element_wise: ClassVar[bool] = True

    def _apply(self, param: Tensor, grad: Tensor, update: Update, *, clipping: Clipping, start: int) -> None:
        weight = param
        if grad.numel() != param.numel():
            weight = param.view(-1)[start : start + grad.numel()]
            grad = grad.view(-1)
        lomo_update(weight, grad, update, clipping=clipping, start=start)

    def _apply_rows(self, param: Tensor, rows: Tensor, grad: Tensor, update: Update, *, clipping: Clipping) -> None:
        lomo_update_rows(param, grad, rows, update, clipping=clipping)
