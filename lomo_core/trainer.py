"""One attempt at a run: build, train, step, close. No mathematics of its own.

Everything that decides a number is elsewhere and a function of (configuration, step): the batches
(`data/batches.py`), the learning rate (`schedule.py`), the update (`optim/`), the noise (`seeding.py`). That is why a
resumed run equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch
import transformers

from lomo_core import checkpoint as checkpoints
from lomo_core.config import OptimizerConfig, TrainConfig
from lomo_core.data.packing_check import check_packing
from lomo_core.data.token_cache import Watch
from lomo_core.data.training_data import cache_dir_of, open_training_data
from lomo_core.errors import CheckpointError, ConfigError, DivergedError, InterruptedRunError
from lomo_core.evaluate import Evaluator
from lomo_core.events import Checkpoint, Evaluation, Finished, Started, Step
from lomo_core.execute.plain import PlainExecutor, StepResult
from lomo_core.journal import Journal
from lomo_core.memory.meter import Meter
from lomo_core.model import (
    describe_device,
    enable_activation_checkpointing,
    load_model,
    load_tokenizer,
    pick_device,
    weights_sha256,
)
from lomo_core.model_folder import read_model_folder
from lomo_core.oom import out_of_memory_named
from lomo_core.optim import AdaLomo, Lomo
from lomo_core.optim.fused import FusedOptimizer
from lomo_core.schedule import scale_at, warmup_steps
from lomo_core.seeding import mix
from lomo_core.stop import StopRequest

# Below it plain SGD hardly moves (arXiv 2306.09782 uses 5e-4 to 5e-2): the rate of somebody who is used to Adam.
_ADAM_SCALE = 1e-4
_MAX_SKIPPED_IN_A_ROW = 5
# Keeps the generator's seed for dropout apart from the seed's other uses.
_DROPOUT = 4
# Fields that change where or how often something is written, but no number of the run.
_NOT_OF_THE_RUN = (
    "run_dir",
    "model_path",
    "data",
    "resume_from",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "eval_every_steps",
)


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
        self._checkpoint_dir = Path(config.run_dir) / "checkpoints"
        self._step = 0
        self._saved_step = -1
        self._num_trained_tokens = 0
        self._num_skipped = 0
        self._last_loss: float | None = None
        self._last_evaluation: Evaluation | None = None
        self._build()

    def run(self) -> None:
        """Train from where the run stands to its end, and write the tuned model."""
        try:
            if self._step == 0:
                self._evaluate()
            while self._step < self._total_steps:
                self._stop.raise_if_requested()
                self._train_step()
                if self._is_due(self._config.eval_every_steps) or self._step == self._total_steps:
                    self._evaluate()
                if self._is_due(self._config.checkpoint_every_steps):
                    self._save_checkpoint()
            self._stop.raise_if_requested()
        except InterruptedRunError as error:
            raise self._interrupted() from error
        self._finish()

    # -- build ----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        config = self._config
        folder = read_model_folder(config.model_path)
        self._warn_about_rate(config.optimizer)
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
        self._stop.raise_if_requested()
        self._evaluator = self._build_evaluator(watch)
        self._stop.raise_if_requested()
        self._total_steps = config.n_epochs * self._data.batches_per_epoch
        if config.max_steps is not None:
            self._total_steps = min(self._total_steps, config.max_steps)
        self._warmup = warmup_steps(self._total_steps, config.schedule.warmup_ratio)
        self._run_sha256 = run_sha256(config)
        found = self._find_checkpoint()
        source = config.model_path if found is None else found[0]
        with out_of_memory_named("while loading the model", lambda: None):
            self._model = load_model(source, precision=config.precision, device=self._device)
        if config.data.packing:
            check_packing(self._model)
        self._check_fits(folder.config)
        if config.activation_checkpointing and not enable_activation_checkpointing(self._model):
            self._journal.say("warn", "this architecture has no activation checkpointing: the setting has no effect")
        self._optimizer = build_optimizer(config.optimizer, self._model, seed=config.seed)
        if found is not None:
            self._resume(*found)
        self._meter = Meter(self._model, self._optimizer, self._device)
        self._executor = PlainExecutor(self._model, self._optimizer, self._meter)
        self._announce()

    def _build_evaluator(self, watch: Watch) -> Evaluator | None:
        data = self._config.data
        if data.validation_path is None:
            return None
        return Evaluator(data, self._tokenizer, cache_dir=cache_dir_of(data, self._config.run_dir), watch=watch)

    def _warn_about_rate(self, optimizer: OptimizerConfig) -> None:
        if optimizer.name == "lomo" and optimizer.learning_rate < _ADAM_SCALE:
            self._journal.say(
                "warn",
                f"learning_rate {optimizer.learning_rate:g} is of Adam's scale: LOMO is SGD and needs about "
                "5e-4 to 5e-2; at this rate the model hardly changes",
            )

    def _find_checkpoint(self) -> tuple[Path, checkpoints.TrainerState] | None:
        """The first valid checkpoint of those given; each rejected one is reported."""
        for name in self._config.resume_from:
            self._stop.raise_if_requested()
            path = Path(name)
            try:
                return path, checkpoints.verify_checkpoint(path, run_sha256=self._run_sha256)
            except CheckpointError as error:
                self._journal.say("warn", f"checkpoint {path.name} is not used: {error.message}")
        if self._config.resume_from:
            self._journal.say("warn", "no checkpoint is valid: the run begins anew at step 0")
        return None

    def _check_fits(self, model_config: dict[str, Any]) -> None:
        longest = self._data.counts.longest_row
        limit = (model_config.get("text_config") or model_config).get("max_position_embeddings")
        if isinstance(limit, int) and longest > limit:
            raise ConfigError(
                f"the longest row has {longest} tokens but the model takes {limit}: "
                f"set max_seq_length to {limit} or less",
                param="max_seq_length",
            )
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        highest = self._data.counts.highest_token_id
        if highest >= vocabulary:
            raise ConfigError(
                f"the tokenizer gives token {highest} but the model has {vocabulary}: they do not belong together",
                param="model",
            )

    def _resume(self, path: Path, state: checkpoints.TrainerState) -> None:
        checkpoints.load_optimizer(path, self._optimizer, state)
        self._step = self._saved_step = state.step
        self._num_trained_tokens = state.num_trained_tokens
        self._journal.say("info", f"resumed from checkpoint {path.name}")

    def _announce(self) -> None:
        self._stop.raise_if_requested()
        device, device_bytes = describe_device(self._device)
        self._journal.write(
            Started(
                step=self._step,
                total_steps=self._total_steps,
                num_parameters=sum(p.numel() for p in self._model.parameters()),
                num_train_rows=self._data.counts.num_rows,
                num_truncated_rows=self._data.counts.num_truncated,
                num_trainable_tokens=self._data.counts.num_trained,
                device=device,
                device_bytes=device_bytes,
            )
        )

    # -- train ----------------------------------------------------------------------------------------------------

    def _is_due(self, every: int) -> bool:
        return every > 0 and self._step % every == 0

    def _train_step(self) -> None:
        start = time.perf_counter()
        config, step = self._config, self._step
        rate = config.optimizer.learning_rate * scale_at(
            config.schedule.name, step=step, total_steps=self._total_steps, warmup=self._warmup
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(mix(config.seed, step, _DROPOUT))
        with out_of_memory_named(f"in step {step + 1}", lambda: self._meter.last):
            self._meter.begin_step()
            batch = self._data.batch(step).to(self._device)
            result = self._executor.run([batch])
            memory = self._meter.end_step()
        self._step += 1
        self._num_trained_tokens += batch.num_trained
        grad_norm = self._optimizer.last_grad_norm
        seconds = time.perf_counter() - start
        self._last_loss = result.loss
        self._journal.write(
            Step(
                step=self._step,
                total_steps=self._total_steps,
                epoch=self._step / self._data.batches_per_epoch,
                loss=result.loss,
                mean_token_accuracy=result.num_correct / batch.num_trained,
                learning_rate=rate,
                grad_norm=grad_norm,
                num_tokens=batch.num_tokens,
                num_trained_tokens=self._num_trained_tokens,
                step_s=seconds,
                tokens_per_s=batch.num_tokens / seconds,
                memory=memory,
            )
        )
        self._check_finite(result, grad_norm)

    def _check_finite(self, result: StepResult, grad_norm: float | None) -> None:
        """Say that a step was skipped; end the run where that does not help.

        Raises:
            DivergedError: more than five steps in a row were skipped, or weights have taken a gradient that is not
            finite.
        """
        cure = "a lower learning_rate, or clipping by norm, may help"
        if result.is_applied:
            self._num_skipped = 0
            if grad_norm is not None and not math.isfinite(grad_norm):
                raise DivergedError(f"the gradient of step {self._step} is not finite: {cure}")
            return
        self._num_skipped += 1
        if self._num_skipped > _MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(f"loss or gradient stayed non-finite until step {self._step}: {cure}")
        what = "loss" if not math.isfinite(result.loss) else "gradient"
        self._journal.say("warn", f"step {self._step} was skipped: its {what} is not finite")

    def _evaluate(self) -> None:
        if self._evaluator is None:
            return
        with out_of_memory_named("in evaluation", lambda: self._meter.last):
            found = self._evaluator.run(self._model, step=self._step, check=self._stop.raise_if_requested)
        self._last_evaluation = found
        self._journal.write(found)

    # -- close ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        state = checkpoints.TrainerState(
            step=self._step,
            run_sha256=self._run_sha256,
            num_trained_tokens=self._num_trained_tokens,
            optimizer_step=self._optimizer.num_steps,
            optimizer_seed=self._config.seed,
            versions={module.__name__: module.__version__ for module in (torch, transformers, safetensors, numpy)},
        )
        saved = checkpoints.save_checkpoint(
            self._checkpoint_dir / f"step-{self._step}",
            model=self._model,
            tokenizer=self._tokenizer,
            optimizer=self._optimizer,
            state=state,
        )
        self._saved_step = self._step
        checkpoints.prune_checkpoints(self._checkpoint_dir, keep=self._config.keep_checkpoints)
        evaluation = self._last_evaluation
        is_fresh = evaluation is not None and evaluation.step == self._step
        self._journal.write(
            Checkpoint(
                step=self._step,
                path=str(saved.path),
                manifest_sha256=saved.manifest_sha256,
                num_bytes=saved.num_bytes,
                train_loss=self._last_loss,
                valid_loss=evaluation.valid_loss if is_fresh and evaluation is not None else None,
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
        path = Path(self._config.run_dir) / "model"
        checkpoints.save_final_model(path, model=self._model, tokenizer=self._tokenizer, step=self._step)
        self._journal.write(
            Finished(
                step=self._step,
                model_path=str(path),
                weights_sha256=weights_sha256(self._model),
                num_trained_tokens=self._num_trained_tokens,
                peak_bytes=self._meter.run_peak_bytes,
                seconds=time.monotonic() - self._start,
            ),
            durable=True,
        )


def build_optimizer(config: OptimizerConfig, model: torch.nn.Module, *, seed: int) -> FusedOptimizer:
    """The optimizer of a run over all parameters of a model."""
    cls = {"lomo": Lomo, "adalomo": AdaLomo}[config.name]
    return cls(
        model.parameters(),
        config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=None if config.clip.mode == "none" else config.clip.threshold,
        clip_mode=config.clip.mode,
        rounding=config.rounding,
        seed=seed,
    )


def run_sha256(config: TrainConfig) -> str:
    """Hash of everything that decides a run's numbers; only checkpoints with the same one are gone on from."""
    deciding: dict[str, Any] = {key: value for key, value in asdict(config).items() if key not in _NOT_OF_THE_RUN}
    deciding["max_seq_length"] = config.data.max_seq_length
    deciding["train_on"] = config.data.train_on
    deciding["format"] = config.data.format
    deciding["packing"] = config.data.packing
    deciding["train_sha256"] = checkpoints.sha256_of_file(Path(config.data.train_path))
    deciding["model_sha256"] = checkpoints.sha256_of_file(Path(config.model_path) / "config.json")
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
