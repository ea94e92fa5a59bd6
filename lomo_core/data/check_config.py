"""What the checking of a job's files, and the preview of one of their rows, is given: JSON in a file. Torch-free."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from lomo_core.config import DataFormat, TrainOn
from lomo_core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """A job's files, and what decides what is made of them. Paths are absolute."""

    train_path: str
    report_path: str = ""
    """Where the report is written."""
    model_path: str | None = None
    """The base model's folder, of which the tokenizer is read; None: not here yet, and the rows are checked without."""
    validation_path: str | None = None
    format: DataFormat = "auto"
    validation_format: DataFormat = "auto"
    max_seq_length: int = 512
    train_on: TrainOn = "assistant"
    packing: bool = False
    n_epochs: int = 1
    batch_size: int = 1
    max_steps: int | None = None
    seed: int = 0
    row: int = 1
    """Of a preview: which row of the training file, from 1."""
    most_cpu_s: int = 60
    """The kernel ends the process after so much."""
    most_bytes: int = 3 << 30
    """Of private memory: the tokenizer's libraries take 0.3 GiB, the rest is room for rows."""

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> CheckConfig:
        """What stands in a file.

        Raises:
            ConfigError: it cannot be read, or holds other fields.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"the specification {path.name} cannot be read: {error}") from error
