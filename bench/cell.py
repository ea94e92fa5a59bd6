"""One implementation's steps in a process of its own: `python -m bench.cell SPEC`, then a step for each line on stdin.

The measured figure of memory is `rss_above_weights_bytes = peak - base`:

- base: resident set with the weights in private memory (cloned: safetensors maps them from the file, where they would
  become private at their first update), after a forward and backward pass of 8 tokens with respect to the embeddings
  alone (so that code and matrix library are loaded, but no weight has had a gradient), freed memory given back
  (`malloc_trim`). It is the process without the weights, and the weights.
- peak: the kernel's high-water mark (`VmHWM`), reset at the start of each measured step. Whatever lives between steps,
  such as AdamW's moments, is part of it.

The optimizer is built after the base is taken. A step of 32 tokens comes before the measured ones (the Trainer, whose
batches have one size, takes a whole one). All of this is the same for all implementations.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench import peers
from bench.harness import Cell, Variant
from lomo_core.__main__ import THREADS, _set_up_torch
from lomo_core.data.batches import collate
from lomo_core.data.template import EncodedRow
from lomo_core.execute.plain import PlainExecutor
from lomo_core.memory.meter import Meter, reset_resident_peak, resident_peak_bytes
from lomo_core.model import enable_activation_checkpointing, load_model, parameter_bytes
from lomo_core.optim import AdaLomo, Lomo
from lomo_core.tokenizer import load_tokenizer

_STATUS = Path("/proc/self/status")
# Small: the weights of a benchmark need not get better, but they must stay finite at every optimizer's scale.
_RATE = 1e-4
_CPU = torch.device("cpu")
# Batches differ from step to step and come round again.
_NUM_BATCHES = 8
_NUM_WARM_UP = 32
_CLIPS: dict[str, dict[str, Any]] = {
    "none": {},
    "group": {"max_grad_norm": 1.0, "clip_mode": "group"},
    "delayed": {"max_grad_norm": 1.0, "clip_mode": "delayed"},
    "second_backward": {"max_grad_norm": 1.0, "clip_mode": "norm"},
    "spill_memory": {"max_grad_norm": 1.0, "clip_mode": "norm", "spill_to": "memory"},
    "spill_file": {"max_grad_norm": 1.0, "clip_mode": "norm"},
}


class Clock:
    """Measures a step: CPU seconds of all threads (user and system), wall seconds, peak of the resident set."""

    def __init__(self) -> None:
        self._wall = self._cpu = 0.0

    def start(self) -> None:
        """The step begins."""
        if not reset_resident_peak():
            raise RuntimeError("this system does not let a process reset its peak (/proc/self/clear_refs)")
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self, loss: float | None) -> dict[str, Any]:
        """The step is over: its figures."""
        cpu_s, wall_s = time.process_time() - self._cpu, time.perf_counter() - self._wall
        return {"loss": loss, "cpu_s": cpu_s, "wall_s": wall_s, "peak_bytes": resident_peak_bytes()}


def main(spec: dict[str, Any]) -> None:
    """Load, report the base, then step for each line on stdin until it ends."""
    cell, variant = Cell(**spec["cell"]), Variant(**spec["variant"])
    if spec["cpu"] is not None:
        os.sched_setaffinity(0, {spec["cpu"]})
    if variant.implementation == "lomo_core":
        _set_up_torch({THREADS: str(spec["threads"])})
    else:
        torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    batches = make_batches(spec["model"], cell)
    model = load_model(spec["model"], precision=cell.dtype, device=_CPU)
    if cell.checkpointing and not enable_activation_checkpointing(model):
        raise RuntimeError("the model has no activation checkpointing")
    base = measure_base(model)
    answer({"base_bytes": base, "weights_bytes": parameter_bytes(model)})
    if variant.implementation == "transformers":
        peers.run_trainer(model, batches, checkpointing=cell.checkpointing, serve=TrainerServer(), rate=_RATE)
        return
    step = our_step(model, variant, Path(spec["spill_dir"])) if variant.implementation == "lomo_core" else None
    serve(step or peers.STEPS[variant.implementation, variant.optimizer](model, _RATE), batches)


def make_batches(model_path: str, cell: Cell) -> list[Tensor]:
    """Token ids int64 [batch, seq]: consecutive pieces of Python's own documentation."""
    tokenizer = load_tokenizer(model_path)
    wanted = _NUM_BATCHES * cell.batch * cell.seq
    text = "\n".join(topics[name] for name in sorted(topics))[: 12 * wanted]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:wanted])
    return list(ids.view(_NUM_BATCHES, cell.batch, cell.seq))


def measure_base(model: Any) -> int:
    """Resident set in bytes before the optimizer exists; see the module's text."""
    parameters: list[nn.Parameter] = list(model.parameters())
    for parameter in parameters:
        parameter.data = parameter.data.clone()
        parameter.requires_grad = False
    embedded = model.get_input_embeddings()(torch.arange(8).unsqueeze(0)).detach().requires_grad_()
    model.train()
    model(inputs_embeds=embedded, labels=torch.arange(8).unsqueeze(0), use_cache=False).loss.backward()
    for parameter in parameters:
        parameter.requires_grad = True
    del embedded
    ctypes.CDLL(None).malloc_trim(0)
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def our_step(model: Any, variant: Variant, spill_dir: Path) -> Callable[[Tensor], float]:
    """The engine's step as its trainer takes it: executor, optimizer and loss head are the product's."""
    clip = _CLIPS[variant.clip] | ({"spill_to": spill_dir} if variant.clip == "spill_file" else {})
    cls = {"lomo": Lomo, "adalomo": AdaLomo}[variant.optimizer]
    optimizer = cls(model.parameters(), _RATE, rounding=variant.rounding, **clip)
    executor = PlainExecutor(model, optimizer, Meter(model, optimizer, _CPU))

    def step(ids: Tensor) -> float:
        # Nothing predicts a row's first token, so it is no target: the same loss as transformers takes from `labels`.
        trained = np.arange(ids.shape[1]) > 0
        rows = [EncodedRow(row.numpy().astype(np.int32), trained, is_cut=False) for row in ids]
        return executor.run([collate(rows, pad_token_id=0)]).loss

    return step


def serve(step: Callable[[Tensor], float], batches: list[Tensor]) -> None:
    """A step of a few tokens, so that workspaces and moments exist, then a measured step for each line."""
    step(batches[-1][:1, :_NUM_WARM_UP])
    clock = Clock()
    for number, _ in enumerate(iter(sys.stdin.readline, "")):
        clock.start()
        answer(clock.stop(step(batches[number % len(batches)])))


class TrainerServer:
    """The same from inside transformers' Trainer, which has a loop of its own: its callbacks wait for the lines."""

    def __init__(self) -> None:
        self._clock = Clock()
        self._is_warm = False

    def begin(self) -> bool:
        """Wait for the next line (not before the first step); False where there is none."""
        if self._is_warm and not sys.stdin.readline():
            return False
        self._clock.start()
        return True

    def end(self) -> None:
        """The step that was begun is over. The Trainer keeps its loss to itself."""
        if self._is_warm:
            answer(self._clock.stop(None))
        self._is_warm = True


def answer(row: dict[str, Any]) -> None:
    """One line to the parent."""
    _OUT.write(json.dumps(row) + "\n")
    _OUT.flush()


if __name__ == "__main__":
    # Libraries may print: what the parent reads goes over a descriptor of its own.
    _OUT = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main(json.loads(sys.argv[1]))
