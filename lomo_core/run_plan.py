"""What each step of a run is, as a function of its number alone: batch, learning rate, epoch. A resumed run asks for
the same steps and gets the same."""

from __future__ import annotations

import hashlib
import json

import torch

from lomo_core.config import TrainConfig
from lomo_core.data.batches import Batch
from lomo_core.data.training_data import TrainingData
from lomo_core.schedule import scale_at, warmup_steps


class RunPlan:
    """The steps of a run over its data. Steps count from 0: `step` updates have been made before it."""

    def __init__(self, config: TrainConfig, data: TrainingData, device: torch.device) -> None:
        self._config = config
        self._data = data
        self._device = device
        total_steps = config.n_epochs * data.batches_per_epoch
        self.total_steps = total_steps if config.max_steps is None else min(total_steps, config.max_steps)
        self.tokens_per_step = data.counts.num_tokens / data.batches_per_epoch
        """On average over an epoch, padding excluded."""
        self._warmup = warmup_steps(self.total_steps, config.schedule.warmup_ratio)

    def batch_of(self, step: int) -> Batch:
        """The step's batch, on the device."""
        return self._data.batch(step).to(self._device)

    def rows_hash(self, step: int) -> str:
        """Hash of the indexes of the step's rows, 16 hex digits."""
        return hashlib.sha256(json.dumps(self._data.rows_of(step)).encode()).hexdigest()[:16]

    def rate_at(self, step: int) -> float:
        """The step's learning rate."""
        schedule = self._config.schedule.name
        scale = scale_at(schedule, step=step, total_steps=self.total_steps, warmup=self._warmup)
        return self._config.optimizer.peak_learning_rate * scale

    def epochs(self, num_steps: int) -> float:
        """How often the data has been seen after so many steps."""
        return num_steps / self._data.batches_per_epoch
