"""A whole training step on tensors without storage, followed by torch's own memory tracker.

A second opinion on `lomo_core/memory/plan.py`, which puts a step together from one block's trace and formulas. Here the
model runs as a whole, through the engine's executor, head and optimizer, under `FakeTensorMode`; what is alive is
counted by `torch.distributed._tools.mem_tracker.MemTracker`, which shares no code with `lomo_core/memory/trace.py`.

Fake tensors have no values, so `_Answers` says what only data could: every token has a loss, all tokens differ, every
check for finite numbers passes. Not seen, as in the plan: scratch inside of an operation, and the allocator's own.
"""

from __future__ import annotations

import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from lomo_core.config import BASELINES
from lomo_core.data.batches import Batch
from lomo_core.execute.plain import PlainExecutor
from lomo_core.memory.meter import Meter
from lomo_core.memory.plan import Setting
from lomo_core.memory.shapes import _build, _one_sequence_per_row
from lomo_core.model import DTYPES, enable_activation_checkpointing
from lomo_core.optim import AdaLomo, Lomo
from lomo_core.optim.baselines import Baseline, BaselineName

_RATE = 1e-4
_FP32 = 4
_TOTAL = "Total"  # MemTracker's key
_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Tracked:
    """A step's memory; compare `plan.Plan`. The batch's own tensors are left out of all three."""

    activations_bytes: int
    """Alive after the forward pass beside what was alive before."""
    peak_bytes: int
    """Parameters, buffers and optimizer state included."""
    after_step_bytes: int
    """What the step leaves: moments, the update's scratch."""
    seconds: float


def track_step(architecture: Any, setting: Setting, *, has_updates: bool = True) -> Tracked:
    """Run a step of a model that is built from its configuration. Without updates gradients are dropped when they are
    complete (the update of LLaMA-7B walks over 26,000 blocks, and shows nothing but its few MB of scratch).

    Raises:
        ValueError: rows of unequal length, or tokens without a loss: here all are equal and trained.
    """
    if setting.is_padded or setting.trained_share != 1:
        raise ValueError("a step without data has rows of one length, and a loss at every token")
    start = time.perf_counter()
    with FakeTensorMode(allow_non_fake_inputs=True), _one_sequence_per_row():
        model = _build(architecture, DTYPES[setting.precision])
        if setting.activation_checkpointing:
            enable_activation_checkpointing(model)
        optimizer = _optimizer(setting, model)
        meter = _TrackedMeter()
        answers = _Answers()  # type: ignore[no-untyped-call]  # see its class
        with answers:
            executor = PlainExecutor(model, optimizer, meter)
        batch = _batch(setting)
        tensors = [batch.input_ids, batch.position_ids, batch.labels]
        meter.tracker.track_external(model, *tensors)
        # Moments come with the first step, and are there from the beginning of the second. LOMO has none; its scratch
        # comes before the largest moment.
        for _ in range(1 if setting.optimizer == "lomo" else 2):
            # Its figures by module hold one forward pass each.
            meter.tracker.reset_mod_stats()
            with warnings.catch_warnings(), meter.tracker, answers:
                # Its hooks come after the optimizer's, which has dropped the gradient.
                warnings.filterwarnings("ignore", message="Expected a tensor or a traceable")
                meter.begin()
                with nullcontext() if has_updates else optimizer.probing():
                    executor.run([batch])
        data_bytes = sum(tensor.nbytes for tensor in tensors)
        peak = _total(meter.tracker, "peak") - data_bytes
        left = meter.live()
    return Tracked(meter.activations_bytes, peak, left, time.perf_counter() - start)


class _Tracker(MemTracker):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Without figures by module, which would be looked through after each operation."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        self.memory_tracking, by_module = WeakIdKeyDictionary(), self.memory_tracking
        super()._update_peak_stats(peak_state)
        self.memory_tracking = by_module


class _TrackedMeter(Meter):
    """The engine's meter as the executor sees it, with the tracker's count in the place of the heap's."""

    def __init__(self) -> None:
        self.tracker = _Tracker()
        self.activations_bytes = 0
        self._begin_bytes = 0
        self._is_sampled = False

    def begin(self) -> None:
        """The step begins: model and batch are there."""
        self._begin_bytes = _total(self.tracker, "current")

    def live(self) -> int:
        """Bytes alive that were not when the step began."""
        return _total(self.tracker, "current") - self._begin_bytes

    def forward_done(self) -> None:
        """Note what the forward pass has left alive."""
        self.activations_bytes = self.live()

    def backward_done(self) -> None:
        """Nothing is asked here."""


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Answers in the place of data; on top of the fake and the tracking mode, so that what it makes is tracked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation's result, made up where it depends on values."""
        if func is _aten._local_scalar_dense.default:  # noqa: SLF001 - torch's name of `item()`
            # Flags are set and floats finite. Whole numbers count rows that wait, which are only copied.
            return {torch.bool: True, torch.int64: 0}.get(args[0].dtype, 1.0)
        if func is _aten.equal.default:
            return True
        if func is _aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if func is _aten._unique2.default:  # noqa: SLF001 - torch's name of `unique()`
            # (values, places, counts). Who asks for places wants to have few values (`NoisePool.round_rows_`).
            values, returns_places = args[0], args[2:3] == (True,)
            sizes = (1, values.shape, 0) if returns_places else (values.numel(), 0, 0)
            return tuple(values.new_empty(size) for size in sizes)
        return func(*args, **(kwargs or {}))


def _batch(setting: Setting) -> Batch:
    ids, positions, labels = (torch.empty(setting.batch_size, setting.seq_length, dtype=torch.int64) for _ in range(3))
    num_tokens = ids.numel()
    return Batch(ids, None, positions, labels, num_tokens=num_tokens, num_trained=num_tokens)


def _optimizer(setting: Setting, model: Any) -> Any:
    if setting.optimizer in BASELINES:
        name = cast(BaselineName, setting.optimizer)
        return Baseline(name, model.parameters(), _RATE)
    rule = Lomo if setting.optimizer == "lomo" else AdaLomo
    rounding = setting.rounding if setting.itemsize < _FP32 else "nearest"
    # Clipped by value: in one pass, with the scratch that clipping needs, and in rows.
    return rule(model.parameters(), _RATE, rounding=rounding, max_grad_norm=1.0, clip_mode="value")


def _total(tracker: MemTracker, kind: str) -> int:
    return sum(int(categories[_TOTAL]) for categories in tracker.get_tracker_snapshot(kind).values())
