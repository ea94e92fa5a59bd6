"""`python -m lomo_core calibrate`: what this host adds to every plan, from a step of a tiny model in this process.

The same step, of any model and setting, is what the memory benchmark measures (`bench/memory_cell.py`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import transformers

from lomo_core.data.batches import Batch, collate
from lomo_core.data.template import EncodedRow
from lomo_core.errors import ConfigError
from lomo_core.execute.plain import PlainExecutor
from lomo_core.memory.meter import Meter, reset_resident_peak, resident_peak_bytes
from lomo_core.memory.plan import Setting, plan
from lomo_core.memory.process import Calibration
from lomo_core.model import DTYPES, enable_activation_checkpointing, pick_device
from lomo_core.optim import AdaLomo, Lomo
from lomo_core.optim.baselines import Baseline, BaselineName
from lomo_core.optim.protocol import RunOptimizer
from lomo_core.tokenizer import silence_transformers

_CPU = torch.device("cpu")
_RATE = 1e-4
# One million parameters: 4 MB beside the hundreds that are measured.
TINY_MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
}
_SEQ = 128
TINY_SETTING = Setting(
    precision="fp32", batch_size=4, seq_length=_SEQ, is_padded=False, trained_share=(_SEQ - 1) / _SEQ
)


@dataclass(frozen=True, slots=True)
class SampleRun:
    """A model with random weights and what trains it, on the CPU. Rows have one length, and all their tokens but the
    first a loss."""

    model: Any
    optimizer: RunOptimizer
    meter: Meter
    executor: PlainExecutor
    batch: Batch

    def step(self) -> None:
        """One training step, always on the same batch."""
        self.executor.run([self.batch])


def make_sample_run(architecture: Any, setting: Setting) -> SampleRun:
    """A run of the model that transformers builds from a configuration."""
    torch.manual_seed(0)
    auto_model: Any = transformers.AutoModelForCausalLM
    model = auto_model.from_config(architecture, dtype=DTYPES[setting.precision])
    if setting.activation_checkpointing:
        enable_activation_checkpointing(model)
    optimizer = _optimizer(setting, model)
    meter = Meter(model, optimizer, _CPU)
    batch = _batch(setting, architecture.vocab_size)
    return SampleRun(model, optimizer, meter, PlainExecutor(model, optimizer, meter), batch)


def resident_bytes() -> int:
    """Resident set of this process now (where the peak cannot be reset: its peak so far)."""
    reset_resident_peak()
    return resident_peak_bytes()


def process_peak_of_step(run: SampleRun) -> int:
    """The largest resident set during a step, not the run's first, which loads libraries."""
    run.step()
    reset_resident_peak()
    run.step()
    return resident_peak_bytes()


def calibrate() -> Calibration:
    """Measure this host. Takes about 8 s, most of it imports and the tiny model's shapes.

    Raises:
        ConfigError: runs are on a CUDA device here, whose plans need none.
    """
    if pick_device() != _CPU:
        raise ConfigError("this host trains on a CUDA device: only plans for CPU hosts are calibrated")
    silence_transformers()
    architecture = transformers.AutoConfig.for_model(**TINY_MODEL)
    base = resident_bytes()
    peak = process_peak_of_step(make_sample_run(architecture, TINY_SETTING))
    # A run does not load it: before, it would be in the figures.
    shapes = importlib.import_module("lomo_core.memory.shapes").read_shapes(architecture)
    tiny = plan(shapes, TINY_SETTING)
    return Calibration.of_step(base_bytes=base, process_peak_bytes=peak, tiny=tiny)


def _optimizer(setting: Setting, model: Any) -> RunOptimizer:
    if not setting.is_fused:
        return Baseline(cast(BaselineName, setting.optimizer), model.parameters(), _RATE)
    rule = Lomo if setting.optimizer == "lomo" else AdaLomo
    return rule(model.parameters(), _RATE, rounding=setting.rounding)


def _batch(setting: Setting, vocab_size: int) -> Batch:
    rows, tokens = setting.batch_size, setting.seq_length
    ids = np.random.default_rng(0).integers(0, vocab_size, (rows, tokens), dtype=np.int32)
    return collate([EncodedRow(row, np.arange(tokens) > 0, is_cut=False) for row in ids], pad_token_id=0)
