"""A job's files looked through before they cost anything: every wrong row by its line, and what the right ones come to.

The rows are read and encoded by the code that a run does it with (`formats.py`, `encode.py`), so that there is one
truth of what a valid row is. Memory is bounded: of each row its length, a hash and its line are kept, 20 bytes.

The report is JSON, for people and programs alike; see docs/data.md for its fields.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lomo_core.data.check_config import CheckConfig
from lomo_core.data.encode import RowEncoder
from lomo_core.data.fields import printable
from lomo_core.data.formats import MAX_LISTED_ERRORS, RowReader
from lomo_core.data.order import BatchPlan
from lomo_core.data.packing import PackedPlan
from lomo_core.data.rows import ChatRow, ChoiceRow, CompletionRow, Row, TrainRow, WrongRow
from lomo_core.data.template import EncodedRow
from lomo_core.errors import DataError

# Ten times the largest public chat sets (UltraChat has 1.5 million conversations).
MAX_ROWS = 16_000_000
# Kinds of errors that are counted apart; the reasons hold names that the file chooses.
_MAX_KINDS = 50
_MAX_REASON_CHARS = 400
_LINE = re.compile(r"line (\d+)")
_VARIABLE = re.compile(r"\"[^\"]*\"|\d+|\([^)]*\)")
_NOTHING_TRAINED = "no token has a loss after tokenisation"
# Upper bounds of the histogram of tokens per row; powers of two, as context lengths are.
_BINS = tuple(2**power for power in range(4, 21))


class FileCheck:
    """What was found in one file; `report` once it has been read to its end."""

    def __init__(self, path: str, *, param: str) -> None:
        self.param = param
        self.hashes = array("Q")
        self.lines = array("Q")
        self.lengths = array("I")
        """Tokens of each encoded row."""
        self.num_trained = 0
        self._path = path
        self._format = "auto"
        self._num_rows = 0
        self._num_truncated = 0
        self._num_untrained = 0
        self._has_tokens = False
        self._errors: list[dict[str, Any]] = []
        self._kinds: dict[str, int] = {}
        self._num_errors = 0
        self._marks: tuple[str, ...] = ()
        """What the tokenizer reads as a special token wherever it stands."""
        self._marked_lines: list[int] = []
        self._num_marked = 0

    @property
    def has_errors(self) -> bool:
        """Whether the file cannot be used."""
        return bool(self._num_errors)

    def read(self, config: CheckConfig, tokenizer: Any | None) -> None:
        """Look through the whole file; without a tokenizer at its rows alone."""
        data_format = config.format if self.param == "training_file" else config.validation_format
        source = RowReader(self._path, data_format=data_format, param=self.param)
        try:
            rows = self._rows(source)
            if tokenizer is None:
                encoded: Iterator[EncodedRow | TrainRow | WrongRow] = rows
            else:
                self._has_tokens = True
                self._marks = tuple(tokenizer.all_special_tokens)
                encoder = RowEncoder(tokenizer, max_seq_length=config.max_seq_length, train_on=config.train_on)
                encoded = encoder.encode(rows)
            for row in encoded:
                self._note(row)
        except DataError as error:
            self._add(WrongRow("the file", error.message))
        self._format = source.format

    def _rows(self, source: RowReader) -> Iterator[TrainRow | WrongRow]:
        for row in source:
            self._num_rows += 1
            if self._num_rows > MAX_ROWS:
                raise DataError(f"the file has more than {MAX_ROWS} rows: give fewer", param=self.param)
            if isinstance(row, WrongRow):
                yield row
                continue
            self.hashes.append(_hash(row))
            self.lines.append(_line(row.where) or 0)
            self._note_marks(row)
            if not isinstance(row, ChoiceRow):
                yield row
            elif self.param == "training_file":
                raise DataError(
                    f"{row.where}: rows with choices measure accuracy: use them as validation file, not to train",
                    param=self.param,
                )

    def _note_marks(self, row: Row) -> None:
        """A text with a special token in it is cut there: it can end its own turn and begin another's."""
        if isinstance(row, ChatRow) and any(mark in each.content for each in row.messages for mark in self._marks):
            self._num_marked += 1
            if len(self._marked_lines) < MAX_LISTED_ERRORS:
                self._marked_lines.append(self.lines[-1])

    def _note(self, row: EncodedRow | TrainRow | WrongRow) -> None:
        if isinstance(row, WrongRow):
            self._add(row)
        elif isinstance(row, EncodedRow):
            self.lengths.append(len(row.ids))
            self.num_trained += row.num_trained
            self._num_truncated += row.is_cut

    def _add(self, wrong: WrongRow) -> None:
        reason = clean(wrong.reason)
        self._num_errors += 1
        self._num_untrained += reason == _NOTHING_TRAINED
        kind = _VARIABLE.sub("_", reason)
        if kind not in self._kinds and len(self._kinds) >= _MAX_KINDS:
            kind = "others"
        self._kinds[kind] = self._kinds.get(kind, 0) + 1
        if len(self._errors) < MAX_LISTED_ERRORS:
            where = clean(wrong.where)
            text = reason if where == "the file" else f"{where}: {reason}"
            self._errors.append({"line": _line(text), "where": where, "reason": reason})

    def repeats(self) -> list[tuple[int, int]]:
        """Rows that are equal to an earlier one, by their lines: (line, the first one's line)."""
        hashes = np.asarray(self.hashes)
        _, firsts, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        first_of = firsts[inverse]
        places = np.flatnonzero(first_of != np.arange(len(hashes)))
        return [(self.lines[place], self.lines[first_of[place]]) for place in places.tolist()]

    def report(self) -> dict[str, Any]:
        """The file's part of the report."""
        repeats = self.repeats() if len(self.hashes) else []
        kinds = sorted(self._kinds.items(), key=lambda item: -item[1])
        return {
            "format": self._format,
            "num_rows": self._num_rows,
            "num_errors": self._num_errors,
            "errors": self._errors,
            "error_kinds": [{"reason": reason, "count": count} for reason, count in kinds],
            "num_untrained": self._num_untrained,
            "num_duplicates": len(repeats),
            "duplicates": [{"line": line, "first_line": first} for line, first in repeats[:MAX_LISTED_ERRORS]],
            "num_with_special_tokens": self._num_marked,
            "special_token_lines": self._marked_lines,
            "tokens": self._tokens() if self._has_tokens and len(self.lengths) else None,
        }

    def _tokens(self) -> dict[str, Any]:
        lengths = np.asarray(self.lengths)
        counts = np.bincount(np.searchsorted(_BINS, lengths), minlength=len(_BINS) + 1).tolist()
        bounds = [*_BINS, None]
        return {
            "num_sequences": len(lengths),
            "total": int(lengths.sum()),
            "trained": self.num_trained,
            "shortest": int(lengths.min()),
            "median": int(np.median(lengths)),
            "longest": int(lengths.max()),
            "num_truncated": self._num_truncated,
            "histogram": [
                {"up_to": bound, "count": count} for bound, count in zip(bounds, counts, strict=True) if count
            ],
        }


