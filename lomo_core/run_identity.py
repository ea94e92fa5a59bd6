"""What makes two runs the same: a hash of everything that decides their numbers. A checkpoint is only gone on from by a
run with the hash that it was written with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lomo_core.checkpoint import sha256_of_file
from lomo_core.config import TrainConfig

# Fields that change where or how often something is written, but no number of the run.
_NOT_OF_THE_RUN = (
    "run_dir",
    "model_path",
    "data",
    "resume_from",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "eval_every_steps",
    "sample_prompts",
    "sample_max_new_tokens",
    "shapes_path",
    "calibration",
)


def run_sha256(config: TrainConfig) -> str:
    """Hash of a run's settings, training data and base model; with early stopping or the best model to be kept, of its
    evaluations as well."""
    deciding: dict[str, Any] = {key: value for key, value in asdict(config).items() if key not in _NOT_OF_THE_RUN}
    # Every way to the exact norm gives the same bits.
    del deciding["optimizer"]["clip"]["exact"]
    deciding["max_seq_length"] = config.data.max_seq_length
    deciding["train_on"] = config.data.train_on
    deciding["format"] = config.data.format
    deciding["packing"] = config.data.packing
    deciding["train_sha256"] = sha256_of_file(Path(config.data.train_path))
    deciding["model_sha256"] = sha256_of_file(Path(config.model_path) / "config.json")
    if config.data.validation_path is not None and (config.keep_best or config.early_stopping_patience):
        deciding["eval_every_steps"] = config.eval_every_steps
        deciding["validation_format"] = config.data.validation_format
        deciding["validation_sha256"] = sha256_of_file(Path(config.data.validation_path))
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
