"""From a plan's tensors to a process's memory on a CPU host: what the interpreter, the libraries and the heap add.

    process = base + libraries + plan + holes + gradients put aside in host memory

- base: resident after the imports, before a model; 330 MB here.
- libraries: code and tables that the first step of any model brings (oneDNN, MKL, generated kernels).
- holes: free memory between what is in use. `allocator.HeapWatch` keeps it below a limit; small steps cannot fill it.

The first two are measured once per host, by a step of a tiny model. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from lomo_core.memory.plan import Plan

# allocator.py: the most that a step leaves in holes.
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


def holes_bytes(plan: Plan) -> int:
    """Free memory inside of the heap at a step's peak."""
    moving = max(phase.bytes for phase in plan.phases)
    return min(MOST_HOLES_BYTES, round(_HOLES_SHARE * moving))
