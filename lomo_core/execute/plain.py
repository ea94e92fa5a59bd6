"""The plain executor: the model's own forward and backward pass over one micro-batch.

The trainer hands over a list of micro-batches; other executors may take several (block by block, so that gradients
can be accumulated). This one takes exactly one, because a fused update leaves no gradient to add to.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lomo_core.data.batches import Batch
from lomo_core.head import BatchLoss, batch_loss
from lomo_core.memory.allocator import HeapWatch
from lomo_core.memory.meter import Meter
from lomo_core.optim.protocol import RunOptimizer
from lomo_core.vocabulary_head import VocabularyHead


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did. `is_applied` is False where loss or gradient were not finite and no weight was changed."""

    loss: float
    num_correct: int
    is_applied: bool


class PlainExecutor:
    """Runs a step on the whole model at once."""

    def __init__(self, model: Any, optimizer: RunOptimizer, meter: Meter) -> None:
        self._model = model
        self._optimizer = optimizer
        self._meter = meter
        self._head = VocabularyHead.find(model, optimizer)
        self._heap = HeapWatch(model)

    @property
    def has_own_head(self) -> bool:
        """Whether the model does more with its head's weight than multiply, so that its logits have to be made."""
        return self._head is None

    def loss_of(self, batch: Batch) -> BatchLoss:
        """Forward pass and loss of one micro-batch, as in training; under `no_grad` a measurement."""
        return batch_loss(self._model, batch) if self._head is None else self._head.loss(batch)

    def run(self, batches: list[Batch]) -> StepResult:
        """Forward, backward and update on one micro-batch.

        Raises:
            ValueError: there is not exactly one micro-batch.
        """
        if len(batches) != 1:
            raise ValueError(f"the plain executor takes exactly one micro-batch, not {len(batches)}")
        self._model.train()
        with self._heap.step():
            return self._run(batches[0])

    def trying(self) -> AbstractContextManager[None]:
        """Around a forward and a backward pass that is no step: memory is kept low as in one."""
        return self._heap.step()

    def _run(self, batch: Batch) -> StepResult:
        with self._meter.forward():
            result = self.loss_of(batch)
        # The one wait for the device: a loss that is not finite must not reach the weights.
        loss = float(result.loss.detach())
        self._meter.forward_done()
        is_applied = math.isfinite(loss) and self._optimizer.backward(result.loss)
        self._meter.backward_done()
        self._optimizer.step()
        return StepResult(loss=loss, num_correct=int(result.num_correct), is_applied=is_applied)
