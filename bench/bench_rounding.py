"""What an update costs by itself: CPU milliseconds per 10 M elements, per way of rounding and dtype. For information.

A weight of 10 M elements whose gradient is given (`weight.backward(gradient)`), so that the hook's update is all there
is to do; what remains without the hook (taking over the gradient) is subtracted. One thread; the fastest of ten, the
variants in turn. Each JSON line has one variant. Run: `make bench`.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness import machine
from lomo_core.optim import AdaLomo, Lomo
from lomo_core.optim.fused import FusedOptimizer
from lomo_core.optim.rounding import Rounding

NUM_ELEMENTS = 10_000_000
_SHAPE = (10_000, 1_000)
_ROUNDS = 10
_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Update:
    """One kind of update; `optimizer` None: the backward pass without any."""

    optimizer: type[FusedOptimizer] | None
    dtype: torch.dtype
    rounding: Rounding = "nearest"


VARIANTS = (
    Update(None, torch.float32),
    Update(None, torch.bfloat16),
    Update(Lomo, torch.float32),
    Update(Lomo, torch.bfloat16),
    Update(Lomo, torch.bfloat16, "stochastic"),
    Update(AdaLomo, torch.float32),
    Update(AdaLomo, torch.bfloat16),
    Update(AdaLomo, torch.bfloat16, "stochastic"),
)


def prepare(variant: Update) -> tuple[Tensor, FusedOptimizer | None]:
    """A weight of that dtype, and its optimizer."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(_SHAPE).mul_(0.02).to(variant.dtype))
    if variant.optimizer is None:
        return weight, None
    return weight, variant.optimizer([weight], _RATE, rounding=variant.rounding)


def cpu_seconds(weight: Tensor, optimizer: FusedOptimizer | None) -> float:
    """CPU seconds of taking one gradient."""
    gradient = torch.full_like(weight, 1e-3)
    start = time.process_time()
    weight.backward(gradient)  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
    if optimizer is not None:
        optimizer.step()
    seconds = time.process_time() - start
    weight.grad = None
    return seconds


def main() -> None:
    """Print one JSON line per variant."""
    torch.set_num_threads(1)
    prepared = [prepare(variant) for variant in VARIANTS]
    least = [float("inf")] * len(VARIANTS)
    for _ in range(_ROUNDS):
        least = [min(before, cpu_seconds(*pair)) for before, pair in zip(least, prepared, strict=True)]
    bare = {
        variant.dtype: seconds for variant, seconds in zip(VARIANTS, least, strict=True) if variant.optimizer is None
    }
    about = machine()
    for variant, seconds in zip(VARIANTS, least, strict=True):
        if variant.optimizer is None:
            continue
        result = {
            "bench": "rounding",
            "optimizer": variant.optimizer.__name__.lower(),
            "dtype": str(variant.dtype).removeprefix("torch."),
            "rounding": variant.rounding,
            "update_cpu_ms_per_10m": round((seconds - bare[variant.dtype]) * 1e3, 2),
            **about,
        }
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
