"""LOMO (arXiv 2306.09782, algorithm 1): plain SGD, fused into the backward pass so that no two gradients exist at
once."""

from __future__ import annotations

from torch import Tensor

from lomo_core.optim.clip import Clipping
from lomo_core.optim.fused import FusedOptimizer, Update, blocks_of, load_gradient


def lomo_update(weight: Tensor, grad: Tensor, update: Update, *, clipping: Clipping) -> None:
    """`w = w (1 - lr * weight_decay) - lr * clip(g)`, in place; fp32 inside, one block of scratch.

    weight, grad: the same shape, any rank; fp32 or bf16. In fp32, unclipped and undecayed, bit-equal to
    `torch.optim.SGD`. Source: arXiv 2306.09782, algorithm 1; decoupled weight decay as in the authors' package
    (lomo_optim 0.1.1).
    """
    decay = 1.0 - update.lr * update.weight_decay
    # On the host where there is no coefficient, on the device where it is a tensor: never a wait for the device.
    scale = None if clipping.coefficient is None else clipping.coefficient * -update.lr
    for start, w, g in blocks_of(weight, grad):
        g32 = load_gradient(g, update.writer, limit=clipping.limit)
        x = update.writer.load(w)
        if decay != 1.0:
            x.mul_(decay)
        if scale is None:
            x.add_(g32, alpha=-update.lr)
        else:
            x.addcmul_(g32, scale)
        update.writer.store(w, x, start=start)


class Lomo(FusedOptimizer):
    """SGD in the backward pass: no optimizer state, one gradient at a time. See `FusedOptimizer` for the arguments.

    Learning rates are SGD's, not Adam's: about 5e-4 to 5e-2 with clipping at 1.0.
    """

    def _apply(self, param: Tensor, grad: Tensor, update: Update, *, clipping: Clipping) -> None:
        lomo_update(param, grad, update, clipping=clipping)
