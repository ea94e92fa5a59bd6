"""Several short rows in one sequence, so that little is computed for padding.

Rows of a sequence do not see each other: their positions begin anew at 0, and with no attention mask given,
transformers cuts a sequence where its positions do (`masking_utils.find_packed_sequence_indices`; the attention
kernels with variable lengths do the same). Whether an architecture follows that is tried on the loaded model
(`packing_check.py`). The first token of a row has no label, so no row predicts the next one's beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lomo_core.data.order import cells_of_batches, longest_step, shuffled_range

# Keeps the words of the two uses of a seed apart from each other and from those of `order.py` and the trainer.
_PACKING, _SEQUENCE_ORDER = 5, 6
# Rows that are packed together: 7,200 rows of GSM8K (184 of SmolLM2's tokens on average) leave 3.9 % of sequences of
# 512 empty, in windows of 512 rows 4.1 %, in larger ones no less. One million rows take 1.4 s.
_ROWS_PER_WINDOW = 4096


class PackedPlan:
    """The batches of a run, by step number (from 0), each of `batch_size` sequences of at most `max_seq_length` tokens.

    Which rows share a sequence is a function of the seed alone, the order of the sequences one of (seed, epoch): so
    every epoch has the same number of steps, and the learning-rate schedule can be laid out before the first.
    """

    def __init__(
        self, lengths: Sequence[int] | NDArray[np.int32], *, max_seq_length: int, batch_size: int, seed: int
    ) -> None:
        self._batch_size = batch_size
        self._seed = seed
        row_lengths = np.asarray(lengths, dtype=np.int64)
        order = shuffled_range(len(row_lengths), seed, _PACKING)
        packed: list[NDArray[np.int64]] = []
        counts: list[NDArray[np.int64]] = []
        for first in range(0, len(order), _ROWS_PER_WINDOW):
            window = order[first : first + _ROWS_PER_WINDOW]
            sequences = _pack(window, row_lengths[window], capacity=max_seq_length)
            packed += [np.fromiter((row for sequence in sequences for row in sequence), dtype=np.int64)]
            counts += [np.fromiter(map(len, sequences), dtype=np.int64)]
        self._rows = np.concatenate(packed)
        """The rows of all sequences, one sequence after the other."""
        self._starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        """Where each sequence begins in them, and the end [num_sequences + 1]."""
        self._fill = np.add.reduceat(row_lengths[self._rows], self._starts[:-1])
        """Tokens of each sequence."""
        self.num_sequences = len(self._fill)
        self.batches_per_epoch = -(-self.num_sequences // batch_size)
        self._epoch = lru_cache(maxsize=1)(self._order_of_epoch)

    def sequences_of(self, step: int) -> list[list[int]]:
        """Indexes of the rows of each sequence of the step after `step` others."""
        epoch, place = divmod(step, self.batches_per_epoch)
        picked = self._epoch(epoch)[place * self._batch_size : (place + 1) * self._batch_size]
        return [self._rows[self._starts[at] : self._starts[at + 1]].tolist() for at in picked]

    def rows_of(self, step: int) -> list[int]:
        """Indexes of the rows of the step after `step` others."""
        return [row for sequence in self.sequences_of(step) for row in sequence]

    def longest_step(self, *, first: int, total_steps: int) -> int:
        """The earliest of the steps from `first` to before `total_steps` whose batch has the most cells, padding
        included."""
        return longest_step(self._cells_of_epoch, self.batches_per_epoch, first=first, total_steps=total_steps)

    def _cells_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        return cells_of_batches(self._fill[self._epoch(epoch)], self._batch_size)

    def _order_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        return shuffled_range(self.num_sequences, self._seed, epoch, _SEQUENCE_ORDER)


def _pack(rows: NDArray[np.int64], lengths: NDArray[np.int64], *, capacity: int) -> list[list[int]]:
    """Best fit, longest rows first: each goes to the sequence that it leaves the least room in, or to a new one."""
    sequences: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit n: there is a sequence with room for n tokens. The lowest bit from a length on is the best fit.
    rooms = 0
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, sequence = capacity, len(sequences)
            sequences.append([])
        sequences[sequence].append(int(rows[place]))
        by_room[room - length].append(sequence)
        rooms |= 1 << (room - length)
    return sequences
