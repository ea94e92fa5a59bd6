"""The longest batch of a run, tried before its first step: where memory does not suffice, that shows within seconds and
not after hours, when the batch's turn comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lomo_core.data.batches import Batch, BatchPlan, batch_width
from lomo_core.head import BatchLoss
from lomo_core.memory.meter import Meter
from lomo_core.optim.protocol import RunOptimizer


def longest_step(plan: BatchPlan, lengths: Sequence[int], *, first: int, total_steps: int) -> int:
    """The step from `first` to before `total_steps` whose batch has the most cells, padding included."""

    def num_cells(step: int) -> int:
        rows = plan.rows_of(step)
        return len(rows) * batch_width(max(lengths[row] for row in rows))

    return max(range(first, total_steps), key=num_cells)


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
