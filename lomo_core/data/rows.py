"""What a row of a data file is, whatever its format: a conversation, a text to continue, a text, or a choice.

Torch-free: a server checks uploads with the same types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function that an assistant's message asks for; `arguments` is the parsed JSON object."""

    id: str
    name: str
    arguments: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """What a chat template gets: OpenAI's form, but with the arguments as an object, which templates write out."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. `trained` says whether its tokens may have a loss (only the assistant's ever do by default)."""

    role: str
    content: str
    trained: bool
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Of a tool's answer: the call that it answers."""
    name: str | None = None
    """Of a tool's answer: the function that was called."""

    def as_dict(self) -> dict[str, Any]:
        """What a chat template gets; keys that do not apply are left out, as templates ask whether they are there."""
        body: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            body["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            body["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            body["name"] = self.name
        return body


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation to learn from. `where` names the row's place in its file for error messages (`line 3`)."""

    where: str
    messages: tuple[ChatMessage, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that could be called, in OpenAI's form."""


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """A text and how it goes on, without a chat template; the loss is on the completion and an end token."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class TextRow:
    """A piece of a document, all of it to be learnt; `is_end` says whether the document ends with it."""

    where: str
    text: str
    is_end: bool


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """A prompt, the possible answers, and the index of the right one."""

    where: str
    messages: tuple[ChatMessage, ...]
    choices: tuple[str, ...]
    answer: int


TrainRow = ChatRow | CompletionRow | TextRow
Row = TrainRow | ChoiceRow


@dataclass(frozen=True, slots=True)
class WrongRow:
    """A row that cannot be used, and why; becomes a line of a `DataError`."""

    where: str
    reason: str


class RowError(Exception):
    """What is wrong with the row at hand."""
