"""Speed and memory of a training step, beside the published LOMO, torch's optimizers and transformers' Trainer.

`make bench-engine`, about 20 minutes on two idle cores; `--quick` for two minutes. Results go to
`bench/results/<date>-engine.jsonl`, a line per implementation and cell; then every bound is checked, met or missed
(`bounds.py`). The exit code is 1 only where something could not be measured.

Groups of implementations take turns step by step, and ratios are taken inside a group alone. Two lanes run at once,
each on a core of its own with one thread: fp32, and the rest. Peers run with glibc's own allocator settings and with
those the engine gives itself. Three rounds where speed is compared, one where only memory counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.bounds import check_all, report
from bench.harness import (
    RESULTS,
    ROOT,
    WORK,
    Allocator,
    BenchError,
    Cell,
    Child,
    Clip,
    Dtype,
    JsonLines,
    Variant,
    base_model,
    describe,
    environment_of,
    say,
)

ALLOCATORS: tuple[Allocator, ...] = ("engine", "default")
# For the plan's estimate: CPU seconds of a step as measured here (EPYC with avx512_bf16), and of a child's start.
_STEP_S = {("fp32", 256): 4.0, ("fp32", 512): 15.0, ("bf16", 256): 2.7, ("bf16", 512): 9.5}
_START_S = 4.5
_HOOKS_S = {291: 9, 723: 20}


@dataclass(frozen=True, slots=True)
class Group:
    """Variants that take turns at one cell."""

    purpose: str
    cell: Cell
    variants: tuple[Variant, ...]
    rounds: int

    @property
    def name(self) -> str:
        """What `--only` is matched with."""
        return f"{self.cell.name} {self.purpose}"

    @property
    def estimate_s(self) -> float:
        """Seconds it should take."""
        return len(self.variants) * (_START_S + self.rounds * _STEP_S[self.cell.dtype, self.cell.seq])


@dataclass(frozen=True, slots=True)
class Hooks:
    """The cost of the hooks alone, see `hooks.py`."""

    num_tensors: int
    rounds: int

    @property
    def name(self) -> str:
        """What `--only` is matched with."""
        return f"hooks {self.num_tensors}"

    @property
    def estimate_s(self) -> float:
        """Seconds it should take."""
        return _HOOKS_S[self.num_tensors] * self.rounds / 10


Work = Group | Hooks


def plan(*, quick: bool) -> dict[str, list[Work]]:
    """What is measured, by lane."""
    lanes: dict[str, list[Work]] = {"fp32": [], "bf16": []}
    dtypes: tuple[Dtype, ...] = ("fp32", "bf16")
    for dtype in dtypes:
        for batch, seq in ((1, 256),) if quick else ((1, 256), (2, 512)):
            for checkpointing in (True, False):
                lanes[dtype] += grid(Cell(dtype, batch, seq, checkpointing), quick=quick)
        # The lane of bf16 has time to spare.
        lanes["bf16"].append(clipping(dtype, rounds=2 if quick else 4))
    lanes["bf16"] += [Hooks(291, 3 if quick else 10), Hooks(723, 3 if quick else 10)]
    return lanes


def grid(cell: Cell, *, quick: bool) -> list[Work]:
    """Everybody at one cell. Three groups: what the speed bounds compare, AdaLomo, and those of whom memory counts."""
    lomo = [Variant("lomo_core", "lomo")]
    if cell.dtype == "bf16":
        lomo.append(Variant("lomo_core", "lomo", rounding="stochastic"))
    peers = [Variant(*who, a) for who in (("lomo-optim", "lomo"), ("torch", "sgd")) for a in ALLOCATORS]
    adalomo = [Variant("lomo_core", "adalomo"), *(Variant("lomo-optim", "adalomo", a) for a in ALLOCATORS)]
    large = [Variant(*who, a) for who in (("torch", "adamw"), ("transformers", "lomo")) for a in ALLOCATORS]
    return [
        Group("lomo", cell, (*lomo, *peers), 1 if quick else 3),
        Group("adalomo", cell, tuple(adalomo), 1 if quick or cell.seq > 256 else 2),
        Group("adamw", cell, tuple(large), 1),
    ]


def clipping(dtype: Dtype, *, rounds: int) -> Group:
    """Our ways of clipping beside a bare step."""
    ways: tuple[Clip, ...] = ("none", "group", "delayed", "second_backward", "spill_memory", "spill_file")
    variants = tuple(Variant("lomo_core", "lomo", clip=way) for way in ways)
    return Group("clipping", Cell(dtype, 1, 256, checkpointing=True), variants, rounds)


class Lane(threading.Thread):
    """Measures its list of work on a core of its own."""

    def __init__(self, work: list[Work], *, cpu: int | None, threads: int, out: JsonLines) -> None:
        super().__init__(daemon=True)  # children end with our end of their pipes, so an interrupt ends everything
        self._work = work
        self._cpu = cpu
        self._threads = threads
        self._out = out
        self.rows: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.is_done = False

    def run(self) -> None:
        """Measure; what fails is kept, and the rest goes on."""
        planned = sum(work.estimate_s for work in self._work)
        start, done = time.monotonic(), 0.0
        for work in self._work:
            rows = list(self._hooks(work) if isinstance(work, Hooks) else self._group(work))
            self.rows += [self._out.append(row) for row in rows]
            done += work.estimate_s
            # The plan's remainder, at the pace so far.
            left_s = (planned - done) * (time.monotonic() - start) / done
            say(f"{work.name}: {len(rows)} results; about {left_s / 60:.1f} min left in this lane")
        self.is_done = True

    def _hooks(self, work: Hooks) -> Iterator[dict[str, Any]]:
        spec = {"num_tensors": work.num_tensors, "rounds": work.rounds, "cpu": self._cpu}
        command = [sys.executable, "-m", "bench.hooks", json.dumps(spec)]
        environment = environment_of("engine")
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            self.errors.append(f"{work.name}: {result.stderr[-2000:]}")
            return
        for name, seconds in json.loads(result.stdout).items():
            yield {"hooks": work.num_tensors, "implementation": name, "backward_cpu_s": seconds}

    def _group(self, group: Group) -> Iterator[dict[str, Any]]:
        found: dict[Variant, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
        with ExitStack() as stack, tempfile.TemporaryDirectory(dir=WORK) as spill_dir:
            children: dict[Variant, Child] = {}
            for variant in group.variants:
                try:
                    children[variant] = stack.enter_context(self._child(group.cell, variant, spill_dir))
                    found[variant] = (children[variant].read(), [])
                except BenchError as error:
                    self._give_up(children, variant, str(error))
            for _ in range(group.rounds):
                for variant in list(children):
                    try:
                        found[variant][1].append(children[variant].ask("step"))
                    except BenchError as error:
                        self._give_up(children, variant, str(error))
        for variant, (base, steps) in found.items():
            if steps:
                yield result_of(group, variant, base, steps) | {"threads": self._threads}

    def _give_up(self, children: dict[Variant, Child], variant: Variant, error: str) -> None:
        head, *_, last = error.splitlines()
        say(f"FAILED {head} {last}")
        self.errors.append(error)
        children.pop(variant, None)

    def _child(self, cell: Cell, variant: Variant, spill_dir: str) -> Child:
        spec = {
            "cell": asdict(cell),
            "variant": asdict(variant),
            "model": str(base_model()),
            "threads": self._threads,
            "cpu": self._cpu,
            "spill_dir": spill_dir,
        }
        return Child("bench.cell", spec, name=f"{cell.name} {variant.name}", allocator=variant.allocator)


def result_of(group: Group, variant: Variant, base: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the results. Speeds are those of the fastest step: noise only ever adds."""
    cell = group.cell
    tokens = cell.batch * cell.seq
    cpu_s = [step["cpu_s"] for step in steps]
    peak = max(step["peak_bytes"] for step in steps)
    return {
        **describe(cell, variant),
        "purpose": group.purpose,
        "num_steps": len(steps),
        "cpu_s_min": min(cpu_s),
        "cpu_s_median": statistics.median(cpu_s),
        "tokens_per_cpu_s": tokens / min(cpu_s),
        "tokens_per_s": tokens / min(step["wall_s"] for step in steps),
        "losses": [step["loss"] for step in steps],
        "base_bytes": base["base_bytes"],
        "weights_bytes": base["weights_bytes"],
        "peak_bytes": peak,
        "rss_above_weights_bytes": peak - base["base_bytes"],
    }


