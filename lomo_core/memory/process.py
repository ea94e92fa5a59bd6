"""From a plan's tensors to a process's memory on a CPU host: what the interpreter, the libraries and the heap add.

    process = base + libraries + plan + holes + gradients put aside in host memory

- base: resident after the imports, before a model; 330 MB here.
- libraries: code and tables that the first step of any model brings (oneDNN, MKL, generated kernels).
- holes: free memory between what is in use. `allocator.HeapWatch` keeps it below a limit; small steps cannot fill it.

The first two are measured once per host, by a step of a tiny model. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from lomo_core.events import MemoryBytes
from lomo_core.memory.plan import Plan

# At which allocator.py trims the heap. Peak above the weights and CPU seconds of a step of SmolLM2 at 2 x 512 with
# activation checkpointing: limit 32 MiB 156 MiB and 16.5 s in fp32, 105 and 9.8 in bf16; 56 MiB 165 and 15.3, 115 and
# 8.5; none 416 and 14.8, 167 and 8.2.
MOST_HOLES_BYTES = 56 * 2**20
# Of what comes and goes in a step: the share that is in holes at the peak; between 0.1 and 1 in nine settings of
# bench/bench_memory.py, where a share of the largest phase up to the limit was off by at most 38 MB.
_HOLES_SHARE = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a host adds to every run."""

    base_bytes: int
    libraries_bytes: int

    @classmethod
    def of_step(cls, *, base_bytes: int, process_peak_bytes: int, tiny: Plan) -> Calibration:
        """From a step of a tiny model: what is left of its peak beside base, plan and holes is the libraries'."""
        rest = process_peak_bytes - base_bytes - tiny.peak_bytes - holes_bytes(tiny)
        return cls(base_bytes=base_bytes, libraries_bytes=max(0, rest))


# Of the CPU host that the benchmarks ran on, torch 2.13 and transformers 5.23; a host's own are better.
TYPICAL = Calibration(base_bytes=330 * 2**20, libraries_bytes=45 * 2**20)


def process_peak_bytes(plan: Plan, calibration: Calibration) -> int:
    """The largest resident set of a run's process."""
    return added_bytes(plan, calibration) + plan.peak_bytes


def added_bytes(plan: Plan, calibration: Calibration) -> int:
    """What the process holds at its peak beside the plan's own."""
    return calibration.base_bytes + calibration.libraries_bytes + holes_bytes(plan) + plan.host_bytes


def as_measured(plan: Plan, *, added_bytes: int) -> MemoryBytes:
    """A plan in the meter's categories; `added_bytes` are what the process holds beside it, in `other` like whatever
    else is no category."""
    parts = (plan.parameters_bytes, plan.gradients_bytes, plan.optimizer_bytes, plan.activations_bytes)
    peak = plan.peak_bytes + added_bytes
    return MemoryBytes(
        parameters_bytes=parts[0],
        gradients_bytes=parts[1],
        optimizer_bytes=parts[2],
        activations_bytes=parts[3],
        other_bytes=max(0, peak - sum(parts)),
        peak_bytes=peak,
    )


def holes_bytes(plan: Plan) -> int:
    """Free memory inside of the heap at a step's peak."""
    moving = max(phase.bytes for phase in plan.phases)
    return min(MOST_HOLES_BYTES, round(_HOLES_SHARE * moving))
