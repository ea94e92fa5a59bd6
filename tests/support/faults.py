"""Faults in a run's numbers that its data cause: a token whose activations overflow, a batch that does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel


@contextmanager
def spoilt_token(token_id: int, *, gradient_only: bool = False) -> Iterator[None]:
    """In every Llama, batches with this token have a loss of nan, or a finite loss with an infinite gradient."""

    def spoil(model: LlamaModel, inputs: dict[str, Any], hidden: Tensor) -> Tensor:
        if not _has_token(model, inputs, token_id):
            return hidden
        if not gradient_only:
            return hidden * math.nan
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * math.inf)
        return hidden

    with _hidden_hook(spoil):
        yield


@contextmanager
def memory_for(num_cells: int) -> Iterator[list[int]]:
    """Batches with more cells than this run out of memory; gives the cells of those that were tried."""
    tried: list[int] = []

    def refuse(_: LlamaModel, inputs: dict[str, Any], hidden: Tensor) -> Tensor:
        mask = inputs.get("attention_mask")
        if mask is None:
            return hidden
        tried.append(mask.numel())
        if tried[-1] > num_cells:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden

    with _hidden_hook(refuse):
        yield tried


def _has_token(model: LlamaModel, inputs: dict[str, Any], token_id: int) -> bool:
    """Whether a batch holds a token; one of embeddings is looked through for the token's own."""
    if inputs.get("input_ids") is not None:
        return bool((inputs["input_ids"] == token_id).any())
    wanted = model.embed_tokens.weight[token_id]
    return bool((inputs["inputs_embeds"] == wanted).all(dim=-1).any())


@contextmanager
def _hidden_hook(change: Callable[[LlamaModel, dict[str, Any], Tensor], Tensor]) -> Iterator[None]:
    """Pass the last hidden states of every Llama through `change`, also of those that are yet to be loaded."""

    def hook(module: nn.Module, _: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
        if isinstance(module, LlamaModel):
            output.last_hidden_state = change(module, inputs, output.last_hidden_state)
        return output

    handle = nn.modules.module.register_module_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
