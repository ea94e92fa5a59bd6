"""What the check of a job's files has found, and one row of a file as a run sees it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lomo_core.config import TrainOn
from server.schemas.base import Answer


class FileFigures(Answer):
    """One file in figures; None: not known, as the model's tokenizer was not here."""

    format: str
    num_rows: int
    num_errors: int
    num_duplicates: int
    num_untrained: int
    num_truncated: int | None
    num_tokens: int | None
    num_trained_tokens: int | None


class RunEstimate(Answer):
    """What the run will come to."""

    steps: int
    steps_per_epoch: int
    tokens: int
    trained_tokens: int
    duration_s: float | None = None
    """By the median speed of the latest jobs on this model; None where there were none."""
    peak_bytes: int | None = None
    """Memory at its highest, by the job's plan; None where the model could not be planned."""


class DataFigures(Answer):
    """The report on a job's files in figures: `lomo.data` of a job."""

    is_valid: bool
    training_file: FileFigures
    validation_file: FileFigures | None
    num_overlapping: int | None
    """Rows of the validation file that the training file has, too."""
    estimate: RunEstimate | None


class DataReport(Answer):
    """The report on a job's files; docs/data.md tells what is in it."""

    object: Literal["fine_tuning.job.data_report"] = "fine_tuning.job.data_report"
    job_id: str
    is_valid: bool
    training_file: dict[str, Any]
    validation_file: dict[str, Any] | None
    overlap: dict[str, Any] | None
    estimate: RunEstimate | None


class FileReport(Answer):
    """A file's part of the newest report on it."""

    object: Literal["file.report"] = "file.report"
    file_id: str
    job_id: str
    """The job that it was checked for: its model decides the tokens."""
    checked_at: int
    report: dict[str, Any]


class PreviewQuery(Answer):
    """The query of a preview."""

    model: str = Field(min_length=1, max_length=256)
    row: int = Field(default=1, ge=1, le=1_000_000_000)
    max_seq_length: int = Field(default=512, ge=8, le=1_048_576)
    train_on: TrainOn = "assistant"


class PreviewToken(Answer):
    """One token of a row."""

    id: int
    text: str
    trained: bool
    """Whether the run's loss looks at it."""


class RowPreview(Answer):
    """A row as a run sees it."""

    object: Literal["file.preview"] = "file.preview"
    file_id: str
    model: str
    row: int
    where: str
    """The row's place in the file: `line 3`."""
    format: str
    text: str | None
    """What the model's chat template makes of it; None for plain text, which the tokens are all of."""
    has_more_text: bool
    """Only its first 256 Ki characters are here."""
    num_tokens: int
    num_trained: int
    is_truncated: bool
    """The row is longer than `max_seq_length` and has lost its beginning."""
    has_more_sequences: bool
    """A text fills further sequences."""
    tokens: list[PreviewToken]
    """At most the first 16,384."""
