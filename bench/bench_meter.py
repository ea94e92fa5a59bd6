"""What the meter costs: CPU seconds of a step without it, with it, and of a step that it samples (`make bench`).

The engine's executor steps one model of 1 M parameters, where a step is short and the meter's share large. The three
ways take turns step by step, in one process with the engine's settings of the allocator. A run samples one step in
`METER_EVERY_STEPS`: its cost is put together from the two. Judged is the median of the ratios within a round: the
fastest steps of two ways differ by 1 % by chance, half of the bound; they are in the lines too. A JSON line per
setting; at most `BOUND` of a step without a meter is asked for.
"""

from __future__ import annotations

import json
import operator
import statistics
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import transformers

from bench.bench_memory import MODELS
from bench.harness import ROOT, BenchError, environment_of, machine
from lomo_core.__main__ import THREADS, _set_up_torch
from lomo_core.calibrate import make_sample_run
from lomo_core.execute.plain import PlainExecutor
from lomo_core.memory.meter import METER_EVERY_STEPS, Meter
from lomo_core.memory.plan import Setting

BOUND = 1.02
_MODEL = "llama-1M"
# The smallest step first: of it, a fixed cost is the largest share.
_SETTINGS = tuple(
    {"precision": precision, "checkpointing": checkpointing, "batch": batch, "seq": seq}
    for precision, checkpointing, batch, seq in (
        ("fp32", False, 1, 64),
        ("fp32", True, 1, 64),
        ("fp32", False, 4, 128),
        ("bf16", True, 4, 128),
    )
)
_NUM_WARM_UP, _NUM_ROUNDS = 10, 150
Way = str
WAYS: tuple[Way, ...] = ("off", "on", "sampled")


class NoMeter(Meter):
    """The meter's place, empty."""

    def __init__(self) -> None:
        """Nothing is kept."""

    def begin_step(self, *, is_trial: bool = False) -> None:
        """Nothing."""

    def forward(self) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def forward_done(self) -> None:
        """Nothing."""

    def backward_done(self) -> None:
        """Nothing."""

    def end_step(self) -> Any:
        """Nothing."""

    def find_profile(self, *, step: int) -> None:
        """Nothing."""


def main() -> int:
    """Print one JSON line per setting; 0 if the bound is met in all."""
    about = machine()
    is_met = True
    for setting in _SETTINGS:
        row = summary(measure_apart(setting))
        is_met = is_met and row["median_default_interval"] <= BOUND
        sys.stdout.write(json.dumps({"bench": "meter", "model": _MODEL, **setting, **row, **about}) + "\n")
        sys.stdout.flush()
    return 0 if is_met else 1


def summary(seconds: dict[Way, list[float]]) -> dict[str, Any]:
    """Steps as multiples of one without a meter."""
    least = {way: min(values) for way, values in seconds.items()}
    # Of one round's steps, which had the same seconds of the machine.
    ratios = {way: statistics.median(map(operator.truediv, seconds[way], seconds["off"])) for way in ("on", "sampled")}
    return {
        "step_cpu_ms": round(least["off"] * 1e3, 3),
        "unsampled": round(least["on"] / least["off"], 4),
        "sampled": round(least["sampled"] / least["off"], 4),
        "default_interval": round(_of_interval(least["on"], least["sampled"]) / least["off"], 4),
        "median_unsampled": round(ratios["on"], 4),
        "median_sampled": round(ratios["sampled"], 4),
        "median_default_interval": round(_of_interval(ratios["on"], ratios["sampled"]), 4),
        "num_steps": len(seconds["off"]),
    }


def _of_interval(unsampled: float, sampled: float) -> float:
    return ((METER_EVERY_STEPS - 1) * unsampled + sampled) / METER_EVERY_STEPS


def measure_apart(setting: dict[str, Any]) -> dict[Way, list[float]]:
    """The same in a process that has the engine's allocator settings.

    Raises:
        BenchError: the process failed.
    """
    command = [sys.executable, "-m", "bench.bench_meter", json.dumps(setting)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment_of("engine"), capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise BenchError(f"{setting} ended with code {result.returncode}:\n{result.stderr[-2000:]}")
    seconds: dict[Way, list[float]] = json.loads(result.stdout)
    return seconds


def measure(setting: dict[str, Any], *, num_rounds: int = _NUM_ROUNDS) -> dict[Way, list[float]]:
    """CPU seconds of each way's steps, in turn."""
    _set_up_torch({THREADS: "1"})
    run = make_sample_run(
        transformers.AutoConfig.for_model(**MODELS[_MODEL]),
        Setting(
            precision=setting["precision"],
            activation_checkpointing=setting["checkpointing"],
            batch_size=setting["batch"],
            seq_length=setting["seq"],
            rounding="stochastic" if setting["precision"] == "bf16" else "nearest",
        ),
    )
    found: dict[Way, list[float]] = {way: [] for way in WAYS}
    for number in range(_NUM_WARM_UP + num_rounds):
        for way in WAYS:
            seconds = step_seconds(run.executor, run.meter, run.batch, way=way)
            if number >= _NUM_WARM_UP:
                found[way].append(seconds)
    return found


def step_seconds(executor: PlainExecutor, meter: Meter, batch: Any, *, way: Way) -> float:
    """CPU seconds of a step as the trainer takes it."""
    used = NoMeter() if way == "off" else meter
    executor._meter = used  # noqa: SLF001 - one executor, so that all three have the same model, heap and hooks
    # The meter counts its own steps: this one's number is a multiple of the interval, or is not.
    meter._num_steps = 0 if way == "sampled" else 1  # noqa: SLF001 - see above
    start = time.process_time()
    used.begin_step()
    executor.run([batch])
    used.end_step()
    used.find_profile(step=1)
    return time.process_time() - start


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
    else:
        sys.exit(main())
