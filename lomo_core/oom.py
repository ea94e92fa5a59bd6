"""Telling that memory has run out from every other error, and saying it with figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lomo_core.errors import OutOfMemoryError
from lomo_core.events import MemoryBytes

# PyTorch's CPU allocator raises a plain RuntimeError with this text (c10/core/impl/alloc_cpu.cpp).
_CPU_TEXT = "can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory has run out, on a device or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_TEXT in str(error)


@contextmanager
def out_of_memory_named(phase: str, breakdown: Callable[[], MemoryBytes | None]) -> Iterator[None]:
    """Turn running out of memory inside of the block into `OutOfMemoryError`, with the last known figures."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory {phase}. {_sentence(breakdown())}"
            "A smaller batch_size or max_seq_length, or activation_checkpointing, needs less"
        ) from error


def _sentence(memory: MemoryBytes | None) -> str:
    if memory is None:
        return ""
    parts = ", ".join(
        f"{name} {getattr(memory, name + '_bytes') / 2**20:.0f} MiB"
        for name in ("parameters", "gradients", "optimizer", "activations", "other", "peak")
    )
    return f"It held: {parts}. "
