"""One attempt at a run: build, train, step, close. No mathematics of its own.

Everything that decides a number is elsewhere and a function of (configuration, step): batches and learning rates
(`run_plan.py`), the update (`optim/`), the noise (`seeding.py`), what follows from a bad step (`failure_policy.py`) or
an evaluation (`progress.py`). That is why a resumed run equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import gc
import math
import time
from functools import partial
from pathlib import Path
from typing import Literal

import numpy
import safetensors
import torch
import transformers

from lomo_core import checkpoint as checkpoints
from lomo_core import failure_policy, preflight
from lomo_core.build import build_training
from lomo_core.config import TrainConfig
from lomo_core.data.token_cache import Watch
from lomo_core.data.training_data import open_training_data
from lomo_core.disk_full import disk_full_named
from lomo_core.errors import DivergedError, InterruptedRunError
from lomo_core.evaluations import Evaluations
from lomo_core.events import Checkpoint, Finished, RolledBack, Skipped, Started, Step
from lomo_core.execute.plain import StepResult
from lomo_core.failure_policy import FailureState, Outcome, Verdict
from lomo_core.journal import Journal
from lomo_core.model import describe_device, pick_device, weights_are_finite
from lomo_core.oom import out_of_memory_named
from lomo_core.probe import try_batch
from lomo_core.resume_points import ResumePoint, drop_abandoned, earlier_checkpoints, newest_valid
from lomo_core.run_identity import run_sha256
from lomo_core.run_memory import BatchShape, RunMemory
from lomo_core.run_plan import RunPlan
from lomo_core.seeding import mix
from lomo_core.stop import StopRequest
from lomo_core.tokenizer import load_tokenizer

# Keeps the generator's seed for dropout apart from the seed's other uses.
_DROPOUT = 4


class Trainer:
    """Runs one `TrainConfig` to its end, telling the journal what happens.

    Raises:
        EngineError: of the class that names the cause.
    """

    def __init__(self, config: TrainConfig, journal: Journal, stop: StopRequest) -> None:
        self._start = time.monotonic()
        self._config = config
        self._journal = journal
        self._stop = stop
        self._device = pick_device()
        self._checkpoint_dir = Path(config.run_dir) / checkpoints.CHECKPOINTS_NAME
        self._step = 0
        self._saved_step = -1
        self._num_trained_tokens = 0
        self._failures = FailureState()
        self._last_loss: float | None = None
        self._build()

    def run(self) -> None:
        """Train from where the run stands to its end, and write the tuned model."""
        try:
            self._try_longest_batch()
            while True:
                if self._evaluations.is_due(self._step, total_steps=self._plan.total_steps):
                    self._evaluations.run(self._training, step=self._step)
                if self._is_checkpoint_due():
                    self._save_checkpoint()
                self._stop.raise_if_requested()
                if self._step == self._plan.total_steps or self._evaluations.has_stalled():
                    break
                self._advance()
        except InterruptedRunError as error:
            raise self._interrupted() from error
        self._finish()

    # -- build ----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        """In an order that lets every check come before the weights, which take the longest."""
        config = self._config
        architecture = preflight.check_architecture(config)
        if warning := preflight.rate_warning(config.optimizer):
            self._journal.say("warn", warning)
        self._journal.say("info", "reading the data")
        self._tokenizer = load_tokenizer(config.model_path)
        watch = Watch(say=partial(self._journal.say, "info"), check=self._stop.raise_if_requested)
        self._data = open_training_data(
            config.data,
            self._tokenizer,
            run_dir=config.run_dir,
            batch_size=config.batch_size,
            seed=config.seed,
            watch=watch,
        )
        self._evaluations = Evaluations(config, self._tokenizer, watch=watch, journal=self._journal, stop=self._stop)
        preflight.check_lengths_and_ids(self._data.counts, self._evaluations, architecture)
        self._plan = RunPlan(config, self._data, self._device)
        self._run_sha256 = run_sha256(config)
        given = map(Path, config.resume_from)
        with self._stop.interrupting():
            found = newest_valid(given, run_sha256=self._run_sha256, stop=self._stop, journal=self._journal)
            first = 0 if found is None else found[1].step
            self._longest_step = self._find_longest_step(first)
            self._memory = self._foresee_memory()
            self._load(found)
        self._memory.settle(self._training, starts_with_longest=self._longest_step == first)
        self._announce()

    def _find_longest_step(self, first: int) -> int | None:
        """Of the steps from `first` on, the one with the longest batch; None where none is left."""
        total_steps = self._plan.total_steps
        return self._data.longest_step(first=first, total_steps=total_steps) if first < total_steps else None

    def _foresee_memory(self) -> RunMemory:
        step = self._longest_step
        longest = None if step is None else BatchShape.of(self._data.batch(step))
        return RunMemory(
            self._config,
            longest,
            longest_row=self._data.counts.longest_row,
            device=self._device,
            journal=self._journal,
        )

    def _load(self, found: ResumePoint | None) -> None:
        """Load the weights of a verified checkpoint and stand where it stands; without one, the base model's."""
        self._journal.say("info", "loading the weights")
        self._training = build_training(
            self._config,
            self._config.model_path if found is None else found[0],
            device=self._device,
            tokens_per_step=self._plan.tokens_per_step,
            journal=self._journal,
            planned=self._memory.planned,
        )
        if found is None:
            self._step, self._saved_step, self._num_trained_tokens = 0, -1, 0
            return
        path, state = found
        checkpoints.load_optimizer(path, self._training.optimizer, state)
        self._step = self._saved_step = state.step
        self._num_trained_tokens = state.num_trained_tokens
        self._failures = state.failures
        self._evaluations.resume(path, done_step=state.evaluated_step, progress=state.progress)
        self._journal.say("info", f"resumed from checkpoint {path.name}")

    def _announce(self) -> None:
        self._stop.raise_if_requested()
        device, device_bytes = describe_device(self._device)
        self._journal.write(
            Started(
                step=self._step,
                total_steps=self._plan.total_steps,
                num_parameters=sum(p.numel() for p in self._training.model.parameters()),
                num_train_rows=self._data.counts.num_rows,
                num_truncated_rows=self._data.counts.num_truncated,
                num_trainable_tokens=self._data.counts.num_trained,
                device=device,
                device_bytes=device_bytes,
                planned=self._memory.planned,
            )
        )

    # -- train ----------------------------------------------------------------------------------------------------

    def _try_longest_batch(self) -> None:
        """Let a run that will not fit fail now. On a resumed run too: it may be on another machine."""
        step = self._longest_step
        if step is None:
            return
        batch = self._plan.batch_of(step)
        rows, width = batch.input_ids.shape
        what = f"the longest batch (step {step + 1}: {rows} rows of {width} tokens)"
        self._journal.say("info", f"trying {what}")
        training = self._training
        training.model.train()
        with out_of_memory_named(f"on {what}", training.meter.broken_off, suggest=self._memory.suggest):
            try_batch(training, batch)
        self._stop.raise_if_requested()

    def _advance(self) -> None:
        """One step further: with an update, without one, or after a rollback from further back."""
        step = self._step
        if self._failures.passes_over(step):
            self._step += 1
            self._journal.write(Skipped(step=self._step, what="window", loss_scale=self._training.optimizer.loss_scale))
            return
        outcome = self._train_step()
        self._failures, verdict = failure_policy.judge(self._failures, outcome, step=step)
        if verdict is Verdict.GO_ON:
            return
        if verdict is Verdict.GIVE_UP:
            raise DivergedError(
                f"loss or gradient are not finite at step {self._step}, although the run has gone back to earlier "
                "weights and past the data that led there: a lower learning_rate, or clipping by norm, may help"
            )
        first = failure_policy.first_suspect(
            self._failures,
            last=step,
            is_culprit_known=outcome.is_spoilt,
            weights_are_finite=weights_are_finite(self._training.model),
        )
        self._roll_back(first=first, last=step)

    def _train_step(self) -> Outcome:
        start = time.perf_counter()
        step, optimizer, meter = self._step, self._training.optimizer, self._training.meter
        rate = self._plan.rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["learning_rate_scale"]
        torch.manual_seed(mix(self._config.seed, step, _DROPOUT))
        scale = optimizer.loss_scale
        with (
            out_of_memory_named(f"in step {step + 1}", meter.broken_off, suggest=self._memory.suggest),
            disk_full_named("what gradients were put aside"),
        ):
            meter.begin_step()
            batch = self._plan.batch_of(step)
            result = self._training.executor.run([batch])
            memory = meter.end_step()
        self._step += 1
        self._memory.note_step(self._step, memory)
        self._num_trained_tokens += batch.num_trained
        seconds = time.perf_counter() - start
        self._last_loss = result.loss
        self._journal.write(
            Step(
                step=self._step,
                total_steps=self._plan.total_steps,
                epoch=self._plan.epochs(self._step),
                loss=result.loss,
                mean_token_accuracy=result.num_correct / batch.num_trained,
                learning_rate=rate,
                grad_norm=optimizer.last_grad_norm,
                num_tokens=batch.num_tokens,
                num_trained_tokens=self._num_trained_tokens,
                step_s=seconds,
                tokens_per_s=batch.num_tokens / seconds,
                memory=memory,
                rows_hash=self._plan.rows_hash(step),
            )
        )
        if profile := meter.find_profile(step=self._step):
            self._journal.write(profile)
        return self._outcome(result, scale_before=scale)

    def _outcome(self, result: StepResult, *, scale_before: float | None) -> Outcome:
        """What a step has done to the weights; a skipped one is reported."""
        optimizer = self._training.optimizer
        if result.is_applied:
            norm = optimizer.last_grad_norm
            return Outcome(is_applied=True, is_spoilt=norm is not None and not math.isfinite(norm))
        is_overflow = math.isfinite(result.loss) and scale_before is not None and scale_before > 1
        what: Literal["loss", "gradient", "overflow"] = "gradient" if math.isfinite(result.loss) else "loss"
        self._journal.write(
            Skipped(step=self._step, what="overflow" if is_overflow else what, loss_scale=optimizer.loss_scale)
        )
        return Outcome(is_applied=False, is_overflow=is_overflow)

    def _roll_back(self, *, first: int, last: int) -> None:
        """Go back to the last weights from before step `first` (0-based); steps up to `last` will be passed over."""
        progress = self._evaluations.progress
        name = self._load_from_before(first)
        self._failures = failure_policy.after_rollback(first=first, last=last)
        # The evaluations on the way here have happened, and a model of theirs may still be the best.
        self._evaluations.progress, self._evaluations.done_step = progress, self._step
        drop_abandoned(self._checkpoint_dir, step=self._step)
        self._journal.write(
            RolledBack(step=self._step, first_skipped=first + 1, last_skipped=last + 1, checkpoint=name), durable=True
        )

    def _load_from_before(self, first: int) -> str | None:
        """Load the newest valid weights of at most `first` steps; returns the checkpoint's name, None for the base
        model."""
        paths = [*checkpoints.checkpoint_folders(self._checkpoint_dir), *map(Path, self._config.resume_from)]
        for found in earlier_checkpoints(
            paths,
            first=first,
            run_sha256=self._run_sha256,
            journal=self._journal,
        ):
            self._reload(found)
            if weights_are_finite(self._training.model):
                return found[0].name
            self._journal.say("warn", f"checkpoint {found[0].name} is not used: its weights are not finite")
        self._reload(None)
        return None

    def _reload(self, found: ResumePoint | None) -> None:
        """Load other weights; the old ones must be gone first, or both would be in memory."""
        del self._training
        # Hooks and optimizer hold each other.
        gc.collect()
        self._load(found)

    # -- close ----------------------------------------------------------------------------------------------------

    def _is_checkpoint_due(self) -> bool:
        """Regularly, but not after a bad step: what comes of it is not known yet."""
        every = self._config.checkpoint_every_steps
        is_time = every > 0 and self._step > 0 and self._step % every == 0
        return is_time and self._saved_step != self._step and not self._failures.is_in_doubt

    def _save_checkpoint(self) -> None:
        optimizer = self._training.optimizer
        state = checkpoints.TrainerState(
            step=self._step,
            run_sha256=self._run_sha256,
            num_trained_tokens=self._num_trained_tokens,
            evaluated_step=self._evaluations.done_step,
            optimizer=checkpoints.small_state(optimizer),
            failures=self._failures,
            progress=self._evaluations.progress,
            versions={module.__name__: module.__version__ for module in (torch, transformers, safetensors, numpy)},
        )
        saved = checkpoints.save_checkpoint(
            self._checkpoint_dir / f"step-{self._step}",
            model=self._training.model,
            tokenizer=self._tokenizer,
            optimizer=optimizer,
            state=state,
        )
        self._saved_step = self._step
        checkpoints.prune_checkpoints(self._checkpoint_dir, keep=self._config.keep_checkpoints)
        self._evaluations.prune()
        self._journal.write(
            Checkpoint(
                step=self._step,
                path=str(saved.path),
                manifest_sha256=saved.manifest_sha256,
                num_bytes=saved.num_bytes,
                train_loss=self._last_loss,
                valid_loss=self._evaluations.valid_loss_at(self._step),
                best_step=self._evaluations.kept_best_step,
            ),
            durable=True,
        )

    def _interrupted(self) -> InterruptedRunError:
        """Write a checkpoint where the last one is older, and say where the run stands."""
        if self._step > max(self._saved_step, 0):
            self._save_checkpoint()
        where = f"its checkpoint is at step {self._step}" if self._step else "before its first step"
        return InterruptedRunError(f"the run was asked to stop: {where}")

    def _finish(self) -> None:
        if self._step < self._plan.total_steps:
            num = self._evaluations.progress.num_since_best
            self._journal.say("info", f"stopped early at step {self._step}: {num} evaluations brought nothing better")
        path = Path(self._config.run_dir) / "model"
        best_path = self._evaluations.kept_best_path
        model_step, sha256 = self._evaluations.write_final_model(path, self._training, step=self._step)
        verdict = self._memory.judge()
        if verdict is not None:
            self._journal.write(verdict)
        self._journal.write(
            Finished(
                step=self._step,
                model_path=str(path),
                weights_sha256=sha256,
                num_trained_tokens=self._num_trained_tokens,
                peak_bytes=self._training.meter.run_peak_bytes,
                seconds=time.monotonic() - self._start,
                model_step=model_step,
                best_step=self._evaluations.kept_best_step,
                best_model_path=None if best_path is None else str(best_path),
            ),
            durable=True,
        )
