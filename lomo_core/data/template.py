"""Conversations as text and the parts of it that have a loss, through the model's own chat template.

Which tokens have a loss is decided on the rendered text, as spans of characters, and carried over to tokens by the
tokenizer's offsets: never by searching for token ids (a padding token may well be the end token). Two ways lead to the
spans. A template with `{% generation %}` tags says so itself. Any other template is rendered turn by turn: what the
rendering up to an assistant's turn adds to the rendering of its prompt (with the generation prompt) is that turn, its
end-of-turn token included.

Tools go through the template's own `tools` and `tool_calls`. A template that leaves them out would train answers that
come from nowhere: such rows are refused.

The templates run in transformers' sandboxed jinja environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from lomo_core.config import TrainOn
from lomo_core.data.rows import ChatMessage, ChatRow, RowError, ToolCall
from lomo_core.errors import ModelError

Span = tuple[int, int]

# What a template, which is a program of the model's folder, can end in: jinja's errors, and those of its expressions.
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError)

# One conversation with each thing about tools, by words that no template contains.
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "lomo_probe_tool",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "The word."}}},
    },
}
_PROBE = (
    ChatMessage("user", "one?", trained=False),
    ChatMessage("assistant", "", trained=True, tool_calls=(ToolCall("call00000", "lomo_probe_call", {"word": "one"}),)),
    ChatMessage("tool", "lomo_probe_answer", trained=False, tool_call_id="call00000", name="lomo_probe_call"),
)


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
    """Renders chats for one tokenizer.

    Raises:
        ModelError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                "the model's tokenizer has no chat template, so chats cannot be written for it: use an instruct model, "
                "add a chat_template.jinja to the model folder, or give rows of prompt and completion",
                param="model",
            )
        self._tokenizer = tokenizer
        self._has_generation_tags = "generation" in _tags(tokenizer.get_chat_template())
        self._special_tokens = tuple(
            str(token) for token in {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_encoder)}
        )

    def prompt_ids(self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Raises:
            RowError: the template refuses the conversation, or leaves its tools out.
        """
        text = self._render(messages, tools, add_generation_prompt=True)
        self._check_tools(ChatRow("", tuple(messages), tuple(tools)), text)
        return self.text_ids(text)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text alone, without the special tokens that a tokenizer adds around it."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def spans(self, row: ChatRow, *, train_on: TrainOn) -> tuple[str, list[Span]]:
        """The rendered conversation, and the spans of characters that are trained.

        Raises:
            RowError: the template refuses the conversation, leaves its tools out, or rewrites earlier turns.
        """
        messages, tools = row.messages, row.tools
        text = self._render(messages, tools, add_generation_prompt=False)
        self._check_tools(row, text)
        if train_on == "all":
            return text, [(0, len(text))]
        assistants = [place for place, message in enumerate(messages) if message.role == "assistant"]
        spans = self._tagged_spans(messages, tools) if self._has_generation_tags else []
        if len(spans) != len(assistants):
            spans = [self._turn_span(row, place, text) for place in assistants]
        return text, [span for span, place in zip(spans, assistants, strict=True) if messages[place].trained]

    def _tagged_spans(self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]]) -> list[Span]:
        """The spans inside of `{% generation %}`, one per assistant turn, from the token mask that transformers
        makes."""
        result = self._tokenizer.apply_chat_template(
            [message.as_dict() for message in messages],
            tools=list(tools) or None,
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

    def _turn_span(self, row: ChatRow, place: int, text: str) -> Span:
        messages, tools = row.messages, row.tools
        prompt = self._render(messages[:place], tools, add_generation_prompt=True)
        is_last = place == len(messages) - 1
        turn = text if is_last else self._render(messages[: place + 1], tools, add_generation_prompt=False)
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

    def _check_tools(self, row: ChatRow, text: str) -> None:
        """Refuse a row with tools that the template leaves out."""
        needed = {
            "tools": bool(row.tools),
            "tool_calls": any(message.tool_calls for message in row.messages),
            "messages of the role tool": any(message.role == "tool" for message in row.messages),
        }
        if not any(needed.values()):
            return
        for what, is_needed in needed.items():
            if is_needed and what in self._left_out:
                raise RowError(
                    f"the model's chat template {self._left_out[what]}: use a model whose template has tools, or write "
                    "the calls as text in content"
                )
        for place, message in enumerate(row.messages):
            if message.content.strip() not in text:
                raise RowError(f"the model's chat template leaves the text of messages[{place}] out: leave it empty")

    @cached_property
    def _left_out(self) -> dict[str, str]:
        """What the template does not write about tools, and how that shows; tried once."""
        trials = (
            ("tools", _PROBE[:1], "lomo_probe_tool"),
            ("tool_calls", _PROBE[:2], "lomo_probe_call"),
            ("messages of the role tool", _PROBE[:3], "lomo_probe_answer"),
        )
        found = {}
        for what, messages, word in trials:
            try:
                if word not in self._render(messages, (_PROBE_TOOL,), add_generation_prompt=False):
                    found[what] = f"leaves {what} out"
            except RowError as error:
                found[what] = f"does not take {what} ({error})"
        return found

    def _render(
        self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]], *, add_generation_prompt: bool
    ) -> str:
        if not messages:
            return ""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [message.as_dict() for message in messages],
                    tools=list(tools) or None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except _TEMPLATE_ERRORS as error:
            raise RowError(f"the model's chat template refuses the conversation: {error}") from error


def _tags(template: str) -> set[str]:
    """Names of the block tags (`{% name ... %}`) of a template."""
    pieces = [piece.lstrip("-+ \n") for piece in template.split("{%")[1:]]
    return {piece.split(maxsplit=1)[0].rstrip("-%}") for piece in pieces if piece}
