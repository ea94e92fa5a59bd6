"""Planned against measured memory: `make bench-memory`. A JSON line per setting, and a table with the worst last.

Every setting is a training step in a process of its own (`memory_cell.py`), of models with random weights. Two figures
are held against the plan: what torch's allocator had given out (bound 5 %), and the process's resident set (10 %),
which also needs two figures of the host, taken from the first setting (`lomo_core/memory/process.py`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import transformers

from bench.harness import RESULTS, ROOT, BenchError, JsonLines, commit, environment_of, say, table
from lomo_core.calibrate import TINY_MODEL
from lomo_core.config import OptimizerName, Precision
from lomo_core.memory.model_shapes import ModelShapes
from lomo_core.memory.plan import Setting, plan
from lomo_core.memory.process import Calibration, process_peak_bytes
from lomo_core.memory.shapes import read_shapes

_TENSOR_BOUND, _PROCESS_BOUND = 0.05, 0.10
_MIB = 1 << 20
_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
_LARGE = {
    "hidden_size": 1280,
    "intermediate_size": 3584,
    "num_hidden_layers": 20,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "vocab_size": 49152,
    "tie_word_embeddings": False,
}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1}
MODELS: dict[str, dict[str, Any]] = {
    "llama-1M": TINY_MODEL,
    "gpt2-1M": {"model_type": "gpt2", "n_embd": 128, "n_layer": 3, "n_head": 4, "vocab_size": 2048, **_TOKENS},
    "llama-135M": {"model_type": "llama", **_SMOLLM2},
    "gpt2-124M": {"model_type": "gpt2"},
    "llama-500M": {"model_type": "llama", **_LARGE},
    "qwen2-500M": {"model_type": "qwen2", **_LARGE},
}


@dataclass(frozen=True, slots=True)
class Case:
    """One setting."""

    model: str
    optimizer: OptimizerName
    precision: Precision
    batch: int
    seq: int
    checkpointing: bool

    @property
    def name(self) -> str:
        """For people: `llama-135M lomo bf16 1x256 ckpt`."""
        way = "ckpt" if self.checkpointing else "plain"
        return f"{self.model} {self.optimizer} {self.precision} {self.batch}x{self.seq} {way}"

    def setting(self) -> Setting:
        """For the plan: every token but a row's first has a loss, and rows have one length."""
        return Setting(
            optimizer=self.optimizer,
            precision=self.precision,
            batch_size=self.batch,
            seq_length=self.seq,
            activation_checkpointing=self.checkpointing,
            is_padded=False,
            trained_share=(self.seq - 1) / self.seq,
        )


# The first one calibrates.
CASES = (
    Case("llama-1M", "lomo", "fp32", 4, 128, checkpointing=True),
    Case("llama-1M", "adamw", "fp32", 8, 256, checkpointing=False),
    Case("llama-1M", "lomo", "bf16", 4, 128, checkpointing=False),
    Case("gpt2-1M", "adamw", "fp32", 4, 128, checkpointing=False),
    Case("gpt2-1M", "sgd", "bf16", 8, 256, checkpointing=True),
    Case("gpt2-1M", "adalomo", "bf16", 4, 256, checkpointing=False),
    Case("llama-135M", "lomo", "fp32", 1, 256, checkpointing=True),
    Case("llama-135M", "lomo", "bf16", 2, 512, checkpointing=True),
    Case("llama-135M", "lomo", "bf16", 2, 256, checkpointing=False),
    Case("llama-135M", "adalomo", "bf16", 1, 256, checkpointing=True),
    Case("llama-135M", "sgd", "fp32", 1, 256, checkpointing=False),
    Case("llama-135M", "adamw", "bf16", 1, 512, checkpointing=True),
    Case("gpt2-124M", "lomo", "fp32", 2, 128, checkpointing=False),
    Case("gpt2-124M", "adamw", "fp32", 1, 256, checkpointing=True),
    Case("gpt2-124M", "adalomo", "fp32", 2, 256, checkpointing=True),
    Case("llama-500M", "lomo", "bf16", 1, 256, checkpointing=True),
    Case("llama-500M", "lomo", "fp32", 1, 128, checkpointing=True),
    Case("llama-500M", "sgd", "bf16", 2, 128, checkpointing=False),
    Case("qwen2-500M", "adamw", "bf16", 1, 128, checkpointing=True),
    Case("qwen2-500M", "adalomo", "bf16", 2, 256, checkpointing=False),
)


