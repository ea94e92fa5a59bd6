"""Faults in a run's numbers that its data cause: a token whose activations overflow, a batch that does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def spoilt_token(token_id: int, *, gradient_only: bool = False) -> Iterator[None]:
    """In every model, batches with this token have a loss of nan, or a finite loss with an infinite gradient."""

    def spoil(ids: Tensor, output: Tensor) -> Tensor:
        if not bool((ids == token_id).any()):
            return output
        if not gradient_only:
            return output * math.nan
        if output.requires_grad:
            output.register_hook(lambda grad: grad * math.inf)
        return output

    with _embedding_hook(spoil):
        yield


@contextmanager
def memory_for(num_cells: int) -> Iterator[list[int]]:
    """Batches with more cells than this run out of memory; gives the cells of those that were tried."""
    tried: list[int] = []

    def refuse(ids: Tensor, output: Tensor) -> Tensor:
        tried.append(ids.numel())
        if ids.numel() > num_cells:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return output

    with _embedding_hook(refuse):
        yield tried


@contextmanager
def _embedding_hook(change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Call `change(ids, embeddings)` in every embedding of every model, also of those that are yet to be loaded."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return change(arguments[0], output) if isinstance(module, nn.Embedding) else output

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
