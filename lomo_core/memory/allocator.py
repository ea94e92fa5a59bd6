"""The C library's heap: giving freed memory back to the system where glibc keeps it.

Two costs pull against each other. Memory that is given back must be cleared and mapped anew when it is needed again:
with every tensor above 1 MiB mapped by itself, page faults took a fifth of a step's CPU time (SmolLM2, 2 x 512, bf16:
10.7 s against 8.5). Memory that is kept is resident in holes between what is in use: without limits, 175 MB above the
weights where 100 are alive. So tensors up to 8 MiB stay in the heap (`MALLOC_MMAP_THRESHOLD_`, `__main__.py`), and the
heap is trimmed when its holes have grown beyond `MOST_HOLES_BYTES`: `HeapWatch`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from lomo_core.memory.process import MOST_HOLES_BYTES
from lomo_core.model import find_blocks

# Elements of a gradient worth asking at: a few per block, 10 us each.
_LARGE_GRADIENT = 1 << 17
_STATM = Path("/proc/self/statm")
# glibc's own names, mallinfo(3).
_MALLINFO2_FIELDS = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class _MallInfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later, mallinfo(3)."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO2_FIELDS)


@cache
def _find_function(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):
        return None


def trim_heap() -> None:
    """Return whole free pages of the heap to the system; does nothing without glibc."""
    trim = _find_function("malloc_trim")
    if trim is not None:
        trim(0)


def find_live_heap_bytes() -> int | None:
    """Bytes of the heap in use, over all arenas: exact to the tensor, 0.8 us a call. None without glibc's mallinfo2."""
    mallinfo2 = _find_function("mallinfo2")
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _MallInfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


class HeapWatch:
    """Keeps the holes in the heap of a model's training steps below a limit.

    Asks before each block in the forward pass, and at large gradients in the backward pass (a checkpointed block that
    is made again does not run its hooks). Does nothing where tensors are not in the C library's heap, or the system
    cannot tell its holes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._outside_bytes: int | None = None
        """Resident beside the heap, while a step is watched."""
        self._is_on = next(model.parameters()).device.type == "cpu"
        if self._is_on:
            self._register(model)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, holes are kept below the limit. Outside nothing is asked: evaluations and checkpoints have sizes of
        their own."""
        if self._is_on:
            trim_heap()
            self._outside_bytes = _difference(_find_resident_bytes(), find_live_heap_bytes())
        try:
            yield
        finally:
            self._outside_bytes = None

    def _register(self, model: nn.Module) -> None:
        for block in find_blocks(model):
            block.register_forward_pre_hook(lambda module, args: self._check())
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.numel() >= _LARGE_GRADIENT:
                parameter.register_post_accumulate_grad_hook(lambda parameter: self._check())  # type: ignore[no-untyped-call]

    def _check(self) -> None:
        if self._outside_bytes is None:
            return
        outside = _difference(_find_resident_bytes(), find_live_heap_bytes())
        if outside is not None and outside - self._outside_bytes > MOST_HOLES_BYTES:
            trim_heap()


def _difference(resident: int | None, live: int | None) -> int | None:
    return None if resident is None or live is None else resident - live


def _find_resident_bytes() -> int | None:
    """Resident set of this process (proc(5), statm: in pages)."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
