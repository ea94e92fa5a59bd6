"""Whether a loaded model keeps packed rows apart, tried on a few tokens: masks differ from architecture to
architecture, and rows that see each other would train without any sign of it."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lomo_core.data.batches import Batch, collate_packed
from lomo_core.data.template import EncodedRow
from lomo_core.errors import ConfigError

# A model that keeps rows apart passes on nothing at all (0 exactly, unless experts are shared out over the batch);
# one that does not passes on all that it would without packing.
_MAX_LEAK = 0.02
# Relative error of logits between shapes: measured on SmolLM2 5e-7 in fp32 and 8e-3 in bf16.
_MAX_ERROR = {torch.float32: 1e-3}
_MAX_ERROR_16_BIT = 5e-2
_ROW_TOKENS = 7


def check_packing(model: Any) -> None:
    """Compare the logits of a packed row with those of the row alone, and beside another neighbour.

    Raises:
        ConfigError: the rows see each other, or are at other positions than alone.
    """
    architecture = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _refusal(architecture, "it takes no positions")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, other, last = (_row(start, vocabulary) for start in (0, 1, 2))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            alone = _last_logits(model, collate_packed([[last]], pad_token_id=0))
            # Two sequences, since some attention kernels tell rows apart in a batch of one alone.
            beside = [collate_packed([[row, last], [last]], pad_token_id=0) for row in (first, other)]
            packed, packed_other = (_last_logits(model, batch) for batch in beside)
            seen, seen_other = (_last_logits(model, batch, is_mixed=True) for batch in beside)
    finally:
        model.train(was_training)
    leak = float((packed - packed_other).abs().max())
    sight = float((seen - seen_other).abs().max())
    # Put so that a nan fails too.
    if not leak <= _MAX_LEAK * sight:
        raise _refusal(architecture, "a row sees the rows before it")
    error = float((packed - alone).norm() / alone.norm())
    if not error <= _MAX_ERROR.get(next(model.parameters()).dtype, _MAX_ERROR_16_BIT):
        raise _refusal(architecture, "a row's logits are not those of the row alone")


def _refusal(architecture: str, reason: str) -> ConfigError:
    return ConfigError(f"rows of a {architecture} cannot be packed ({reason}): set packing to false", param="packing")


def _row(start: int, vocabulary: int) -> EncodedRow:
    """A row of different tokens, spread over the vocabulary; no two starts have one in common."""
    ids = (np.arange(_ROW_TOKENS) * 3 + start) * max(1, vocabulary // (3 * _ROW_TOKENS)) % vocabulary
    return EncodedRow(ids.astype(np.int32), np.ones(_ROW_TOKENS, dtype=np.bool_), is_cut=False)


def _last_logits(model: Any, batch: Batch, *, is_mixed: bool = False) -> Tensor:
    """Logits [_ROW_TOKENS, V] in fp32 of the last row of the batch's first sequence; mixed: as if all tokens before it
    were its own."""
    batch = batch.to(next(model.parameters()).device)
    mask = torch.ones_like(batch.input_ids) if is_mixed else batch.attention_mask
    logits: Tensor = model(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
    ).logits
    return logits[0, -_ROW_TOKENS:].float()
