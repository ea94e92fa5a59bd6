"""Which rows make up a step: pure functions of (seed, epoch), so that the position in the data is the step number.

The same order as `seeding.shuffled` gives, computed on whole arrays: ten million rows are shuffled in seconds. An
epoch's order costs 8 bytes per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lomo_core.seeding import mix

# Rows are sorted by length within so many batches: enough to leave little padding, few enough to stay random.
_BATCHES_PER_WINDOW = 8
# Few different widths: the CPU's matrix library keeps code and buffers for every shape it has seen (SmolLM2, 100
# steps of about 30 widths: 300 MB), and tensor cores like multiples of 8.
_WIDTH_MULTIPLE = 8
# Keeps the words of the two uses of a seed apart.
_ROWS, _BATCH_ORDER = 1, 2
# Constants of splitmix64, see `seeding.mix`.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
# Hashes computed at once: scratch memory stays in the CPU's cache.
_BLOCK = 1 << 16

AnyInt = TypeVar("AnyInt", int, NDArray[np.int64])


class BatchPlan:
    """The batches of a run, by step number (from 0): rows of similar length, in an order that looks random."""

    def __init__(self, lengths: Sequence[int] | NDArray[np.int32], *, batch_size: int, seed: int) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._batch_size = batch_size
        self._seed = seed
        self.batches_per_epoch = -(-len(self._lengths) // batch_size)
        self._epoch = lru_cache(maxsize=1)(self._order_of_epoch)

    def rows_of(self, step: int) -> list[int]:
        """Indexes of the rows of the step after `step` others; the last batch of an epoch may be smaller."""
        epoch, place = divmod(step, self.batches_per_epoch)
        rows, batches = self._epoch(epoch)
        first = int(batches[place]) * self._batch_size
        found: list[int] = rows[first : first + self._batch_size].tolist()
        return found

    def longest_step(self, *, first: int, total_steps: int) -> int:
        """The earliest of the steps from `first` to before `total_steps` whose batch has the most cells, padding
        included."""
        return longest_step(self._cells_of_epoch, self.batches_per_epoch, first=first, total_steps=total_steps)

    def _cells_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """Cells of each batch of an epoch [batches_per_epoch], in the order of the steps."""
        rows, batches = self._epoch(epoch)
        return cells_of_batches(self._lengths[rows], self._batch_size)[batches]

    def _order_of_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows sorted by length within windows [num_rows], and the order of the batches that they are cut into."""
        rows = shuffled_range(len(self._lengths), self._seed, epoch, _ROWS)
        # One stable sort by (window, length) sorts every window by itself.
        window = self._batch_size * _BATCHES_PER_WINDOW
        keys = np.arange(len(rows)) // window * (int(self._lengths.max()) + 1) + self._lengths[rows]
        batches = shuffled_range(self.batches_per_epoch, self._seed, epoch, _BATCH_ORDER)
        return rows[np.argsort(keys, kind="stable")], batches


def batch_width(longest: AnyInt) -> AnyInt:
    """Columns of a batch whose longest row has so many tokens (one number, or an array of them)."""
    return -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


def cells_of_batches(lengths: NDArray[np.int64], batch_size: int) -> NDArray[np.int64]:
    """Cells, padding included, of each batch that a list of sequences is cut into, from their lengths."""
    starts = np.arange(0, len(lengths), batch_size)
    return batch_width(np.maximum.reduceat(lengths, starts)) * np.diff(starts, append=len(lengths))


def longest_step(
    cells_of_epoch: Callable[[int], NDArray[np.int64]], batches_per_epoch: int, *, first: int, total_steps: int
) -> int:
    """The earliest of the steps from `first` to before `total_steps` with the most cells, from the cells of each step
    of an epoch."""
    best, most_cells = first, 0
    for epoch in range(first // batches_per_epoch, -(-total_steps // batches_per_epoch)):
        start = epoch * batches_per_epoch
        cells = cells_of_epoch(epoch)[: total_steps - start]
        cells[: max(0, first - start)] = 0
        place = int(cells.argmax())
        if cells[place] > most_cells:
            best, most_cells = start + place, int(cells[place])
    return best


def shuffled_range(num_items: int, *words: int) -> NDArray[np.int64]:
    """`seeding.shuffled(range(num_items), *words)` [num_items]."""
    keys = np.empty(num_items, dtype=np.uint64)
    start = np.uint64(mix(*words))
    for first in range(0, num_items, _BLOCK):
        part = keys[first : first + _BLOCK]
        part[:] = np.arange(first, first + len(part), dtype=np.uint64)
        _mix_into(part, start)
    return np.argsort(keys, kind="stable")


def _mix_into(words: NDArray[np.uint64], h: np.uint64) -> None:
    """One more word of `seeding.mix` for each element, in place; unsigned arithmetic wraps as it is to."""
    np.bitwise_xor(words, h, out=words)
    words += _GAMMA
    words ^= words >> np.uint64(30)
    words *= _MIX_1
    words ^= words >> np.uint64(27)
    words *= _MIX_2
    words ^= words >> np.uint64(31)