def main() -> int:
    """Measure every case, print the table; 0 if every bound is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the lines (default bench/results/DATE-memory.jsonl)")
    parser.add_argument("--lanes", type=int, default=2, help="cases measured at once (default 2)")
    arguments = parser.parse_args()
    out = JsonLines(arguments.out or RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-memory.jsonl", bench="memory")
    start = time.monotonic()
    shapes = {name: read_shapes(transformers.AutoConfig.for_model(**config)) for name, config in MODELS.items()}
    say(f"{len(CASES)} settings, about 4 min, into {out.path}")
    first = measure(CASES[0], shapes)
    rest: list[dict[str, Any]] = []
    with ThreadPoolExecutor(arguments.lanes) as pool:
        for row in pool.map(lambda case: measure(case, shapes), CASES[1:]):
            rest.append(row)
            left = (time.monotonic() - start) / (len(rest) + 1) * (len(CASES) - 1 - len(rest))
            say(f"{len(rest) + 1}/{len(CASES)} {row['name']}; about {left / 60:.1f} min left")
    tiny = plan(shapes[CASES[0].model], CASES[0].setting())
    calibration = Calibration.of_step(
        base_bytes=first["base_bytes"], process_peak_bytes=first["process_peak_bytes"], tiny=tiny
    )
    rows = [out.append(judge(row, shapes, calibration)) for row in (first, *rest)]
    sys.stdout.write(report(rows, calibration))
    return 0 if all(is_within(row) for row in rows) else 1


def measure(case: Case, shapes: dict[str, ModelShapes]) -> dict[str, Any]:
    """Run one case.

    Raises:
        BenchError: its process failed.
    """
    found = plan(shapes[case.model], case.setting())
    spec = {
        "config": MODELS[case.model],
        "setting": asdict(case.setting()),
        # The update's scratch was made before the profiler looked; it is not what is in question.
        "workspace_bytes": found.buffers_bytes - shapes[case.model].buffers_bytes,
    }
    command = [sys.executable, "-m", "bench.memory_cell", json.dumps(spec)]
    environment = environment_of("engine")
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BenchError(f"{case.name} ended with code {result.returncode}:\n{result.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(result.stdout)
    return {"name": case.name, "case": asdict(case), "commit": commit(), **measured}


def judge(row: dict[str, Any], shapes: dict[str, ModelShapes], calibration: Calibration) -> dict[str, Any]:
    """The row with what was planned, and planned / measured less 1."""
    case = Case(**row["case"])
    found = plan(shapes[case.model], case.setting())
    process = process_peak_bytes(found, calibration)
    return {
        **row,
        "planned_peak_bytes": found.peak_bytes,
        "planned_gradients_bytes": found.gradients_bytes,
        "planned_process_bytes": process,
        "peak_phase": found.peak_phase,
        "tensor_error": found.peak_bytes / row["tensor_peak_bytes"] - 1,
        "process_error": process / row["process_peak_bytes"] - 1,
    }


def is_within(row: dict[str, Any]) -> bool:
    """Whether both errors are within their bounds."""
    return badness(row) <= 1


def badness(row: dict[str, Any]) -> float:
    """How much of a bound is used, of the one that is used more."""
    return max(abs(float(row["tensor_error"])) / _TENSOR_BOUND, abs(float(row["process_error"])) / _PROCESS_BOUND)


def report(rows: list[dict[str, Any]], calibration: Calibration) -> str:
    """The table, the worst case last."""
    lines = [["setting", "tensors planned", "measured", "", "process planned", "measured", "", "peak in"]]
    for row in sorted(rows, key=badness):
        sizes = [
            f"{row[key] / _MIB:.0f}"
            for key in ("planned_peak_bytes", "tensor_peak_bytes", "planned_process_bytes", "process_peak_bytes")
        ]
        errors = [f"{row[key]:+.1%}" for key in ("tensor_error", "process_error")]
        lines.append([row["name"], *sizes[:2], errors[0], *sizes[2:], errors[1], row["peak_phase"]])
    within = sum(map(is_within, rows))
    return (
        f"{table(lines)}\n\nMiB. This host: {calibration.base_bytes / _MIB:.0f} after the imports, "
        f"{calibration.libraries_bytes / _MIB:.0f} of libraries.\n{within} of {len(rows)} within "
        f"{_TENSOR_BOUND:.0%} (tensors) and {_PROCESS_BOUND:.0%} (process)\n"
    )


if __name__ == "__main__":
    sys.exit(main())
