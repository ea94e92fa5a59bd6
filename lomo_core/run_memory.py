"""What a run's memory is to be, what it turns out to be, and what to change where it does not suffice.

A job is planned before anything of it is loaded (`memory/plan.py`), hence with assumptions: rows of full length, a loss
on every token, the exact norm by a second backward pass. The engine knows its data and its model, so that its own plan
is of what will really run: the longest batch of the run, with the mask that it needs and the tokens that have a loss.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lomo_core.build import Training
from lomo_core.config import TrainConfig
from lomo_core.data.batches import IGNORE, Batch
from lomo_core.data.order import batch_width
from lomo_core.disk_full import disk_full_named
from lomo_core.events import MemoryBytes, MemoryVerdict
from lomo_core.head import accepted_arguments
from lomo_core.journal import Journal
from lomo_core.memory.fit import Fitting, nearest_that_fits
from lomo_core.memory.model_shapes import ModelShapes
from lomo_core.memory.plan import Norm, Plan, Setting, plan
from lomo_core.memory.process import TYPICAL, Calibration, added_bytes, as_measured
from lomo_core.oom import Suggestion

# In the run's folder and not in the model's: equal runs have equal models, manifest included, and not equal peaks.
VERDICT_NAME = "memory.json"
# Of what a step held when memory ran out: plans are right to 5 % (bench/bench_memory.py).
_CAPACITY_SHARE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """What of a batch decides a step's memory."""

    rows: int
    width: int
    is_masked: bool
    """Whether attention needs a mask [B, 1, T, T]: a row is padded, or several are packed in one (transformers cuts it
    where positions begin anew, by a mask of the same size)."""
    trained_tokens: int
    trained_columns: int
    """Those in which any row has a token with a loss."""

    @classmethod
    def of(cls, batch: Batch) -> BatchShape:
        """A batch's shape."""
        rows, width = batch.input_ids.shape
        if batch.attention_mask is None:
            is_masked = bool((batch.position_ids.diff(dim=-1) != 1).any())
        else:
            is_masked = not bool(batch.attention_mask.all())
        # A label belongs to the column before it: the first one has none.
        targets = batch.labels[:, 1:] != IGNORE
        return cls(
            rows=rows,
            width=width,
            is_masked=is_masked,
            trained_tokens=int(targets.sum()),
            trained_columns=int(targets.any(dim=0).sum()),
        )


