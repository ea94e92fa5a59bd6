"""Measures each step's memory by category, cheaply enough to be always on (well under 1 ms a step), and some steps' by
phase.

- parameters: storages of the model's parameters, each once.
- gradients: the optimizer's high-water mark, counted in its hooks.
- optimizer: bytes of its moments.
- activations: what the forward pass leaves behind for the backward pass, logits and loss included: the growth of the
  live heap (CPU, glibc's `mallinfo2`: exact to the tensor, 0.8 us a call) or of the allocator's counter (CUDA) from the
  start of the step to the end of its forward pass. What a checkpointed block recomputes later is in `other`.
- peak: the largest moment of the step. CUDA: the allocator's maximum. Linux: the kernel's high-water mark of the
resident
  set, reset at the start of the step through `/proc/self/clear_refs` (where that is refused: since the process began).
- other: the rest of the peak. On the CPU this holds the interpreter and the libraries, several hundred MB.

Every `METER_EVERY_STEPS` steps, from the first one on, a step is sampled: what is alive at the end of its forward pass,
of its backward pass and of the step (the same counters), and, tensor by tensor, what autograd keeps (`saved.py`), which
is the part of the activations that can be explained.
"""

from __future__ import annotations

import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from lomo_core.events import MemoryBytes, MemoryProfile
from lomo_core.memory.allocator import find_live_heap_bytes
from lomo_core.memory.saved import SavedTensors
from lomo_core.model import parameter_bytes
from lomo_core.optim.fused import state_bytes
from lomo_core.optim.protocol import RunOptimizer

# Sampling takes 1 to 7 % of a short step (bench/bench_meter.py): one in 50 adds a thousandth. It is also a line in the
# run's log, of which a reader wants few.
METER_EVERY_STEPS = 50
_CLEAR_REFS = "/proc/self/clear_refs"
_STATUS = "/proc/self/status"
# Of the file, at most; it has about 1.5 kB.
_STATUS_BYTES = 1 << 14
# proc(5): writing 5 resets the peak resident set size to the current one.
_RESET_PEAK = b"5"
# getrusage(2) reports kilobytes on Linux and bytes on macOS.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Meter:
    """Call `begin_step`, `forward_done`, `backward_done`, `end_step` in this order, the forward pass inside of
    `forward()`."""

    def __init__(self, model: nn.Module, optimizer: RunOptimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._device = device
        self._parameters_bytes = parameter_bytes(model)
        self._live = live_bytes_function(device)
        self._can_sample = device.type == "cuda" or find_live_heap_bytes() is not None
        self._saved = SavedTensors(model)
        self._num_steps = 0
        self._is_sampled = False
        self._start_bytes = 0
        self._activations_bytes = 0
        self._after_backward_bytes = 0
        self._after_step_bytes = 0
        self.run_peak_bytes = 0
        self.last: MemoryBytes | None = None

    def begin_step(self, *, is_trial: bool = False) -> None:
        """Reset the high-water marks. A trial is no step of the run: it is never sampled."""
        self._is_sampled = self._can_sample and not is_trial and self._num_steps % METER_EVERY_STEPS == 0
        self._num_steps += not is_trial
        self._optimizer.peak_gradient_bytes = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            reset_resident_peak()
        self._activations_bytes = self._after_backward_bytes = self._after_step_bytes = 0
        self._start_bytes = self._live()

    def forward(self) -> AbstractContextManager[None]:
        """Around the forward pass: what it saves is counted where the step is sampled."""
        return self._saved.counting() if self._is_sampled else nullcontext()

    def forward_done(self) -> None:
        """Note what the forward pass has left alive."""
        self._activations_bytes = max(0, self._live() - self._start_bytes)

    def backward_done(self) -> None:
        """Note what the backward pass has left alive."""
        if self._is_sampled:
            self._after_backward_bytes = self._live() - self._start_bytes

    def broken_off(self) -> MemoryBytes:
        """The memory of a step that has failed, as far as it came; call it while its tensors are still alive."""
        if not self._activations_bytes:
            self.forward_done()
        return self.end_step()

    def end_step(self) -> MemoryBytes:
        """The step's memory."""
        if self._is_sampled:
            self._after_step_bytes = self._live() - self._start_bytes
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else resident_peak_bytes()
        known = (
            self._parameters_bytes,
            self._optimizer.peak_gradient_bytes,
            state_bytes(self._optimizer),
            self._activations_bytes,
        )
        self.run_peak_bytes = max(self.run_peak_bytes, peak)
        self.last = MemoryBytes(
            parameters_bytes=known[0],
            gradients_bytes=known[1],
            optimizer_bytes=known[2],
            activations_bytes=known[3],
            other_bytes=max(0, peak - sum(known)),
            peak_bytes=peak,
        )
        return self.last

    def find_profile(self, *, step: int) -> MemoryProfile | None:
        """Of the step that has ended, which is number `step`; None where it was not sampled."""
        if not self._is_sampled:
            return None
        return MemoryProfile(
            step=step,
            after_forward_bytes=self._activations_bytes,
            after_backward_bytes=self._after_backward_bytes,
            after_step_bytes=self._after_step_bytes,
            saved_bytes=self._saved.num_bytes,
        )


def live_bytes_function(device: torch.device) -> Any:
    """A function that returns the bytes alive on the device: exact on CUDA and glibc, always 0 elsewhere."""
    if device.type == "cuda":
        return lambda: torch.cuda.memory_allocated(device)
    return lambda: find_live_heap_bytes() or 0


def reset_resident_peak() -> bool:
    """Set the process's peak resident set to the current one; False where the system does not allow it."""
    try:
        file = os.open(_CLEAR_REFS, os.O_WRONLY)
    except OSError:
        return False
    try:
        os.write(file, _RESET_PEAK)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def resident_peak_bytes() -> int:
    """Peak resident set of this process since the last reset."""
    # Every step asks: as plain bytes, since reading and splitting the file as text takes three times as long.
    try:
        file = os.open(_STATUS, os.O_RDONLY)
    except OSError:
        return _maximum_of_run()
    try:
        status = os.read(file, _STATUS_BYTES)
    finally:
        os.close(file)
    _, found, rest = status.partition(b"VmHWM:")
    return int(rest.split(maxsplit=1)[0]) * 1024 if found else _maximum_of_run()


def _maximum_of_run() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
