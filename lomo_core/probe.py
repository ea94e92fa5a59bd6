"""The longest batch of a run, tried before its first step: where memory does not suffice, that shows within seconds and
not after hours, when the batch's turn comes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lomo_core.data.batches import Batch
from lomo_core.head import BatchLoss
from lomo_core.memory.meter import Meter
from lomo_core.optim.protocol import RunOptimizer


def try_batch(
    batch: Batch,
    loss_of: Callable[[Batch], BatchLoss],
    optimizer: RunOptimizer,
    meter: Meter,
    *,
    keeps_graph: bool,
) -> None:
    """Run forward and backward on a batch without any effect on weights, moments, step or random numbers.

    keeps_graph: the optimizer walks the graph a second time, so that the first walk frees nothing of it.
    """
    devices = [batch.input_ids.device] if batch.input_ids.is_cuda else []
    with torch.random.fork_rng(devices=devices), optimizer.probing():
        meter.begin_step()
        loss = loss_of(batch).loss
        meter.forward_done()
        loss.backward(retain_graph=keeps_graph)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        meter.end_step()