class RunMemory:
    """The plan of one run. Without shapes nothing is planned; everything else goes on without it.

    Frozen parameters have no gradients, and nothing is kept for them: with them the plan is an upper bound.
    """

    def __init__(
        self,
        config: TrainConfig,
        longest: BatchShape | None,
        *,
        longest_row: int,
        device: torch.device,
        journal: Journal,
    ) -> None:
        """`longest` is the batch with the most cells of those to come; None where none is. `longest_row`: tokens of the
        longest row of all."""
        self._config = config
        self._longest = longest
        self._widest = batch_width(config.data.max_seq_length if config.data.packing else longest_row)
        self._is_on_host = device.type == "cpu"
        self._journal = journal
        given = config.calibration
        self._calibration = (
            TYPICAL
            if given is None
            else Calibration(base_bytes=given.base_bytes, libraries_bytes=given.libraries_bytes)
        )
        self._highest: tuple[int, MemoryBytes] | None = None
        self._shapes = None if longest is None else self._read_shapes()
        self._foreseen = None if longest is None else self._foresee(self._assumed_setting(longest))

    @property
    def planned(self) -> MemoryBytes | None:
        """The step of the longest batch, as the meter will measure it; None where it is not known."""
        return None if self._foreseen is None else self._as_measured(self._foreseen.plan)

    def settle(self, training: Training, *, starts_with_longest: bool) -> None:
        """Plan with what is known once the model is loaded; warns where that cannot be planned.

        `starts_with_longest`: the longest batch is the next step's.
        """
        if self._shapes is None or self._longest is None:
            return
        refusal = _refusal(self._shapes, training.model)
        if refusal is not None:
            self._give_up(refusal)
            return
        setting = replace(
            self._assumed_setting(self._longest),
            attention=training.model.config._attn_implementation,  # noqa: SLF001 - there is no public reader of it
            norm=self._norm(training, starts_with_longest=starts_with_longest),
        )
        if training.executor.has_own_head:
            share = _share_of_logits(training.model, self._longest)
            setting = replace(setting, head="logits", trained_share=share)
        self._foreseen = self._foresee(setting)

    # -- the verdict ----------------------------------------------------------------------------------------------

    def note_step(self, step: int, memory: MemoryBytes) -> None:
        """A step is done, the `step`th."""
        if self._highest is None or memory.peak_bytes > self._highest[1].peak_bytes:
            self._highest = step, memory

    def judge(self) -> MemoryVerdict | None:
        """The plan beside the steps so far; None without one of both. Also written to `memory.json`.

        Raises:
            DiskFullError: there is no room for it.
        """
        planned = self.planned
        if planned is None or self._highest is None:
            return None
        step, measured = self._highest
        verdict = MemoryVerdict(
            step=step, planned=planned, measured=measured, ratio=planned.peak_bytes / measured.peak_bytes
        )
        with disk_full_named(VERDICT_NAME):
            text = json.dumps(asdict(verdict), indent=2)
            (Path(self._config.run_dir) / VERDICT_NAME).write_text(text, encoding="utf-8")
        return verdict

    # -- what would fit -------------------------------------------------------------------------------------------

    def suggest(self, held: MemoryBytes) -> Suggestion | None:
        """The least change after which the run fits into what a step held when memory ran out; None without a plan, or
        where nothing would do."""
        if self._shapes is None or self._foreseen is None:
            return None
        failed, shapes = self._foreseen, self._shapes
        added = self._added_bytes(failed.plan)
        # Never the setting that failed, also where its plan is below what it came to hold.
        capacity = round(_CAPACITY_SHARE * min(held.peak_bytes - added, failed.plan.peak_bytes))
        same = nearest_that_fits(shapes, failed.setting, capacity)
        if same is not None and _has_same_batches(same.setting, failed.setting):
            return self._suggestion(same, failed.setting)
        # Other batches are made of other rows: any may be the longest one, padded, with a loss on every token.
        cautious = replace(
            failed.setting, seq_length=self._widest, trained_share=1.0, is_padded=True, masks_one_row=True
        )
        found = nearest_that_fits(shapes, cautious, capacity)
        return None if found is None else self._suggestion(found, cautious)

    def _suggestion(self, found: Fitting, given: Setting) -> Suggestion | None:
        changes = found.changes(given)
        if self._shapes is not None and not self._shapes.is_checkpointable:
            changes.pop("activation_checkpointing", None)
        return Suggestion(changes, self._peak_bytes(found.plan)) if changes else None

    # -- the plan -------------------------------------------------------------------------------------------------

    def _read_shapes(self) -> ModelShapes | None:
        path = self._config.shapes_path
        if path is None:
            return None
        try:
            return ModelShapes.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self._give_up(str(error))
            return None

    def _give_up(self, reason: str) -> None:
        self._shapes = self._foreseen = None
        self._journal.say("warn", f"the run's memory is not planned: the model's shapes cannot be used ({reason})")

    def _foresee(self, setting: Setting) -> Fitting | None:
        if self._shapes is None:
            return None
        try:
            return Fitting(setting, plan(self._shapes, setting))
        except ValueError as error:
            self._give_up(str(error))
            return None

    def _as_measured(self, found: Plan) -> MemoryBytes:
        return as_measured(found, added_bytes=self._added_bytes(found))

    def _peak_bytes(self, found: Plan) -> int:
        """Of the process on a CPU host, of the allocator elsewhere: what the meter calls the peak."""
        return found.peak_bytes + self._added_bytes(found)

    def _added_bytes(self, found: Plan) -> int:
        return added_bytes(found, self._calibration) if self._is_on_host else 0

    # -- its setting ----------------------------------------------------------------------------------------------

    def _assumed_setting(self, longest: BatchShape) -> Setting:
        """What is known of the run before its model is loaded."""
        config = self._config
        return Setting(
            optimizer=config.optimizer.name,
            precision=config.precision,
            batch_size=longest.rows,
            seq_length=longest.width,
            activation_checkpointing=config.activation_checkpointing,
            is_padded=longest.is_masked,
            masks_one_row=longest.is_masked,
            trained_share=longest.trained_tokens / (longest.rows * longest.width),
            norm=self._assumed_norm(),
            # A baseline's plan does not depend on it, but on that of LOMO in its place.
            rounding=config.optimizer.rounding or "stochastic",
        )

    def _assumed_norm(self) -> Norm:
        """The way to the exact norm that takes the most memory of those that may be taken. Of a baseline: LOMO's in its
        place."""
        clip = self._config.optimizer.clip
        if clip.mode != "norm" and self._config.precision != "fp16":
            return "one_pass"
        return "second_backward" if clip.exact == "auto" else clip.exact

    def _norm(self, training: Training, *, starts_with_longest: bool) -> Norm:
        optimizer = self._config.optimizer
        if optimizer.is_baseline:
            return self._assumed_norm()
        # `delayed` has no norm of a step before at the first one, and gets it as `norm` does.
        is_first = starts_with_longest and training.optimizer.num_steps == 0
        if optimizer.clip.mode == "delayed" and is_first:
            return "second_backward"
        return training.way or "one_pass"


def _has_same_batches(setting: Setting, other: Setting) -> bool:
    return (setting.batch_size, setting.seq_length) == (other.batch_size, other.seq_length)


def _refusal(shapes: ModelShapes, model: Any) -> str | None:
    """Why shapes are not those of a loaded model; None where they are."""
    architecture, num_parameters = type(model).__name__, sum(parameter.numel() for parameter in model.parameters())
    if (shapes.architecture, shapes.num_parameters) != (architecture, num_parameters):
        return (
            f"they are of a {shapes.architecture} with {shapes.num_parameters:,} parameters, and this is a "
            f"{architecture} with {num_parameters:,}"
        )
    return None


def _share_of_logits(model: Any, longest: BatchShape) -> float:
    """Of the batch's tokens, those whose logits are made where the model's own head makes them (head.py): whole
    columns."""
    if "logits_to_keep" not in accepted_arguments(model):
        return 1.0
    return longest.trained_columns / longest.width
