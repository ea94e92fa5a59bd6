"""How rows become tensors.

Rows are padded on the left: the answers of a batch then end in the same column, and the columns that the head has to
compute are few.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lomo_core.data.template import EncodedRow

IGNORE = -100
# Few different widths: the CPU's matrix library keeps code and buffers for every shape it has seen (SmolLM2, 100
# steps of about 30 widths: 300 MB), and tensor cores like multiples of 8.
_WIDTH_MULTIPLE = 8

AnyInt = TypeVar("AnyInt", int, NDArray[np.int64])


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


def batch_width(longest: AnyInt) -> AnyInt:
    """Columns of a batch whose longest row has so many tokens (one number, or an array of them)."""
    return -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


def positions(attention_mask: Tensor) -> Tensor:
    """Position of each token in its row [B, T] int64; 0 at padding."""
    return (attention_mask.cumsum(dim=-1) - 1).clamp_(min=0)
