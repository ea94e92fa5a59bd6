"""Does LOMO in bf16 learn what AdamW in fp32 learns? Two tasks, three ways of training, three learning rates each.

`make bench-quality`, about 90 minutes on two idle cores. SmolLM2-135M is fine-tuned through the engine, as a process
each (`python -m lomo_core train`): the same rows in the same order, the same number of steps. Held-back rows are
halved: by the one half the best rate of each way is chosen, the other half says how good it is. Results go to
`bench/results/<date>-quality.jsonl` as they come; a run that is in the file already, with the same commit and settings,
is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.corpus import Task, TaskName, write_task
from bench.harness import RESULTS, ROOT, WORK, BenchError, JsonLines, base_model, commit, environment_of, say
from bench.quality_summary import summary

_SEED = 1
_MAX_SEQ_LENGTH = 128
# One pass over the graph; the same for both ways of rounding. AdamW's usual one is the global norm.
_LOMO_CLIP = {"mode": "group", "threshold": 1.0}
_ADAMW_CLIP = {"mode": "norm", "threshold": 1.0}
_SCHEDULE = {"name": "cosine", "warmup_ratio": 0.1}


@dataclass(frozen=True, slots=True)
class Arm:
    """A way of training, and the rates it is tried at."""

    name: str
    precision: str
    rates: tuple[float, ...]
    optimizer: dict[str, Any] = field(hash=False)


ARMS = (
    Arm(
        "lomo bf16 stochastic",
        "bf16",
        (1e-2, 2e-2, 4e-2),
        {"name": "lomo", "rounding": "stochastic", "clip": _LOMO_CLIP},
    ),
    Arm("lomo bf16 nearest", "bf16", (1e-2, 2e-2, 4e-2), {"name": "lomo", "rounding": "nearest", "clip": _LOMO_CLIP}),
    Arm("adamw fp32", "fp32", (3e-5, 1e-4, 3e-4), {"name": "adamw", "clip": _ADAMW_CLIP}),
)
TASKS: tuple[TaskName, ...] = ("docs", "chat")


@dataclass(frozen=True, slots=True)
class Run:
    """One training run, by what decides its result."""

    task: TaskName
    arm: str
    learning_rate: float
    steps: int
    batch_size: int
    seed: int
    threads: int


class Engine:
    """Starts the engine's commands as processes.

    Raises:
        BenchError: a command failed; what it said last is in the text.
    """

    def __init__(self, *, threads: int, nice: int) -> None:
        self._environment = environment_of("engine") | {"LOMO_ENGINE_THREADS": str(threads)}
        self._nice = nice

    def run(self, *arguments: str) -> str:
        """What the command wrote to stdout."""
        command = ["nice", "-n", str(self._nice), sys.executable, "-m", "lomo_core", *arguments]
        result = subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False, close_fds=True
        )
        if result.returncode != 0:
            raise BenchError(f"lomo_core {' '.join(arguments)} ended with {result.returncode}: {result.stderr[-2000:]}")
        return result.stdout

    def accuracy(self, model: Path, data: Path, precision: str) -> float:
        """Share of the choice rows that the model gets right."""
        options = ("--precision", precision, "--max-seq-length", str(_MAX_SEQ_LENGTH))
        found = json.loads(self.run("evaluate", "--model", str(model), "--data", str(data), *options))
        return float(found["choice_accuracy"])


def specification(run: Run, arm: Arm, task: Task, run_dir: Path) -> dict[str, Any]:
    """The engine's run.json. Nothing but the last model is saved, and nothing evaluated on the way."""
    return {
        "run_dir": str(run_dir),
        "model_path": str(base_model()),
        "data": {"train_path": str(task.train), "max_seq_length": _MAX_SEQ_LENGTH},
        "optimizer": {**arm.optimizer, "learning_rate": run.learning_rate},
        "schedule": _SCHEDULE,
        "precision": arm.precision,
        "n_epochs": -(-run.steps * run.batch_size // task.num_train),
        "batch_size": run.batch_size,
        "max_steps": run.steps,
        "seed": run.seed,
        "checkpoint_every_steps": 0,
    }


def losses_of(journal: Path) -> list[float | None]:
    """Training loss of each step; None where it was not finite."""
    lines = (json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if line["type"] == "step"]


def train_and_score(run: Run, arm: Arm, task: Task, engine: Engine) -> dict[str, Any]:
    """One line of the results."""
    run_dir = WORK / "quality" / re.sub(r"[^a-z0-9.]+", "-", f"{run.task} {run.arm} {run.learning_rate:g}")
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    path = run_dir / "run.json"
    path.write_text(json.dumps(specification(run, arm, task, run_dir)), encoding="utf-8")
    start = time.monotonic()
    engine.run("train", str(path))
    train_s = time.monotonic() - start
    row = {
        **asdict(run),
        "settings": arm.optimizer,
        "train_s": train_s,
        "losses": losses_of(run_dir / "journal.jsonl"),
        **scores(run_dir / "model", arm.precision, task, engine),
    }
    shutil.rmtree(run_dir)
    return row


def scores(model: Path, precision: str, task: Task, engine: Engine) -> dict[str, Any]:
    """Accuracy on both halves of the held-back rows, and how many rows each has."""
    return {
        "choosing_accuracy": engine.accuracy(model, task.choosing, precision),
        "reporting_accuracy": engine.accuracy(model, task.reporting, precision),
        "num_choosing": task.num_choosing,
        "num_reporting": task.num_reporting,
    }


def planned(arguments: argparse.Namespace) -> list[tuple[Run, Arm]]:
    """All runs: first each way at its middle rate, so that an early end leaves something to compare."""
    only = re.compile(arguments.only)
    runs = []
    for place in (1, 2, 0):
        for task in TASKS:
            for arm in ARMS:
                run = Run(
                    task, arm.name, arm.rates[place], arguments.steps, arguments.batch_size, _SEED, arguments.threads
                )
                if only.search(f"{task} {arm.name} {run.learning_rate:g}"):
                    runs.append((run, arm))
    return runs


def is_result_of(row: dict[str, Any], run: Run, arm: Arm, measured_commit: str) -> bool:
    """Whether this line is what the run would give."""
    wanted = {**asdict(run), "settings": arm.optimizer, "commit": measured_commit}
    return wanted.items() <= row.items()


def measure(arguments: argparse.Namespace, out: JsonLines) -> tuple[list[dict[str, Any]], list[str]]:
    """Make the runs that are missing: all results, and errors."""
    engine = Engine(threads=arguments.threads, nice=arguments.nice)
    base_model()
    before, here = out.read(), commit()
    rows, missing, errors = [], [], list[str]()
    for run, arm in planned(arguments):
        found = [row for row in before if is_result_of(row, run, arm, here)]
        rows += found[-1:]
        missing += [] if found else [(run, arm)]
    say(f"{len(missing)} runs to make, {len(rows)} found in {out.path}")
    tasks = {name: write_task(name, WORK / "quality" / f"{name}-data") for name in TASKS}
    start = time.monotonic()
    for number, (run, arm) in enumerate(missing, 1):
        try:
            rows.append(out.append(train_and_score(run, arm, tasks[run.task], engine)))
            last = f"accuracy {rows[-1]['choosing_accuracy']:.3f}, {rows[-1]['reporting_accuracy']:.3f}"
        except BenchError as error:
            errors.append(str(error))
            last = f"FAILED {error}"
        left_s = (time.monotonic() - start) / number * (len(missing) - number)
        say(f"{number}/{len(missing)} {run.task} {run.arm} {run.learning_rate:g}: {last}; {left_s / 60:.0f} min left")
    return rows, errors


def main() -> int:
    """Make the missing runs, then say what they show. Returns the exit code: 1 where a run failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads of the engine")
    parser.add_argument("--nice", type=int, default=0, help="lower the engine's priority by so much")
    parser.add_argument("--only", default="", help="regular expression of runs, e.g. 'chat lomo' or 'adamw'")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-quality.jsonl")
    arguments = parser.parse_args()
    rows, errors = measure(arguments, JsonLines(arguments.out, bench="quality"))
    sys.stdout.write(summary(rows))
    for error in errors:
        sys.stdout.write(f"FAILED {error}\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