def measure(arguments: argparse.Namespace, out: JsonLines) -> tuple[list[dict[str, Any]], list[str]]:
    """Run the plan: results and errors."""
    WORK.mkdir(parents=True, exist_ok=True)
    base_model()
    only = re.compile(arguments.only)
    lanes = [[work for work in lane if only.search(work.name)] for lane in plan(quick=arguments.quick).values()]
    if arguments.lanes == 1:
        lanes = [[work for lane in lanes for work in lane]]
    lanes = [lane * arguments.repeat for lane in lanes if lane]
    seconds = [sum(work.estimate_s for work in lane) for lane in lanes]
    num_results = sum(len(work.variants) for lane in lanes for work in lane if isinstance(work, Group))
    say(f"{num_results} results in {len(lanes)} lanes, about {max(seconds, default=0) / 60:.0f} min, into {out.path}")
    # Pinned only where each lane gets as many cores as it has threads.
    cores = sorted(os.sched_getaffinity(0))
    is_pinned = arguments.threads == 1 and len(lanes) <= len(cores)
    threads = [
        Lane(lane, cpu=cores[place] if is_pinned else None, threads=arguments.threads, out=out)
        for place, lane in enumerate(lanes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [row for thread in threads for row in thread.rows]
    errors = [error for thread in threads for error in thread.errors]
    broken = [f"{thread.name} broke off: its traceback is on stderr" for thread in threads if not thread.is_done]
    return rows, errors + broken


def main() -> int:
    """Measure, then check the bounds. Returns the exit code: 1 where something could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_engine", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1 x 256 tokens only, few steps: does it work?")
    parser.add_argument("--only", default="", help="regular expression of groups, e.g. 'bf16 1x256 ckpt' or 'hooks'")
    parser.add_argument("--repeat", type=int, default=1, help="how often the whole plan is run")
    parser.add_argument("--lanes", type=int, choices=(1, 2), default=2, help="how much runs at once (1: least noise)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-engine.jsonl")
    parser.add_argument("--summary", type=Path, help="measure nothing: check the bounds over this file of results")
    arguments = parser.parse_args()
    if arguments.summary:
        rows, errors = JsonLines(arguments.summary, bench="engine").read(), list[str]()
    else:
        rows, errors = measure(arguments, JsonLines(arguments.out, bench="engine"))
    sys.stdout.write(report(rows, check_all(rows)))
    for error in errors:
        sys.stdout.write(f"FAILED {error}\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
