"""The model's last matrix and the loss in one, without logits and, under element-wise rules, without a [V, H] gradient.

With a vocabulary of 50 k the logits and the gradient of the head's weight are the largest things of a LOMO step: on
SmolLM2 at 1 x 256 in bf16 with activation checkpointing, 228 MiB above the weights, against 61 this way. The head
works on blocks of the vocabulary. Forward keeps one log-sum-exp per token. Backward makes each block's logits again,
and with them the finished gradient of that block of rows, which the optimizer uses at once; four matrix products
instead of three.

A tied weight gets gradient from the embedding too. Rows that the batch looks up (at most one per token) are held back
until the embedding's backward has added its part: every row still has one update, with its whole gradient. Rules that
need the whole tensor (AdaLomo's moments, the norm of a group) get one [V, H] buffer that both sides add to.

All of it stands on the head being nothing but `hidden @ weight.T`. Whether that is so is tried out on the loaded model
(to the bit), not looked up by its name: a model that scales or caps its logits keeps its own head (`head.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lomo_core.data.batches import IGNORE, Batch
from lomo_core.head import BatchLoss, accepted_arguments
from lomo_core.memory.allocator import trim_heap
from lomo_core.model import has_linear_head
from lomo_core.oom import is_out_of_memory
from lomo_core.optim.protocol import RunOptimizer

# Elements of a block of logits (4 MiB in fp32) and of its gradient (8 MiB). Below 256 rows the products get slow.
_LOGITS_ELEMENTS = 1 << 20
_GRADIENT_ELEMENTS = 1 << 21
_LEAST_ROWS = 256
_PROBE_TOKENS = 8
# What a forward raises that does not take embeddings in place of ids.
_PROBE_ERRORS = (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError)


@dataclass(slots=True)
class _Pass:
    """What the head and a tied weight's embedding share in one step."""

    head: VocabularyHead
    rows: Tensor
    """int64 [n], ascending: rows whose gradient is not complete before the embedding's backward."""
    held: Tensor | None = None
    """fp32 [n, H]: their gradient so far."""
    whole: Tensor | None = None
    """[V, H]: the head's gradient, where the rule needs the tensor as a whole."""


