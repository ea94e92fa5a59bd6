"""Gradients of one step outside of the device's memory, until their norm is known.

Exact clipping needs the norm of all gradients before the first update. Instead of a second backward pass the gradients
can be written away as they come and read back once: two copies of the model's size per step, against four matrix
products of the whole model. The store is host memory (where the model is on another device) or a file that has no
name (so that nothing is left of it however the process ends); writing and reading go past the process's own memory.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

SpillTo = Literal["memory"] | Path

# Elements read back at once where the rule is element-wise: 16 MiB in fp32.
PIECE = 1 << 22


class GradientStore(Protocol):
    """Where gradients wait. Parameters are known by number, their elements by flat index."""

    def put(self, parameter: int, start: int, grad: Tensor, *, numel: int) -> None:
        """Keep `grad` (any shape) as the elements from `start` on of a parameter that has `numel`."""

    def put_rows(self, parameter: int, rows: Tensor, grad: Tensor, *, numel: int) -> None:
        """Keep `grad` [n, H] as the rows `rows` (int64 [n]) of a parameter [V, H]."""

    def get(self, parameter: int, start: int, size: int, *, device: torch.device) -> Tensor:
        """Elements [start, start + size) as a flat tensor on the device, in the dtype they were put in."""

    def parameters(self) -> list[int]:
        """Numbers of the parameters of which something was put since `clear`, in the order of their first `put`."""

    def clear(self) -> None:
        """Forget this step's gradients; room is kept for the next step's."""


def make_store(spill_to: SpillTo) -> GradientStore:
    """The store for `spill_to`: `"memory"`, or a folder."""
    return MemoryStore() if spill_to == "memory" else FileStore(Path(spill_to))


class MemoryStore:
    """In host memory; pinned for CUDA, so that copies run beside the backward pass."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}
        self._order: dict[int, None] = {}

    def put(self, parameter: int, start: int, grad: Tensor, *, numel: int) -> None:
        """See `GradientStore`."""
        kept = self._tensors.get(parameter)
        if kept is None:
            kept = torch.empty(numel, dtype=grad.dtype, pin_memory=grad.device.type == "cuda")
            self._tensors[parameter] = kept
        self._order[parameter] = None
        # The copy and the memory's next use are on one stream, hence in order.
        kept[start : start + grad.numel()].copy_(grad.reshape(-1), non_blocking=True)

    def put_rows(self, parameter: int, rows: Tensor, grad: Tensor, *, numel: int) -> None:
        """See `GradientStore`."""
        self._tensors[parameter].view(-1, grad.shape[1]).index_copy_(0, rows.cpu(), grad.cpu())

    def get(self, parameter: int, start: int, size: int, *, device: torch.device) -> Tensor:
        """See `GradientStore`; on the CPU a view."""
        return self._tensors[parameter][start : start + size].to(device, non_blocking=True)

    def parameters(self) -> list[int]:
        """See `GradientStore`."""
        return list(self._order)

    def clear(self) -> None:
        """See `GradientStore`."""
        self._order.clear()


class FileStore:
    """In a nameless file of a folder.

    Raises:
        OSError: the folder is not writable or the disk is full; no weight has been changed then.
    """

    def __init__(self, folder: Path) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._places: dict[int, tuple[int, torch.dtype]] = {}
        self._end = 0
        self._order: dict[int, None] = {}

    def put(self, parameter: int, start: int, grad: Tensor, *, numel: int) -> None:
        """See `GradientStore`."""
        if parameter not in self._places:
            self._places[parameter] = (self._end, grad.dtype)
            self._end += numel * grad.element_size()
        self._order[parameter] = None
        data = _bytes_of(grad.reshape(-1).cpu())
        at = self._places[parameter][0] + start * grad.element_size()
        while data:
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written

    def put_rows(self, parameter: int, rows: Tensor, grad: Tensor, *, numel: int) -> None:
        """See `GradientStore`."""
        for row, part in zip(rows.tolist(), grad.cpu(), strict=True):
            self.put(parameter, row * grad.shape[1], part, numel=numel)

    def get(self, parameter: int, start: int, size: int, *, device: torch.device) -> Tensor:
        """See `GradientStore`."""
        place, dtype = self._places[parameter]
        found = torch.empty(size, dtype=dtype)
        data = _bytes_of(found)
        at = place + start * dtype.itemsize
        while data:
            num_read = os.preadv(self._file, [data], at)
            if num_read == 0:
                raise OSError(f"the spilled gradient of parameter {parameter} is incomplete")
            data, at = data[num_read:], at + num_read
        return found.to(device)

    def parameters(self) -> list[int]:
        """See `GradientStore`."""
        return list(self._order)

    def clear(self) -> None:
        """See `GradientStore`."""
        self._order.clear()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a flat CPU tensor."""
    raw: Any = tensor.detach().view(torch.uint8).numpy()
    return memoryview(raw)


def pieces(numel: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut `numel` elements into (start, size) of at most `size` each."""
    for start in range(0, numel, size):
        yield start, min(size, numel - start)
