"""One setting's step in a process of its own: `python -m bench.memory_cell SPEC`, a JSON line with its peaks on stdout.

`tensor_peak_bytes` is the most that torch's allocator had given out at once during a step, by its own reports to the
profiler, weights and what lives between steps included; `process_peak_bytes` the kernel's high-water mark of the
resident set over the step before, which runs without the profiler. The model has random weights.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from torch._C._profiler import _EventType

from lomo_core.__main__ import THREADS, _set_up_torch
from lomo_core.calibrate import make_sample_run, process_peak_of_step, resident_bytes
from lomo_core.memory.plan import Setting
from lomo_core.model import parameter_bytes
from lomo_core.optim.fused import state_bytes


def main(spec: dict[str, Any]) -> None:
    """Warm up, measure, answer."""
    _set_up_torch({THREADS: "1"})
    architecture = transformers.AutoConfig.for_model(**spec["config"])
    base = resident_bytes()
    run = make_sample_run(architecture, Setting(**spec["setting"]))
    process_peak = process_peak_of_step(run)
    # What lives between steps was allocated before the profiler looked.
    standing = parameter_bytes(run.model) + state_bytes(run.optimizer) + spec["workspace_bytes"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run.step()
    answer = {
        "base_bytes": base,
        "process_peak_bytes": process_peak,
        "tensor_peak_bytes": standing + _peak_above_start(profile),
        "gradients_bytes": run.optimizer.peak_gradient_bytes,
    }
    sys.stdout.write(json.dumps(answer) + "\n")


def _peak_above_start(profile: Any) -> int:
    """The highest running sum of allocations and frees, in the order in which they happened."""
    changes: list[tuple[int, int]] = []
    todo = list(profile.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo.extend(event.children)
        if event.typed[0] == _EventType.Allocation:
            changes.append((event.start_time_ns, event.typed[1].alloc_size))
    alive = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        alive += size
        peak = max(peak, alive)
    return peak


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