class VocabularyHead:
    """Loss of a batch through a model's body, with the head's weight [V, H] in blocks of rows."""

    def __init__(self, model: Any, optimizer: RunOptimizer | None) -> None:
        self._model = model
        self._body = model.base_model
        self._optimizer = optimizer
        self.weight: Tensor = model.get_output_embeddings().weight
        self._embedding: nn.Embedding = model.get_input_embeddings()
        self._is_trained = optimizer is not None and self.weight.requires_grad
        self._is_tied = self._is_trained and self._embedding.weight is self.weight
        self._in_rows = optimizer is not None and optimizer.takes_rows(self.weight)
        self._takes_positions = "position_ids" in accepted_arguments(self._body)
        # Autograd has to visit both sides although the weight is not an input.
        self._anchor = torch.zeros(0, device=self.weight.device, requires_grad=True)

    @classmethod
    def find(cls, model: Any, optimizer: RunOptimizer | None) -> VocabularyHead | None:
        """The head of a model, or None where the model does more than multiply by the head's weight."""
        if not has_linear_head(model):
            return None
        found = cls(model, optimizer)
        return found if found._agrees_with_model() else None

    def loss(self, batch: Batch) -> BatchLoss:
        """Mean cross-entropy in nats over the batch's trained tokens, in fp32."""
        targets = torch.full_like(batch.labels, IGNORE)
        # A label belongs to the column before it: that one predicts it.
        targets[:, :-1] = batch.labels[:, 1:]
        targets = targets.view(-1)
        places = (targets != IGNORE).nonzero().squeeze(1)
        shared = self._begin(batch.input_ids)
        hidden = self._hidden(batch, shared)
        if hidden.device.type == "cpu":
            trim_heap()
        picked = hidden.view(-1, hidden.shape[-1]).index_select(0, places)
        is_input = self._is_trained and not self._is_tied and not self._in_rows
        weight = self.weight if is_input else self.weight.detach()
        summed, correct = _Head.apply(picked, weight, self._anchor, targets[places], shared)  # type: ignore[no-untyped-call]
        return BatchLoss(loss=summed / batch.num_trained, num_correct=correct)

    def _begin(self, input_ids: Tensor) -> _Pass:
        if not (self._is_tied and self._in_rows):
            return _Pass(self, rows=input_ids.new_empty(0))
        rows = torch.unique(input_ids)
        padding = self._embedding.padding_idx
        # The embedding gives its padding row no gradient (torch.nn.Embedding, padding_idx): nothing to wait for.
        return _Pass(self, rows=rows if padding is None else rows[rows != padding])

    def _hidden(self, batch: Batch, shared: _Pass) -> Tensor:
        inputs: dict[str, Any] = {"attention_mask": batch.attention_mask, "use_cache": False}
        if self._takes_positions:
            inputs["position_ids"] = batch.position_ids
        if self._is_tied:
            source = self._anchor if self._in_rows else self.weight
            inputs["inputs_embeds"] = _TiedEmbedding.apply(source, batch.input_ids, shared)  # type: ignore[no-untyped-call]
        else:
            inputs["input_ids"] = batch.input_ids
        hidden: Tensor = self._body(**inputs).last_hidden_state
        return hidden

    @torch.no_grad()
    def _agrees_with_model(self) -> bool:
        """Whether the model's own logits are, to the bit, its body's output times the weight."""
        num_rows = self.weight.shape[0]
        ids = torch.arange(0, num_rows, max(1, num_rows // _PROBE_TOKENS), device=self.weight.device)[None]
        was_training = self._model.training
        self._model.eval()
        try:
            expected = self._model(input_ids=ids, use_cache=False).logits
            inputs = {"inputs_embeds": self._embedding(ids)} if self._is_tied else {"input_ids": ids}
            hidden = self._body(**inputs, use_cache=False).last_hidden_state
            return torch.equal(expected, functional.linear(hidden, self.weight))
        except _PROBE_ERRORS as error:
            if is_out_of_memory(error):
                raise
            return False
        finally:
            self._model.train(was_training)

    # -- called inside of the backward pass -----------------------------------------------------------------------

    def _take_block(self, shared: _Pass, first: int, grad: Tensor, span: tuple[int, int]) -> None:
        """Hand the gradient [n, H] of the rows from `first` on over, except for the rows that wait: those numbered
        `span` in `shared.rows`."""
        assert self._optimizer is not None
        low, high = span
        if low == high:
            self._optimizer.take_rows(self.weight, first, grad)
            return
        waiting = shared.rows[low:high]
        assert shared.held is not None
        shared.held[low:high] = grad[waiting - first].float()
        grad[waiting - first] = 0
        # A gradient of zero still decays the weights; these rows decay with their one update.
        kept = self.weight.detach()[waiting]
        self._optimizer.take_rows(self.weight, first, grad)
        self.weight.detach()[waiting] = kept

    def _finish_rows(self, shared: _Pass, ids: Tensor, grad: Tensor) -> None:
        """Add the embedding's gradient [..., H] to the rows that waited, and hand them over."""
        assert self._optimizer is not None
        assert shared.held is not None
        flat, grad = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        padding = self._embedding.padding_idx
        if padding is not None:
            some = (flat != padding).nonzero().squeeze(1)
            flat, grad = flat[some], grad[some]
        held = shared.held.index_add_(0, torch.searchsorted(shared.rows, flat), grad.float())
        self._optimizer.take_scattered_rows(self.weight, shared.rows, held.to(self.weight.dtype))
        self._optimizer.note_gradient(-held.nbytes)
        shared.held = None


class _TiedEmbedding(torch.autograd.Function):
    """Lookup [B, T] -> [B, T, H] in the tied weight, which completes the weight's gradient in its backward."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, ids: Tensor, shared: _Pass) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shared = shared
        return functional.embedding(ids, shared.head.weight.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        shared = ctx.shared
        head = shared.head
        (ids,) = ctx.saved_tensors
        if head._in_rows:  # noqa: SLF001 - the two halves of one class, apart because autograd wants static methods
            head._finish_rows(shared, ids, grad)  # noqa: SLF001 - see above
            return None, None, None
        whole, shared.whole = shared.whole, None
        padding = head._embedding.padding_idx  # noqa: SLF001 - see above
        flat, grad = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        some = slice(None) if padding is None else (flat != padding).nonzero().squeeze(1)
        whole.index_add_(0, flat[some], grad[some])
        head._optimizer.note_gradient(-whole.nbytes)  # noqa: SLF001 - see above; from here on the hook counts it
        return whole, None, None


class _Head(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T`: hidden [T, H], weight [V, H], targets int64 [T]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, _: Tensor, targets: Tensor, shared: _Pass
    ) -> tuple[Tensor, Tensor]:
        """Returns (sum of losses, 0-dim fp32; number of right first guesses, 0-dim int64)."""
        top = torch.full(targets.shape, -torch.inf, device=hidden.device)
        total, wanted, guess = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(targets)
        for first, block in _blocks(weight, hidden):
            logits = (hidden @ block.t()).float()
            at, is_inside = _places(targets, first, block.shape[0])
            wanted += logits.gather(1, at).squeeze(1) * is_inside
            best, where = logits.max(dim=1)
            guess = torch.where(best > top, where + first, guess)
            new = torch.maximum(top, best)
            total.mul_((top - new).exp_()).add_(logits.sub_(new.unsqueeze(1)).exp_().sum(dim=1))
            top = new
            # Else this block's would be alive until the next one's are made.
            del logits
        lse = top + total.log_()
        ctx.save_for_backward(hidden, targets, lse)
        # Not saved as a tensor: its rows are updated while backward still walks over the others.
        ctx.weight, ctx.shared = weight.detach(), shared
        correct = (guess == targets).sum()
        ctx.mark_non_differentiable(correct)
        return (lse - wanted).sum(dtype=torch.float64).float(), correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, targets, lse = ctx.saved_tensors
        weight, shared = ctx.weight, ctx.shared
        whole, spans = _prepare(shared, weight, hidden)
        grad_hidden = torch.zeros(hidden.shape, device=hidden.device)
        for number, (first, block) in enumerate(_blocks(weight, hidden)):
            p = (hidden @ block.t()).float().sub_(lse.unsqueeze(1)).exp_()
            at, is_inside = _places(targets, first, block.shape[0])
            p.scatter_add_(1, at, -is_inside.unsqueeze(1).float())
            p = p.mul_(grad).to(hidden.dtype)
            grad_hidden += p @ block
            if whole is not None:
                torch.mm(p.t(), hidden, out=whole[first : first + block.shape[0]])
            elif spans is not None:
                shared.head._take_block(shared, first, p.t() @ hidden, spans[number])  # noqa: SLF001 - see above
            del p
        is_input = ctx.needs_input_grad[1]
        return grad_hidden.to(hidden.dtype), whole if is_input else None, None, None, None


def _prepare(shared: _Pass, weight: Tensor, hidden: Tensor) -> tuple[Tensor | None, list[tuple[int, int]] | None]:
    """Where the weight's gradient goes: (a buffer [V, H], or None; for each block the span of rows that wait, or
    None). Both None: the weight is not trained."""
    head = shared.head
    if not head._is_trained:  # noqa: SLF001 - see above
        return None, None
    optimizer = head._optimizer  # noqa: SLF001 - see above
    assert optimizer is not None
    if not head._in_rows:  # noqa: SLF001 - see above
        whole = torch.empty_like(weight)
        if head._is_tied:  # noqa: SLF001 - see above
            shared.whole = whole
            optimizer.note_gradient(whole.nbytes)
        return whole, None
    shared.held = torch.zeros((shared.rows.numel(), weight.shape[1]), device=weight.device)
    optimizer.note_gradient(shared.held.nbytes)
    step = _block_rows(hidden)
    edges = torch.arange(0, weight.shape[0] + step, step, device=weight.device)
    bounds = torch.searchsorted(shared.rows, edges).tolist()
    return None, list(pairwise(bounds))


def _block_rows(hidden: Tensor) -> int:
    num_tokens, width = hidden.shape
    return max(_LEAST_ROWS, min(_LOGITS_ELEMENTS // max(1, num_tokens), _GRADIENT_ELEMENTS // width))


def _blocks(weight: Tensor, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, block [n, H]) over the whole weight."""
    step = _block_rows(hidden)
    for first in range(0, weight.shape[0], step):
        yield first, weight[first : first + step]


def _places(targets: Tensor, first: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Column of each target in a block [T, 1], clamped into it, and whether it is inside [T] (no wait for the
    device, as picking the ones inside would be)."""
    local = targets - first
    is_inside = (local >= 0) & (local < num_rows)
    return local.clamp(0, num_rows - 1).unsqueeze(1), is_inside
