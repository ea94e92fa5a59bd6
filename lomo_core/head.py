"""The loss over the vocabulary, for the tokens that have one and no others.

The model's own head stays in use (soft-capping, scaling and all), but it is given only the columns that carry a
label, by transformers' `logits_to_keep`. Cross-entropy then goes through them in fp32, a chunk of rows at a time:
neither fp32 logits nor their fp32 gradient ever exist as a whole.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lomo_core.data.batches import IGNORE, Batch

# Rows of logits in fp32 at once: at a vocabulary of 50 k 25 MB, and no slower than all rows together.
_CHUNK_ROWS = 128


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """Loss of a batch. `loss`: mean over its trained tokens, 0-dim fp32; `num_correct`: 0-dim int64."""

    loss: Tensor
    num_correct: Tensor


def batch_loss(model: Any, batch: Batch) -> BatchLoss:
    """Run the model and its head on the columns that carry a label, and take the mean loss over the trained tokens."""
    # A label belongs to the column before it: that one predicts it.
    targets = batch.labels[:, 1:]
    columns = (targets != IGNORE).any(dim=0).nonzero().squeeze(1)
    targets = targets.index_select(1, columns)
    logits = column_logits(model, batch, columns)
    summed, correct = ChunkedCrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]  # torch's apply
    return BatchLoss(loss=summed / batch.num_trained, num_correct=correct)


def column_logits(model: Any, batch: Batch, columns: Tensor) -> Tensor:
    """Logits [B, len(columns), V] of the model for the given columns (int64 [n]) of the batch."""
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    accepted = accepted_arguments(model)
    if "position_ids" in accepted:
        inputs["position_ids"] = batch.position_ids
    if "logits_to_keep" in accepted:
        logits: Tensor = model(**inputs, logits_to_keep=columns).logits
        return logits
    # An architecture without the option computes all logits; the loss is the same.
    return torch.index_select(model(**inputs).logits, 1, columns)


def accepted_arguments(model: Any) -> set[str]:
    """Names of the arguments of the model's forward."""
    return set(inspect.signature(model.forward).parameters)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy in nats and the number of right first guesses, computed in fp32 a chunk of rows at a time.

    logits [..., V] of any float dtype, targets [...] int64 with `IGNORE` where there is no loss. Keeps the logits and
    one log-sum-exp per token for the backward pass, which can run twice; its gradient has the logits' dtype.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (sum of losses, 0-dim fp32; number of tokens guessed right, 0-dim int64)."""
        flat = logits.reshape(-1, logits.shape[-1])
        rows = (targets.reshape(-1) != IGNORE).nonzero().squeeze(1)
        wanted = targets.reshape(-1)[rows]
        lse = torch.empty(rows.shape, dtype=torch.float32, device=logits.device)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        correct = torch.zeros((), dtype=torch.int64, device=logits.device)
        for first in range(0, rows.numel(), _CHUNK_ROWS):
            part = slice(first, first + _CHUNK_ROWS)
            chunk, right = flat[rows[part]].float(), wanted[part]
            lse[part] = chunk.logsumexp(dim=1)
            total += (lse[part] - chunk.gather(1, right.unsqueeze(1)).squeeze(1)).sum(dtype=torch.float64)
            correct += (chunk.argmax(dim=1) == right).sum()
        ctx.save_for_backward(logits, rows, wanted, lse)
        ctx.mark_non_differentiable(correct)
        return total.float(), correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        """softmax - one-hot at the rows with a loss, 0 elsewhere, times the incoming gradient."""
        logits, rows, wanted, lse = ctx.saved_tensors
        flat = logits.reshape(-1, logits.shape[-1])
        result = torch.zeros_like(flat)
        for first in range(0, rows.numel(), _CHUNK_ROWS):
            part = slice(first, first + _CHUNK_ROWS)
            p = flat[rows[part]].float().sub_(lse[part].unsqueeze(1)).exp_()
            p.scatter_add_(1, wanted[part].unsqueeze(1), torch.full_like(lse[part].unsqueeze(1), -1.0))
            result[rows[part]] = p.mul_(grad).to(result.dtype)
        return result.view_as(logits), None
