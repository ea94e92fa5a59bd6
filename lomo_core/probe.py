"""The longest batch of a run, tried before its first step: where memory does not suffice, that shows within seconds and
not after hours, when the batch's turn comes."""

from __future__ import annotations

import torch

from lomo_core.build import Training
from lomo_core.data.batches import Batch


def try_batch(training: Training, batch: Batch) -> None:
    """Run forward and backward on a batch without any effect on weights, moments, step or random numbers."""
    meter = training.meter
    devices = [batch.input_ids.device] if batch.input_ids.is_cuda else []
    with torch.random.fork_rng(devices=devices), training.optimizer.probing(), training.executor.trying():
        meter.begin_step(is_trial=True)
        loss = training.executor.loss_of(batch).loss
        meter.forward_done()
        # Where the optimizer walks the graph a second time, the first walk frees nothing of it.
        loss.backward(retain_graph=training.keeps_graph)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        meter.end_step()