def check_files(config: CheckConfig, tokenizer: Any | None) -> dict[str, Any]:
    """The report on a job's files.

    Raises:
        ModelError: the tokenizer lacks what the format needs (a chat template, an end token).
    """
    training = FileCheck(config.train_path, param="training_file")
    training.read(config, tokenizer)
    report: dict[str, Any] = {"training_file": training.report(), "validation_file": None, "overlap": None}
    checks = [training]
    if config.validation_path is not None:
        validation = FileCheck(config.validation_path, param="validation_file")
        validation.read(config, tokenizer)
        checks.append(validation)
        report["validation_file"] = validation.report()
        report["overlap"] = _overlap(training, validation)
    report["is_valid"] = not any(check.has_errors for check in checks)
    report["estimate"] = _estimate(config, training) if report["is_valid"] and len(training.lengths) else None
    return report


def clean(text: str) -> str:
    """A text for people, of what a file or a template says: bounded, and without what cannot be shown."""
    shown = printable(text)
    return shown if len(shown) <= _MAX_REASON_CHARS else shown[: _MAX_REASON_CHARS - 3] + "..."


def _overlap(training: FileCheck, validation: FileCheck) -> dict[str, Any]:
    """Rows of the validation file that the training file has, too."""
    places = np.flatnonzero(np.isin(np.asarray(validation.hashes), np.asarray(training.hashes))).tolist()
    return {
        "num_rows": len(places),
        "validation_lines": [validation.lines[place] for place in places[:MAX_LISTED_ERRORS]],
    }


def _estimate(config: CheckConfig, training: FileCheck) -> dict[str, Any]:
    """Steps and tokens of the whole run; the steps are those that the run itself will count."""
    lengths: NDArray[np.int32] = np.asarray(training.lengths).astype(np.int32)
    plan: BatchPlan | PackedPlan
    if config.packing:
        plan = PackedPlan(lengths, max_seq_length=config.max_seq_length, batch_size=config.batch_size, seed=config.seed)
    else:
        plan = BatchPlan(lengths, batch_size=config.batch_size, seed=config.seed)
    of_epochs = plan.batches_per_epoch * config.n_epochs
    steps = of_epochs if config.max_steps is None else min(config.max_steps, of_epochs)
    epochs = steps / plan.batches_per_epoch
    return {
        "steps": steps,
        "steps_per_epoch": plan.batches_per_epoch,
        "tokens": round(int(lengths.sum()) * epochs),
        "trained_tokens": round(training.num_trained * epochs),
    }


def _hash(row: Row) -> int:
    """64 bits of what is learnt or measured by a row, wherever it stands: ten million rows collide with 3e-6."""
    if isinstance(row, ChatRow):
        content: object = (row.messages, row.tools)
    elif isinstance(row, ChoiceRow):
        content = (row.messages, row.choices, row.answer)
    elif isinstance(row, CompletionRow):
        content = (row.prompt, row.completion)
    else:
        content = row.text
    raw = repr(content).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _line(where: str) -> int | None:
    found = _LINE.search(where)
    return int(found[1]) if found else None
