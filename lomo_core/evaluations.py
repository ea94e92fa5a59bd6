"""The evaluations of a run: when one is due, what it consists of, and what follows from it (the best model, an early
end).

An evaluation counts once it is complete. One that an interruption cut short is made anew by the resumed run, so that
both see the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lomo_core import checkpoint as checkpoints
from lomo_core.best_model import BestModels
from lomo_core.build import Training
from lomo_core.config import TrainConfig
from lomo_core.data.token_cache import Watch
from lomo_core.data.training_data import cache_dir_of
from lomo_core.errors import CheckpointError
from lomo_core.evaluate import Evaluator
from lomo_core.events import Evaluation
from lomo_core.journal import Journal
from lomo_core.model import weights_sha256
from lomo_core.oom import out_of_memory_named
from lomo_core.progress import Progress
from lomo_core.samples import Sampler
from lomo_core.stop import StopRequest


class Evaluations:
    """Validation file and prompts of a run, read and encoded once.

    Raises:
        DataError: the validation file cannot be used.
        ConfigError: a prompt cannot be used.
    """

    def __init__(
        self, config: TrainConfig, tokenizer: Any, *, watch: Watch, journal: Journal, stop: StopRequest
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._journal = journal
        self._stop = stop
        self._best = BestModels(config.run_dir)
        self.evaluator = _build_evaluator(config, tokenizer, watch)
        self.sampler = (
            Sampler(config.sample_prompts, tokenizer, max_new_tokens=config.sample_max_new_tokens)
            if config.sample_prompts
            else None
        )
        self.done_step = -1
        """The step of the last complete evaluation."""
        self.progress = Progress()
        self.last: Evaluation | None = None

    def is_due(self, step: int, *, total_steps: int) -> bool:
        """Before the first step, regularly, at the end; each once."""
        every = self._config.eval_every_steps
        is_time = step in (0, total_steps) or (every > 0 and step % every == 0)
        return is_time and self.done_step != step

    def run(self, training: Training, *, step: int) -> None:
        """Measure, answer the prompts, keep the model if it is the best so far.

        Raises:
            InterruptedRunError: a stop was asked for; the evaluation does not count.
        """
        with out_of_memory_named("in evaluation", lambda: training.meter.last):
            found = self._measure(training, step)
            if self.sampler is not None:
                for sample in self.sampler.run(training.model, step=step, stop=self._stop):
                    self._journal.write(sample)
        if found is not None:
            self.progress = self.progress.after(found)
            if self._config.keep_best and self.progress.best_step == step:
                self._keep(training.model, step)
        self.done_step = step

    def resume(self, checkpoint: Path, *, done_step: int, progress: Progress) -> None:
        """Stand where a checkpoint stands. Its best model must be at hand; without it, none was the best yet."""
        self.done_step, self.progress = done_step, progress
        if not self._config.keep_best or progress.best_step is None:
            return
        try:
            self._best.take_over(checkpoint, progress.best_step)
        except CheckpointError as error:
            self.progress = Progress()
            self._journal.say(
                "warn",
                f"the best model so far, of step {progress.best_step}, cannot be used ({error.message}): "
                "the best will be one of the evaluations to come",
            )

    def has_stalled(self) -> bool:
        """Whether the run is to end early."""
        return self.progress.has_stalled(self._config.early_stopping_patience)

    def valid_loss_at(self, step: int) -> float | None:
        """The validation loss measured at this very step, if it was."""
        return self.last.valid_loss if self.last is not None and self.last.step == step else None

    @property
    def kept_best_step(self) -> int | None:
        """Step of the best model, where it is kept."""
        return self.progress.best_step if self._config.keep_best else None

    @property
    def kept_best_path(self) -> Path | None:
        """Folder of the best model, where it is kept."""
        return None if self.kept_best_step is None else self._best.path(self.kept_best_step)

    def prune(self) -> None:
        """Delete best models that nothing names any more."""
        self._best.prune(best_step=self.progress.best_step)

    def _measure(self, training: Training, step: int) -> Evaluation | None:
        if self.evaluator is None:
            return None
        check = self._stop.raise_if_requested
        self.last = self.evaluator.run(training.model, training.executor.loss_of, step=step, check=check)
        self._journal.write(self.last)
        return self.last

    def _keep(self, model: Any, step: int) -> None:
        self._best.save(model=model, tokenizer=self._tokenizer, step=step)
        self.progress = replace(self.progress, best_weights_sha256=weights_sha256(model))
        self.prune()

    def write_final_model(self, path: Path, training: Training, *, step: int) -> tuple[int, str]:
        """Write the weights that the run ends with, its last or its best; returns their step and hash.

        Raises:
            DiskFullError: there is not enough space; nothing is left behind.
        """
        best = self.progress
        if self._config.final_model == "best" and best.best_step is not None:
            assert best.best_weights_sha256 is not None
            checkpoints.copy_model(self._best.path(best.best_step), path, step=best.best_step)
            return best.best_step, best.best_weights_sha256
        checkpoints.save_final_model(path, model=training.model, tokenizer=self._tokenizer, step=step)
        return step, weights_sha256(training.model)


def _build_evaluator(config: TrainConfig, tokenizer: Any, watch: Watch) -> Evaluator | None:
    data = config.data
    if data.validation_path is None:
        return None
    return Evaluator(data, tokenizer, cache_dir=cache_dir_of(data, config.run_dir), watch=watch)
