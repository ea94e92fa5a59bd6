"""Which way to the exact global norm is the fastest on this machine: a second backward pass, or gradients put aside.

LOMO's update happens inside the backward pass, but the norm is known only at its end (arXiv 2306.09782, section 3.2).
With N parameters, T tokens per step and b bytes per gradient element, the ways cost beside the step itself:

- second backward: 4 N T FLOP, and 2 N T more where activations are recomputed (arXiv 2001.08361, section 2.1: a forward
  pass takes 2 N per token, a backward pass twice that);
- putting aside: b N bytes written and read once each.

Results are bit-identical, so that the choice may differ from machine to machine and from attempt to attempt.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import torch

ExactWay = Literal["second_backward", "spill_memory", "spill_file"]

# Below it every way takes milliseconds, and measuring would take longer than it could save.
SMALLEST_CHOICE_BYTES = 64 * 2**20
# What the process, its page cache and others on the host need beside the gradients.
_SPARE_BYTES = 2 * 2**30
_PROBE_BYTES = 32 * 2**20
# Side of the square matrices: large enough to be bound by arithmetic, 50 ms on one CPU core (2 n^3 FLOP).
_SIDE = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpeed:
    """What a machine can do. Bytes per second are one way, from where the gradients are."""

    flop_per_s: float
    memory_bytes_per_s: float
    disk_bytes_per_s: float
    free_memory_bytes: int
    """Host memory that gradients may take: 0 where the weights are in it too, because LOMO's point is to save it."""
    free_disk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """What a step of the run is."""

    num_parameters: int
    gradient_bytes: int
    """Of all gradients together."""
    tokens_per_step: float
    recomputes: bool
    """Activation checkpointing: a backward pass computes each block's forward once more."""


def choose_exact_clipping(step: StepCost, host: HostSpeed) -> tuple[ExactWay, dict[ExactWay, float]]:
    """The fastest way that there is room for, and the seconds per step of each one that there is room for."""
    flop = (6 if step.recomputes else 4) * step.num_parameters * step.tokens_per_step
    seconds: dict[ExactWay, float] = {"second_backward": flop / host.flop_per_s}
    if host.free_memory_bytes >= step.gradient_bytes + _SPARE_BYTES:
        seconds["spill_memory"] = 2 * step.gradient_bytes / host.memory_bytes_per_s
    if host.free_disk_bytes >= step.gradient_bytes + _SPARE_BYTES:
        seconds["spill_file"] = 2 * step.gradient_bytes / host.disk_bytes_per_s
    return min(seconds, key=seconds.__getitem__), seconds


def measure_host(device: torch.device, dtype: torch.dtype, folder: Path) -> HostSpeed:
    """Measure with one matrix product, one copy and one small file in `folder`; well under a second together."""
    memory = 0 if device.type == "cpu" else available_memory_bytes()
    return HostSpeed(
        flop_per_s=_flop_per_s(device, dtype),
        memory_bytes_per_s=_copy_bytes_per_s(device) if memory else 1.0,
        disk_bytes_per_s=_write_bytes_per_s(folder),
        free_memory_bytes=memory,
        free_disk_bytes=shutil.disk_usage(folder).free,
    )


def _flop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    side = _SIDE.get(device.type, _SIDE["cpu"])
    a = torch.ones(side, side, dtype=dtype, device=device)
    return 2 * side**3 / _seconds(lambda: a @ a, device)


def _copy_bytes_per_s(device: torch.device) -> float:
    source = torch.ones(_PROBE_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source, device="cpu")
    return _PROBE_BYTES / _seconds(lambda: target.copy_(source), device)


def _write_bytes_per_s(folder: Path) -> float:
    data = bytes(_PROBE_BYTES)
    with TemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        file.write(data)
        os.fsync(file.fileno())
        return _PROBE_BYTES / (time.perf_counter() - start)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second call: the first loads kernels and touches memory."""
    work()
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_memory_bytes() -> int:
    """`MemAvailable` of proc(5); 0 where it is not known."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
