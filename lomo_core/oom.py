"""Telling that memory has run out from every other error, and saying it with figures."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lomo_core.errors import OutOfMemoryError
from lomo_core.events import MemoryBytes

# PyTorch raises plain RuntimeErrors with these texts: its CPU allocator (c10/core/impl/alloc_cpu.cpp), and where a file
# of weights cannot be mapped (aten/src/ATen/MapAllocator.cpp, with the system's own words for ENOMEM).
_TEXTS = ("can't allocate memory", "Cannot allocate memory")
_GENERAL_ADVICE = "A smaller batch_size or max_seq_length, or activation_checkpointing, needs less"
_LOADING_ADVICE = "Not even the model fits beside what is there: a smaller one, or weights in 16 bits, needs less"


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What would fit instead."""

    changes: dict[str, Any]
    """Options of the run with their new values; at least one."""
    peak_bytes: int
    """Of the run with them."""

    def sentence(self) -> str:
        """`batch_size 2 with activation_checkpointing needs 812 MiB and would fit`."""
        switch = "activation_checkpointing"
        values = ", ".join(f"{name} {value}" for name, value in self.changes.items() if name != switch)
        what = " with ".join(filter(None, (values, switch if switch in self.changes else "")))
        return f"{what} needs {_mib(self.peak_bytes)} and would fit"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory has run out, on a device or on the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in _TEXTS)


@contextmanager
def out_of_memory_named(
    phase: str,
    breakdown: Callable[[], MemoryBytes | None],
    *,
    suggest: Callable[[MemoryBytes], Suggestion | None] | None = None,
    is_loading: bool = False,
) -> Iterator[None]:
    """Turn running out of memory inside of the block into `OutOfMemoryError`, with the last known figures.

    `suggest` knows what would fit; `is_loading`: no step has begun, and the figures are those of the run's plan.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        memory = breakdown()
        found = None if suggest is None or memory is None else suggest(memory)
        general = _LOADING_ADVICE if is_loading else _GENERAL_ADVICE
        advice = general if found is None else found.sentence()
        raise OutOfMemoryError(
            f"out of memory {phase}. {_sentence(memory, is_planned=is_loading)}{advice}",
            memory=memory,
            suggestion=None if found is None else {**found.changes, "peak_bytes": found.peak_bytes},
        ) from error


def _sentence(memory: MemoryBytes | None, *, is_planned: bool) -> str:
    if memory is None:
        return ""
    parts = ", ".join(
        f"{name} {_mib(getattr(memory, name + '_bytes'))}"
        for name in ("parameters", "gradients", "optimizer", "activations", "other", "peak")
    )
    return f"{'By its plan the run needs' if is_planned else 'It held'}: {parts}. "


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
