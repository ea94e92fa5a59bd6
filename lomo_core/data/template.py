"""Chat rows as token ids with a loss mask, through the model's own chat template.

Which tokens have a loss is decided on the rendered text, as spans of characters, and carried over to tokens by the
tokenizer's offsets: never by searching for token ids (a padding token may well be the end token). Two ways lead to the
spans. A template with `{% generation %}` tags says so itself. Any other template is rendered turn by turn: what the
rendering up to an assistant's turn adds to the rendering of its prompt (with the generation prompt) is that turn, its
end-of-turn token included.

The templates run in transformers' sandboxed jinja environment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from lomo_core.config import TrainOn
from lomo_core.data.formats import MAX_LISTED_ERRORS, ChatMessage, ChatRow, RowError, summarise_errors
from lomo_core.errors import DataError, ModelError

# Rows per call of the tokenizer: it works on them in parallel, and holds the offsets of that many.
_ROWS_PER_CALL = 512

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids [n] int32 and, for each, whether it is a target of the loss [n] bool; the last one always is."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    is_cut: bool

    @property
    def num_trained(self) -> int:
        """Tokens with a loss."""
        return int(self.trained.sum())


class ChatEncoder:
    """Renders and tokenises chats for one tokenizer.

    Raises:
        ModelError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                "the model's tokenizer has no chat template, so chats cannot be written for it: use an instruct model, "
                "or add a chat_template.jinja to the model folder",
                param="model",
            )
        self._tokenizer = tokenizer
        self._has_generation_tags = "generation" in _tags(tokenizer.get_chat_template())
        self._special_tokens = tuple(
            str(token) for token in {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_encoder)}
        )

    def prompt_ids(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Raises:
            RowError: the template refuses the conversation.
        """
        return self.text_ids(self._render(messages, add_generation_prompt=True))

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text alone, without the special tokens that a tokenizer adds around it."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def encode(
        self, rows: Sequence[ChatRow], *, max_seq_length: int, train_on: TrainOn, param: str
    ) -> list[EncodedRow]:
        """Encode every row; rows that are too long lose the beginning of their prompt.

        Raises:
            DataError: rows that the template refuses or that have no token to train (the first 20 are listed).
        """
        encoded: list[EncodedRow] = []
        errors: list[str] = []
        for row, found in self._encode_all(rows, train_on=train_on):
            if isinstance(found, RowError):
                errors.append(f"line {row.line}: {found}")
            elif not errors:
                encoded.append(_cut(*found, max_seq_length=max_seq_length))
        if errors:
            raise DataError(summarise_errors(errors[:MAX_LISTED_ERRORS], len(errors)), param=param)
        return encoded

    def _encode_all(
        self, rows: Sequence[ChatRow], *, train_on: TrainOn
    ) -> Iterator[tuple[ChatRow, tuple[NDArray[np.int32], NDArray[np.bool_]] | RowError]]:
        todo = iter(rows)
        while part := list(islice(todo, _ROWS_PER_CALL)):
            spans: list[tuple[str, list[Span]] | RowError] = []
            for row in part:
                try:
                    spans.append(self._spans(row.messages, train_on=train_on))
                except RowError as error:
                    spans.append(error)
            texts = [found[0] for found in spans if not isinstance(found, RowError)]
            batch = iter(self._tokenise(texts))
            for row, found in zip(part, spans, strict=True):
                if isinstance(found, RowError):
                    yield row, found
                    continue
                ids, offsets = next(batch)
                trained = _mask(offsets, found[1])
                if len(trained):
                    # The first token follows nothing, so nothing predicts it.
                    trained[0] = False
                yield row, (ids, trained) if trained.any() else RowError("no token has a loss after tokenisation")

    def _tokenise(self, texts: list[str]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Ids [n] and character offsets [n, 2] of each text."""
        if not texts:
            return
        batch = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
            yield np.asarray(ids, dtype=np.int32), np.asarray(offsets, dtype=np.int64).reshape(-1, 2)

    def _spans(self, messages: Sequence[ChatMessage], *, train_on: TrainOn) -> tuple[str, list[Span]]:
        """The rendered conversation, and the spans of characters that are trained.

        Raises:
            RowError: the template refuses the conversation, or rewrites earlier turns.
        """
        text = self._render(messages, add_generation_prompt=False)
        if train_on == "all":
            return text, [(0, len(text))]
        assistants = [place for place, message in enumerate(messages) if message.role == "assistant"]
        spans = self._tagged_spans(messages) if self._has_generation_tags else []
        if len(spans) != len(assistants):
            spans = [self._turn_span(messages, place, text) for place in assistants]
        return text, [span for span, place in zip(spans, assistants, strict=True) if messages[place].trained]

    def _tagged_spans(self, messages: Sequence[ChatMessage]) -> list[Span]:
        """The spans inside of `{% generation %}`, one per assistant turn, from the token mask that transformers
        makes."""
        result = self._tokenizer.apply_chat_template(
            [message.as_dict() for message in messages],
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        spans: list[Span] = []
        inside = False
        for is_trained, (start, end) in zip(result["assistant_masks"], result["offset_mapping"], strict=True):
            if is_trained and inside:
                spans[-1] = (spans[-1][0], end)
            elif is_trained:
                spans.append((start, end))
            inside = bool(is_trained)
        return spans

    def _turn_span(self, messages: Sequence[ChatMessage], place: int, text: str) -> Span:
        prompt = self._render(messages[:place], add_generation_prompt=True)
        turn = self._render(messages[: place + 1], add_generation_prompt=False)
        if not turn.startswith(prompt) or not text.startswith(turn):
            raise RowError(
                f"the model's chat template does not append messages[{place}] to what comes before it, so its tokens "
                "cannot be told apart: use a template with {% generation %} tags, or single-turn rows"
            )
        return len(prompt), self._end_of_turn(turn)

    def _end_of_turn(self, turn: str) -> int:
        """Where the trained part of a turn ends: generation stops at the end token, not at the white space after it."""
        stripped = turn.rstrip()
        return len(stripped) if stripped.endswith(self._special_tokens) else len(turn)

    def _render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        if not messages:
            return ""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [message.as_dict() for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except jinja2.TemplateError as error:
            raise RowError(f"the model's chat template refuses the conversation: {error}") from error


def _tags(template: str) -> set[str]:
    """Names of the block tags (`{% name ... %}`) of a template."""
    pieces = [piece.lstrip("-+ \n") for piece in template.split("{%")[1:]]
    return {piece.split(maxsplit=1)[0].rstrip("-%}") for piece in pieces if piece}


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
