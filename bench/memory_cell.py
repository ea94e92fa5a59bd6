"""One setting's step in a process of its own: `python -m bench.memory_cell SPEC`, a JSON line with its peaks on stdout.

`tensor_peak_bytes` is the most that torch's allocator had given out at once during a step, by its own reports to the
profiler, weights and what lives between steps included; `process_peak_bytes` the kernel's high-water mark of the
resident set over the step before, which runs without the profiler. The model has random weights.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
import transformers
from torch._C._profiler import _EventType

from lomo_core.__main__ import THREADS, _set_up_torch
from lomo_core.data.batches import Batch, collate
from lomo_core.data.template import EncodedRow
from lomo_core.execute.plain import PlainExecutor
from lomo_core.memory.meter import Meter, reset_resident_peak, resident_peak_bytes
from lomo_core.model import DTYPES, enable_activation_checkpointing, parameter_bytes
from lomo_core.optim import AdaLomo, Lomo
from lomo_core.optim.baselines import Baseline
from lomo_core.optim.fused import state_bytes

_CPU = torch.device("cpu")
_RATE = 1e-4


def main(spec: dict[str, Any]) -> None:
    """Warm up, measure, answer."""
    _set_up_torch({THREADS: "1"})
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**spec["config"])
    auto_model: Any = transformers.AutoModelForCausalLM
    base = _resident_bytes()
    model = auto_model.from_config(config, dtype=DTYPES[spec["precision"]])
    if spec["checkpointing"]:
        enable_activation_checkpointing(model)
    optimizer = _optimizer(spec["optimizer"], model)
    executor = PlainExecutor(model, optimizer, Meter(model, optimizer, _CPU))
    batch = _batch(spec, config.vocab_size)
    executor.run([batch])
    reset_resident_peak()
    executor.run([batch])
    process_peak = resident_peak_bytes()
    # What lives between steps was allocated before the profiler looked.
    standing = parameter_bytes(model) + state_bytes(optimizer) + spec["workspace_bytes"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        executor.run([batch])
    answer = {
        "base_bytes": base,
        "process_peak_bytes": process_peak,
        "tensor_peak_bytes": standing + _peak_above_start(profile),
        "gradients_bytes": optimizer.peak_gradient_bytes,
    }
    sys.stdout.write(json.dumps(answer) + "\n")


def _optimizer(name: str, model: Any) -> Any:
    if name in ("sgd", "adamw"):
        return Baseline(name, model.parameters(), _RATE)  # type: ignore[arg-type]  # one of the two names
    return {"lomo": Lomo, "adalomo": AdaLomo}[name](model.parameters(), _RATE, rounding="stochastic")


def _batch(spec: dict[str, Any], vocab_size: int) -> Batch:
    batch, seq = spec["batch"], spec["seq"]
    ids = np.random.default_rng(0).integers(0, vocab_size, (batch, seq), dtype=np.int32)
    return collate([EncodedRow(row, np.arange(seq) > 0, is_cut=False) for row in ids], pad_token_id=0)


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


def _resident_bytes() -> int:
    reset_resident_peak()
    return resident_peak_bytes()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
