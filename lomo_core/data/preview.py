"""One row of a file as a run sees it: the text that the chat template makes of it, and its tokens with their loss."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lomo_core.data.check_config import CheckConfig
from lomo_core.data.encode import RowEncoder
from lomo_core.data.formats import RowReader
from lomo_core.data.rows import ChoiceRow, TrainRow, WrongRow
from lomo_core.data.template import EncodedRow
from lomo_core.errors import DataError

# An answer of about 1 MB: more than anybody reads.
MAX_SHOWN_TOKENS = 16_384
_MAX_SHOWN_CHARS = 256 * 1024


def preview_row(config: CheckConfig, tokenizer: Any) -> dict[str, Any]:
    """The row `config.row` of the training file, counted from 1; of plain text the sequence of that number.

    Raises:
        DataError: there is no such row, it is wrong, or the template refuses it.
        ModelError: the tokenizer lacks what the format needs.
    """
    source = RowReader(config.train_path, data_format=config.format, param="row")
    encoder = RowEncoder(tokenizer, max_seq_length=config.max_seq_length, train_on=config.train_on)
    if source.format == "plain":
        where, text, sequences = f"sequence {config.row}", None, _sequences_of_text(source, encoder, config.row)
    else:
        row = _find(source, config.row)
        where, text = row.where, encoder.text_of(row)
        sequences = list(islice(encoder.encode([row]), 2))
    if not sequences:
        raise DataError(f"{where}: there are too few tokens to learn from", param="row")
    first = sequences[0]
    if isinstance(first, WrongRow):
        raise DataError(f"{first.where}: {first.reason}", param="row")
    return {
        "row": config.row,
        "where": where,
        "format": source.format,
        "text": None if text is None else text[:_MAX_SHOWN_CHARS],
        "has_more_text": text is not None and len(text) > _MAX_SHOWN_CHARS,
        "num_tokens": len(first.ids),
        "num_trained": first.num_trained,
        "is_truncated": first.is_cut,
        "has_more_sequences": len(sequences) > 1,
        "tokens": _tokens(first, tokenizer),
    }


def _tokens(row: EncodedRow, tokenizer: Any) -> list[dict[str, Any]]:
    pairs = zip(row.ids.tolist(), row.trained.tolist(), strict=True)
    return [
        {"id": token, "text": tokenizer.decode([token]), "trained": trained}
        for token, trained in islice(pairs, MAX_SHOWN_TOKENS)
    ]


def _find(source: RowReader, number: int) -> TrainRow:
    count = 0
    for count, row in enumerate(source, start=1):
        if count < number:
            continue
        if isinstance(row, WrongRow):
            raise DataError(f"{row.where}: {row.reason}", param="row")
        if isinstance(row, ChoiceRow):
            raise DataError(f"{row.where}: a row with choices is not trained on", param="row")
        return row
    raise DataError(f"there is no row {number}: the file has {count}", param="row")


def _sequences_of_text(source: RowReader, encoder: RowEncoder, number: int) -> list[EncodedRow | WrongRow]:
    pieces: Iterator[TrainRow | WrongRow] = (row for row in source if not isinstance(row, ChoiceRow))
    found = list(islice(encoder.encode(pieces), number - 1, number + 1))
    if not found:
        raise DataError(f"there is no sequence {number}: the text is shorter", param="row")
    return found
