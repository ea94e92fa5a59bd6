"""Rows of any format as token ids with a loss mask, a bounded number of them at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lomo_core.config import TrainOn
from lomo_core.data.json_rows import cut_of_piece
from lomo_core.data.rows import ChatRow, CompletionRow, RowError, TextRow, TrainRow, WrongRow
from lomo_core.data.template import ChatEncoder, EncodedRow, Span
from lomo_core.errors import DataError, ModelError

# Rows and characters per call of the tokenizer: it works on rows in parallel, and holds their tokens and offsets as
# Python objects, about 40 bytes per character.
_ROWS_PER_CALL = 512
_CHARS_PER_CALL = 1 << 20


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A row as text, and the spans of characters that are trained (all of a `TextRow`, which is cut elsewhere)."""

    row: TrainRow
    text: str
    spans: list[Span]


class RowEncoder:
    """Encodes the rows of one file for one tokenizer.

    Chats go through the template. A completion follows its prompt and ends with the end token, a text ends with it:
    both begin with the tokenizer's own beginning token, if it has one. Texts are cut into rows of `max_seq_length`;
    other rows that are too long lose their beginning.
    """

    def __init__(self, tokenizer: Any, *, max_seq_length: int, train_on: TrainOn) -> None:
        self._tokenizer = tokenizer
        self._max_seq_length = max_seq_length
        self._train_on = train_on
        self._document = np.empty(0, dtype=np.int32)
        """Tokens of the present document that have not filled a row yet, after the last one that has."""
        self._is_new_document = True

    @cached_property
    def _chats(self) -> ChatEncoder:
        return ChatEncoder(self._tokenizer)

    @cached_property
    def _begin(self) -> list[int]:
        """The token that the tokenizer itself puts before a text, or nothing."""
        ids = list(self._tokenizer("").input_ids)
        return ids[:1] if ids and ids[0] == self._tokenizer.bos_token_id else []

    @cached_property
    def _end(self) -> int:
        end: int | None = self._tokenizer.eos_token_id
        if end is None:
            raise ModelError(
                "the model's tokenizer has no end token, which completions and texts end with: add eos_token to its "
                "tokenizer_config.json",
                param="model",
            )
        return end

    def encode(self, rows: Iterable[TrainRow | WrongRow]) -> Iterator[EncodedRow | WrongRow]:
        """Every row, or what is wrong with it, in order; a text may make several rows or, if short, none of its own.

        Raises:
            ModelError: the tokenizer lacks what the format needs (a chat template, an end token).
        """
        pending: list[_Rendered | WrongRow] = []
        num_chars = 0
        for row in rows:
            for item in self._render(row):
                pending.append(item)
                num_chars += len(item.text) if isinstance(item, _Rendered) else 0
                if len(pending) >= _ROWS_PER_CALL or num_chars >= _CHARS_PER_CALL:
                    yield from self._encode_part(pending)
                    pending, num_chars = [], 0
        yield from self._encode_part(pending)

    def text_of(self, row: TrainRow) -> str:
        """The text that a row is made into, before it is cut.

        Raises:
            DataError: the model's chat template refuses it.
        """
        if isinstance(row, TextRow):
            return row.text
        rendered = next(self._render(row))
        if isinstance(rendered, WrongRow):
            raise DataError(f"{rendered.where}: {rendered.reason}", param="row")
        return rendered.text

    def _render(self, row: TrainRow | WrongRow) -> Iterator[_Rendered | WrongRow]:
        if isinstance(row, ChatRow):
            try:
                yield _Rendered(row, *self._chats.spans(row, train_on=self._train_on))
            except RowError as error:
                yield WrongRow(row.where, str(error))
        elif isinstance(row, CompletionRow):
            text = row.prompt + row.completion
            yield _Rendered(row, text, [(0 if self._train_on == "all" else len(row.prompt), len(text))])
        elif isinstance(row, TextRow):
            text = row.text
            while text:
                end = cut_of_piece(text)
                piece, text = text[:end], text[end:]
                yield _Rendered(TextRow(row.where, piece, is_end=row.is_end and not text), piece, [])
        else:
            yield row

    def _encode_part(self, part: list[_Rendered | WrongRow]) -> Iterator[EncodedRow | WrongRow]:
        tokens = iter(self._tokenise([item.text for item in part if isinstance(item, _Rendered)]))
        for item in part:
            if isinstance(item, WrongRow):
                yield item
                continue
            ids, offsets = next(tokens)
            if isinstance(item.row, TextRow):
                yield from self._rows_of_text(ids, is_end=item.row.is_end)
                continue
            if isinstance(item.row, CompletionRow):
                ids, trained = self._completion(ids, offsets, item.spans[0][0])
            else:
                trained = _mask(offsets, item.spans)
            if len(trained):
                # The first token follows nothing, so nothing predicts it.
                trained[0] = False
            if not trained.any():
                yield WrongRow(item.row.where, "no token has a loss after tokenisation")
                continue
            yield _cut(ids, trained, max_seq_length=self._max_seq_length)

    def _tokenise(self, texts: list[str]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Ids [n] and character offsets [n, 2] of each text."""
        if not texts:
            return
        batch = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
            yield np.asarray(ids, dtype=np.int32), np.asarray(offsets, dtype=np.int64).reshape(-1, 2)

    def _completion(
        self, ids: NDArray[np.int32], offsets: NDArray[np.int64], first: int
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids with beginning and end, and their mask: trained is what holds any character from `first` on. A token
        that prompt and completion share is trained, or the completion's first letters would be learnt nowhere."""
        begin, end = self._begin, [self._end]
        trained = np.concatenate([np.zeros(len(begin), dtype=np.bool_), offsets[:, 1] > first, [True]])
        return np.concatenate([np.asarray(begin, dtype=np.int32), ids, np.asarray(end, dtype=np.int32)]), trained

    def _rows_of_text(self, ids: NDArray[np.int32], *, is_end: bool) -> Iterator[EncodedRow]:
        """The rows that a further piece of a document fills, and at its end the rest."""
        begin = np.asarray(self._begin if self._is_new_document else [], dtype=np.int32)
        end = np.asarray([self._end] if is_end else [], dtype=np.int32)
        self._is_new_document = is_end
        tokens = np.concatenate([self._document, begin, ids, end])
        # A row begins with the last token of the one before, so that every token but a document's first is predicted.
        step = self._max_seq_length - 1
        first = 0
        while len(tokens) - first > (1 if is_end else step):
            part = tokens[first : first + step + 1].copy()
            trained = np.ones(len(part), dtype=np.bool_)
            trained[0] = False
            yield EncodedRow(part, trained, is_cut=False)
            first += len(part) - 1
        self._document = np.empty(0, dtype=np.int32) if is_end else tokens[first:].copy()


def _mask(offsets: NDArray[np.int64], spans: list[Span]) -> NDArray[np.bool_]:
    """For each token [n, 2] whether it begins inside one of the spans (and is not empty)."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for first, last in spans:
        mask |= (starts >= first) & (starts < last) & (ends > starts)
    return mask


def _cut(ids: NDArray[np.int32], trained: NDArray[np.bool_], *, max_seq_length: int) -> EncodedRow:
    """Drop what comes after the last trained token (nothing learns from it), then the beginning beyond the length."""
    end = int(np.flatnonzero(trained)[-1]) + 1
    start = max(0, end - max_seq_length)
    kept = trained[start:end].copy()
    kept[0] = False
    return EncodedRow(ids[start:end].copy(), kept, is_cut=start > 0)
