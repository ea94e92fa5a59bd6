"""How rows become tensors.

Rows are padded on the left: the answers of a batch then end in the same column, and the columns that the head has to
compute are few.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lomo_core.data.order import batch_width
from lomo_core.data.template import EncodedRow

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, [B, T], padded on the left."""

    input_ids: Tensor
    """int64"""
    attention_mask: Tensor | None
    """int64, 1 where there is a token; None: packed rows, told apart by where `position_ids` begin anew"""
    position_ids: Tensor
    """int64, from 0 at each row's first token; 0 at padding"""
    labels: Tensor
    """int64: the token itself where it is a target of the loss, else `IGNORE`"""
    num_tokens: int
    num_trained: int

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            labels=self.labels.to(device),
        )


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


def collate_packed(sequences: list[list[EncodedRow]], *, pad_token_id: int) -> Batch:
    """A batch of packed sequences [B, T], padded on the left. Its rows are told apart by positions alone: it has no
    attention mask. A column of padding is a row of its own, at position 0."""
    width = batch_width(max(sum(len(row.ids) for row in sequence) for sequence in sequences))
    input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.int64)
    position_ids = torch.zeros((len(sequences), width), dtype=torch.int64)
    labels = torch.full((len(sequences), width), IGNORE, dtype=torch.int64)
    for place, sequence in enumerate(sequences):
        start = width - sum(len(row.ids) for row in sequence)
        for row in sequence:
            ids = torch.from_numpy(row.ids).long()
            part = slice(start, start + len(ids))
            input_ids[place, part] = ids
            position_ids[place, part] = torch.arange(len(ids))
            labels[place, part] = torch.where(torch.from_numpy(row.trained), ids, IGNORE)
            start += len(ids)
    rows = [row for sequence in sequences for row in sequence]
    return Batch(
        input_ids=input_ids,
        attention_mask=None,
        position_ids=position_ids,
        labels=labels,
        num_tokens=sum(len(row.ids) for row in rows),
        num_trained=sum(row.num_trained for row in rows),
    )


def positions(attention_mask: Tensor) -> Tensor:
    """Position of each token in its row [B, T] int64; 0 at padding."""
    return (attention_mask.cumsum(dim=-1) - 1).clamp_(min=0)
