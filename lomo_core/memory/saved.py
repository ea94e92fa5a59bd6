"""Counts what autograd keeps of a forward pass: tensor by tensor, where the heap's growth knows only bytes.

Inside of `counting()`, `torch.autograd.graph.saved_tensors_hooks` shows each tensor as it is saved. Counted are its
storage's bytes, each storage once, the model's own parameters and buffers not at all. What this rests on:

- A packed tensor is given back as an alias (`detach()`): the same memory and the same bits. One that is given back as
  it is would make the graph hold itself, and with it the activations, until Python's collector comes by.
- Nothing but addresses and sizes is held. A saved storage stays where it is as long as its graph does; that of a part
  of the graph which is dropped before the pass ends is counted too, unless another one takes its address.
- A checkpointed block shows only its input: hooks of its own hide the rest, which is not kept. Its other arguments
  (masks, positions) are kept by what will call it again and pass no hook: they are counted where the block is called.
- Not counted: the graph's own nodes, about 45 kB of heap a block, whatever the batch; what a function keeps as an
  attribute and not by `save_for_backward` (`vocabulary_head.py`: the numbers of the rows that wait, 8 bytes a token).
- Where hooks have packed a tensor, autograd no longer notices that it was changed in place since: steps that are not
  counted keep that check.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from lomo_core.model import find_blocks


class SavedTensors:
    """The storages that forward passes inside of `counting()` have saved, by address."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: set[int] = set()
        self._saved: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        """Of the storages saved in the last `counting()`."""
        return sum(self._saved.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around one forward pass; the backward pass comes after it."""
        self._saved.clear()
        # Anew each time: whoever moves a model gives its parameters other storages.
        self._known = {
            tensor.untyped_storage().data_ptr() for tensor in (*self._model.parameters(), *self._model.buffers())
        }
        handles = [
            block.register_forward_pre_hook(self._note_arguments, with_kwargs=True)
            for block in find_blocks(self._model)
        ]
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _pack(self, tensor: Tensor) -> Tensor:
        self._note(tensor)
        return tensor.detach()

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._known:
            self._saved[address] = storage.nbytes()

    def _note_arguments(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # transformers' own flag (modeling_layers.GradientCheckpointingLayer).
        if not (getattr(block, "gradient_checkpointing", False) and block.training and torch.is_grad_enabled()):
            return
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._note(leaf)


def _unpack(tensor: Tensor) -> Tensor:
    return tensor
