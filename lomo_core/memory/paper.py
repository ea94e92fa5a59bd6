"""The memory tables of the LOMO paper (arXiv 2306.09782v2, tables 1 and 2) beside this plan. Torch-free.

Units are GiB, although the paper writes GB: its 12.55 for LLaMA-7B in fp16 is 6.738e9 x 2 / 2^30.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from lomo_core.config import OptimizerName
from lomo_core.memory.model_shapes import ModelShapes
from lomo_core.memory.plan import Plan, Setting, plan

GIB = 1 << 30
Category = Literal["parameters", "gradients", "optimizer", "activations", "total"]

# Table 1, LLaMA-7B, batch 8 of 512 tokens: (parameters, gradients, optimizer states, activations, total). The totals
# without checkpointing are 1.00 above the sums of their columns in the paper itself.
_TABLE1: dict[tuple[OptimizerName, bool], tuple[float, float, float, float, float]] = {
    ("adamw", False): (12.55, 12.55, 75.31, 45.61, 147.02),
    ("adamw", True): (12.55, 12.55, 75.31, 1.79, 102.20),
    ("sgd", False): (12.55, 12.55, 25.10, 45.61, 96.81),
    ("sgd", True): (12.55, 12.55, 25.10, 1.79, 51.99),
    ("lomo", False): (12.55, 0.24, 0.0, 45.61, 59.40),
    ("lomo", True): (12.55, 0.24, 0.0, 1.79, 14.58),
}
_TABLE1_SIZE = (8, 512)
# Table 2, LOMO, one row of 1024 tokens per card: (model, cards, GiB per card).
_TABLE2 = (("7B", 1, 13.61), ("13B", 2, 15.92), ("30B", 4, 19.78), ("65B", 8, 19.18))
_TABLE2_SEQ = 1024
_CARD_BYTES = 24 * GIB


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of table 1."""

    optimizer: OptimizerName
    activation_checkpointing: bool
    category: Category
    paper_gib: float
    plan_gib: float
    """To two decimals, as the paper's."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of table 2: memory per card."""

    model: str
    num_cards: int
    paper_gib: float
    plan_gib: float
    fits: bool
    """Into 24 GiB."""


def table1() -> list[Cell]:
    """Every figure of table 1. Activations without checkpointing are those that a 2023 implementation kept
    (`activations_of_2023`); `activations_today` has today's."""
    cells = []
    for (optimizer, checkpointing), paper in _TABLE1.items():
        found = _table1_plan(optimizer, checkpointing=checkpointing)
        activations = found.activations_bytes if checkpointing else activations_of_2023(*_TABLE1_SIZE)
        parts = (found.parameters_bytes, found.gradients_bytes, found.optimizer_bytes, activations)
        values = (*parts, sum(parts))
        categories: tuple[Category, ...] = ("parameters", "gradients", "optimizer", "activations", "total")
        cells += [
            Cell(optimizer, checkpointing, category, theirs, round(ours / GIB, 2))
            for category, theirs, ours in zip(categories, paper, values, strict=True)
        ]
    return cells


def table2() -> list[Row]:
    """Every row of table 2, by this engine's way to share weights (see `plan.Setting.num_ranks`)."""
    rows = []
    for model, num_cards, paper_gib in _TABLE2:
        setting = Setting(
            optimizer="lomo", precision="fp16", seq_length=_TABLE2_SEQ, num_ranks=num_cards, is_padded=False
        )
        found = plan(llama(model), setting)
        rows.append(Row(model, num_cards, paper_gib, round(found.peak_bytes / GIB, 2), found.peak_bytes <= _CARD_BYTES))
    return rows


def activations_today() -> dict[str, float]:
    """GiB of activations of LLaMA-7B at table 1's size without checkpointing, by attention, as today's transformers
    keeps them."""
    batch, seq = _TABLE1_SIZE
    return {
        attention: plan(
            llama("7B"),
            Setting(
                precision="fp16",
                batch_size=batch,
                seq_length=seq,
                activation_checkpointing=False,
                attention=attention,
                is_padded=False,
                head="transformers",
            ),
        ).activations_bytes
        / GIB
        for attention in ("sdpa", "eager")
    }


def activations_of_2023(batch: int, seq: int) -> int:
    """Bytes that LLaMA-7B's forward pass kept in transformers 4.28 (April 2023) in fp16, without checkpointing.

    In units of X = B T H 2 bytes, and for the scores of a heads S = a B T^2 elements (2 S bytes = a T / H X):

    - each RMSNorm 5: its fp32 copy, kept by pow (2), its input (1), the normalised value in fp16 (1), its output (1);
    - attention 4 and the scores: rotated queries and keys (2), values (1), the output projection's input (1);
      `torch.max` with the dtype's least value keeps the scores (2 S bytes), softmax in fp32 its result (4 S), the
      product with the values the same in fp16 (2 S);
    - MLP 4 I / H (I inner width): the gate, silu of the gate, the other branch, their product.

    After the blocks: the last norm, logits in fp16 and what cross-entropy keeps of them, in fp16 too. Embedding output:
    counted as the first norm's input.
    """
    hidden, inner, heads, layers, vocabulary = 4096, 11008, 32, 32, 32000
    x = batch * seq * hidden * 2
    scores = heads * batch * seq * seq
    block = 2 * 5 * x + 4 * x + 8 * scores + 4 * x * inner // hidden
    return layers * block + 5 * x + 2 * batch * seq * vocabulary * 2


@cache
def llama(size: str) -> ModelShapes:
    """The shapes of a LLaMA (arXiv 2302.13971, table 2), as `shapes.py` reads them; kept as a file, since reading them
    takes torch."""
    text = resources.files("lomo_core.memory").joinpath("llama", f"{size}.json").read_text(encoding="utf-8")
    return ModelShapes.from_json(text)


def _table1_plan(optimizer: OptimizerName, *, checkpointing: bool) -> Plan:
    batch, seq = _TABLE1_SIZE
    setting = Setting(
        optimizer=optimizer,
        precision="fp16",
        batch_size=batch,
        seq_length=seq,
        activation_checkpointing=checkpointing,
        attention="eager",
        is_padded=False,
        head="transformers",
        fp32_master=True,
    )
    return plan(llama("7B"), setting)
