"""What the hooks themselves cost: the backward pass of chains of 4 x 4 layers, in which there is next to nothing to
compute.

291 and 723 are the numbers of tensors of LLaMA 7B and 65B. CPU seconds of the backward pass alone, one thread; those
of a fused optimizer include its updates (at learning rate 0, so that the chain stays as it is). Variants take turns.
`python -m bench.hooks SPEC` prints one JSON line.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import lomo_optim
import torch
from torch import Tensor, nn

from lomo_core.optim import Lomo

_WIDTH = 4


def chain(num_tensors: int) -> nn.Sequential:
    """Layers that hand their input on: signals neither vanish (denormal numbers are slow) nor explode."""
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(num_tensors)))
    for parameter in model.parameters():
        nn.init.eye_(parameter)
    return model


def plain(model: nn.Module) -> Callable[[Tensor], None]:
    """The backward pass as it is: gradients stay."""
    del model
    return lambda loss: loss.backward()  # type: ignore[no-untyped-call]


def plain_and_sgd(model: nn.Module) -> Callable[[Tensor], None]:
    """The backward pass, then torch's loop over the parameters: what a fused update replaces."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=False)

    def run(loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return run


def ours(model: nn.Module) -> Callable[[Tensor], None]:
    """The backward pass with the engine's hooks, updates and end of step."""
    optimizer = Lomo(model.parameters(), 0.0)

    def run(loss: Tensor) -> None:
        optimizer.backward(loss)
        optimizer.step()

    return run


def theirs(model: nn.Module) -> Callable[[Tensor], None]:
    """lomo-optim's."""
    optimizer = lomo_optim.Lomo(model, lr=0.0)
    return lambda loss: optimizer.fused_backward(loss, 0.0)


# Name, what it runs, times per round (lomo-optim takes seconds).
VARIANTS = (("plain", plain, 10), ("torch sgd", plain_and_sgd, 10), ("lomo_core", ours, 10), ("lomo-optim", theirs, 1))


def main(spec: dict[str, Any]) -> dict[str, float]:
    """Least CPU seconds of a backward pass, per variant."""
    if spec["cpu"] is not None:
        os.sched_setaffinity(0, {spec["cpu"]})
    torch.set_num_threads(1)
    models = {name: chain(spec["num_tensors"]) for name, _, _ in VARIANTS}
    runs = {name: build(models[name]) for name, build, _ in VARIANTS}
    least = dict.fromkeys(models, float("inf"))
    batch = torch.ones(_WIDTH, _WIDTH)
    gc.disable()
    for _ in range(spec["rounds"]):
        for name, _, times in VARIANTS:
            for _ in range(times):
                least[name] = min(least[name], cpu_seconds(runs[name], models[name], batch))
        gc.collect()
    return least


def cpu_seconds(run: Callable[[Tensor], None], model: nn.Module, batch: Tensor) -> float:
    """CPU seconds of one backward pass; forward pass and dropping of gradients are not counted."""
    loss = model(batch).sum()
    start = time.process_time()
    run(loss)
    seconds = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return seconds


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
