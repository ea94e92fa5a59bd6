"""What a run learns from: encoded rows, and which of them make up each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lomo_core.config import DataConfig
from lomo_core.data.batches import Batch, collate, collate_packed
from lomo_core.data.formats import RowReader
from lomo_core.data.order import BatchPlan
from lomo_core.data.packing import PackedPlan
from lomo_core.data.token_cache import EncodeOptions, TokenDataset, Watch, open_dataset

# Below `run_dir`, unless `cache_dir` names another folder.
CACHE_NAME = "tokens"


class TrainingData:
    """The batches of a run, by step number (from 0)."""

    def __init__(self, rows: TokenDataset, plan: BatchPlan | PackedPlan, *, pad_token_id: int) -> None:
        self.counts = rows.counts
        self.batches_per_epoch = plan.batches_per_epoch
        self._rows = rows
        self._plan = plan
        self._pad_token_id = pad_token_id

    def rows_of(self, step: int) -> list[int]:
        """Indexes (in the file's order) of the rows of the step after `step` others."""
        return self._plan.rows_of(step)

    def batch(self, step: int) -> Batch:
        """The batch of the step after `step` others, on the CPU."""
        if isinstance(self._plan, PackedPlan):
            sequences = [[self._rows.row(place) for place in rows] for rows in self._plan.sequences_of(step)]
            return collate_packed(sequences, pad_token_id=self._pad_token_id)
        return collate([self._rows.row(place) for place in self.rows_of(step)], pad_token_id=self._pad_token_id)

    def longest_step(self, *, first: int, total_steps: int) -> int:
        """The earliest of the steps from `first` to before `total_steps` whose batch has the most cells."""
        return self._plan.longest_step(first=first, total_steps=total_steps)


def open_training_data(
    data: DataConfig, tokenizer: Any, *, run_dir: str, batch_size: int, seed: int, watch: Watch
) -> TrainingData:
    """Encode the training file, or find it encoded.

    Raises:
        DataError, ModelError, DiskFullError: see `open_dataset`.
    """
    rows = open_dataset(
        RowReader(data.train_path, data_format=data.format, param="training_file"),
        tokenizer,
        options=EncodeOptions(max_seq_length=data.max_seq_length, train_on=data.train_on),
        cache_dir=cache_dir_of(data, run_dir),
        watch=watch,
    )
    plan: BatchPlan | PackedPlan
    if data.packing:
        plan = PackedPlan(rows.lengths, max_seq_length=data.max_seq_length, batch_size=batch_size, seed=seed)
        watch.say(f"{len(rows)} rows are packed into {plan.num_sequences} sequences")
    else:
        plan = BatchPlan(rows.lengths, batch_size=batch_size, seed=seed)
    return TrainingData(rows, plan, pad_token_id=tokenizer.pad_token_id)


def cache_dir_of(data: DataConfig, run_dir: str) -> Path:
    """Where a run keeps its encoded rows."""
    return Path(data.cache_dir) if data.cache_dir else Path(run_dir) / CACHE_NAME
