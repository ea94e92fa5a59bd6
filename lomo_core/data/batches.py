"""Which rows make up a step, and how they become tensors.

The order is a pure function of (seed, epoch), so the position in the data is the step number and nothing else has to be
saved. Rows are padded on the left: the answers of a batch then end in the same column, and the columns that the head
has to compute are few.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lomo_core.data.template import EncodedRow
from lomo_core.seeding import shuffled

IGNORE = -100
# Rows are sorted by length within so many batches: enough to leave little padding, few enough to stay random.
_BATCHES_PER_WINDOW = 8
# Few different widths: the CPU's matrix library keeps code and buffers for every shape it has seen (SmolLM2, 100
# steps of about 30 widths: 300 MB), and tensor cores like multiples of 8.
_WIDTH_MULTIPLE = 8
# Keeps the words of the three uses of a seed apart.
_ROWS, _BATCH_ORDER = 1, 2


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, [B, T], padded on the left."""

    input_ids: Tensor
    """int64"""
    attention_mask: Tensor
    """int64, 1 where there is a token"""
    position_ids: Tensor
    """int64, from 0 at each row's first token"""
    labels: Tensor
    """int64: the token itself where it is a target of the loss, else `IGNORE`"""
    num_tokens: int
    num_trained: int

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            labels=self.labels.to(device),
        )


class BatchPlan:
    """The batches of a run, by step number (from 0)."""

    def __init__(self, lengths: list[int], *, batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self.batches_per_epoch = -(-len(lengths) // batch_size)
        self._epoch = lru_cache(maxsize=1)(self._order_of_epoch)

    def rows_of(self, step: int) -> list[int]:
        """Indexes of the rows of the step after `step` others; the last batch of an epoch may be smaller."""
        epoch, place = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch)[place]

    def _order_of_epoch(self, epoch: int) -> list[list[int]]:
        rows = shuffled(list(range(len(self._lengths))), self._seed, epoch, _ROWS)
        size = self._batch_size
        window = size * _BATCHES_PER_WINDOW
        batches: list[list[int]] = []
        for first in range(0, len(rows), window):
            part = sorted(rows[first : first + window], key=self._lengths.__getitem__)
            batches += [part[at : at + size] for at in range(0, len(part), size)]
        order = shuffled(list(range(len(batches))), self._seed, epoch, _BATCH_ORDER)
        return [batches[place] for place in order]


def collate(rows: list[EncodedRow], *, pad_token_id: int) -> Batch:
    """Pad rows on the left to the longest, rounded up; what is padding follows from lengths, never from token ids."""
    width = batch_width(max(len(row.ids) for row in rows))
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids = torch.from_numpy(row.ids).long()
        start = width - len(ids)
        input_ids[place, start:] = ids
        attention_mask[place, start:] = 1
        labels[place, start:] = torch.where(torch.from_numpy(row.trained), ids, IGNORE)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions(attention_mask),
        labels=labels,
        num_tokens=sum(len(row.ids) for row in rows),
        num_trained=sum(row.num_trained for row in rows),
    )


def batch_width(longest: int) -> int:
    """Columns of a batch whose longest row has so many tokens."""
    return -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


def positions(attention_mask: Tensor) -> Tensor:
    """Position of each token in its row [B, T] int64; 0 at padding."""
    return (attention_mask.cumsum(dim=-1) - 1).clamp_(min=0)
