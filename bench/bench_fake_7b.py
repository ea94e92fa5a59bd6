"""The plan of LLaMA-7B against the whole model on tensors without storage: part of `make bench-memory`.

What few machines hold: 32 blocks, a batch of 8 x 512 tokens in bf16, LOMO, with activation checkpointing and without;
gradients are dropped when they are complete (`fake_step.py`). A JSON line per setting. Asked for is a plan within 5 %
of what was tracked.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import transformers

from bench.fake_step import track_step
from bench.harness import RESULTS, JsonLines, say, table
from lomo_core.memory.paper import llama
from lomo_core.memory.plan import Setting, plan

BOUND = 0.05
_GIB = 1 << 30
# arXiv 2302.13971, table 2 and section 2.2.
_LLAMA_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
# The batch of table 1 in arXiv 2306.09782.
_SETTING = Setting(precision="bf16", batch_size=8, seq_length=512, is_padded=False)


def main() -> int:
    """Track both settings, print the table; 0 if the plan is within its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the lines (default bench/results/DATE-fake-7b.jsonl)")
    arguments = parser.parse_args()
    out = JsonLines(arguments.out or RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-fake-7b.jsonl", bench="fake_7b")
    rows = []
    for is_checkpointed in (True, False):
        say(f"LLaMA-7B {'with' if is_checkpointed else 'without'} activation checkpointing, about 10 s")
        rows.append(out.append(measure(replace(_SETTING, activation_checkpointing=is_checkpointed))))
    sys.stdout.write(report(rows))
    return 0 if all(abs(row[key]) <= BOUND for row in rows for key in ("activations_error", "peak_error")) else 1


def measure(setting: Setting) -> dict[str, Any]:
    """What was planned and what was tracked, and planned / tracked less 1."""
    planned = plan(llama("7B"), setting)
    tracked = track_step(transformers.LlamaConfig(**_LLAMA_7B), setting, has_updates=False)
    return {
        "setting": asdict(setting),
        "planned_activations_bytes": planned.activations_bytes,
        "planned_peak_bytes": planned.peak_bytes,
        "peak_phase": planned.peak_phase,
        "activations_error": planned.activations_bytes / tracked.activations_bytes - 1,
        "peak_error": planned.peak_bytes / tracked.peak_bytes - 1,
        **asdict(tracked),
    }


def report(rows: list[dict[str, Any]]) -> str:
    """The table, in GiB."""
    lines = [["LLaMA-7B, 8 x 512, bf16, lomo", "activations planned", "tracked", "", "peak planned", "tracked", ""]]
    for row in rows:
        way = "checkpointed" if row["setting"]["activation_checkpointing"] else "plain"
        activations, peak = (
            [
                f"{row[f'planned_{key}_bytes'] / _GIB:.2f}",
                f"{row[f'{key}_bytes'] / _GIB:.2f}",
                f"{row[f'{key}_error']:+.1%}",
            ]
            for key in ("activations", "peak")
        )
        lines.append([way, *activations, *peak])
    return f"{table(lines)}\n\nGiB; at most {BOUND:.0%} are asked.\n"


if __name__ == "__main__":
    sys.exit(main())
