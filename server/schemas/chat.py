"""The body of a chat, as the official client sends it.

What would change the answer and is not done here is refused with the reason; what changes nothing is accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from server.schemas.base import Answer, Request

MAX_TOKENS = 4096
"""Of one answer: at the 20 tokens a second of a small model on a CPU it takes as long as a worker may (300 s)."""
MAX_ANSWERS = 8
"""Of one request; they are written one after the other, and eight chats are what waits for a worker at most."""
_MAX_STOPS = 4  # as OpenAI
_MAX_STOP_CHARS = 256

# What is accepted at the values that ask for nothing (None, "", [], {}, False, 0 always do), and why not otherwise.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "tool_choice": (("none", "auto"), "the model alone decides whether it calls a function"),
    "functions": ((), "give the functions as tools"),
    "function_call": (("none", "auto"), "give the functions as tools"),
    "logprobs": ((), "log probabilities are not returned"),
    "top_logprobs": ((), "log probabilities are not returned"),
    "logit_bias": ((), "token biases are not supported"),
    "frequency_penalty": ((), "penalties are not supported"),
    "presence_penalty": ((), "penalties are not supported"),
    "response_format": (({"type": "text"},), "only plain text is generated"),
    "modalities": ((["text"],), "only plain text is generated"),
    "audio": ((), "only plain text is generated"),
    "prediction": ((), "predicted outputs are not supported"),
    "reasoning_effort": (("none",), "these models have no reasoning effort"),
    "verbosity": ((), "these models have no verbosity"),
    "web_search_options": ((), "there is no web search"),
    "moderation": ((), "nothing is moderated here"),
}


class _TextPart(Request):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class _CalledFunction(Request):
    """What was called: its name, and its arguments as JSON."""

    name: Annotated[str, Field(min_length=1)]
    arguments: str


class _ToolCall(Request):
    """A call that an earlier answer asked for."""

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: _CalledFunction


class ChatMessage(Answer):
    """One message. What clients send back of an answer (nulls, empty lists) is accepted."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[_TextPart], Field(min_length=1)] | None = None
    """Text; null only beside `tool_calls`."""
    tool_calls: list[_ToolCall] | None = None
    """Of the assistant: what it called."""
    tool_call_id: str | None = None
    """Of a tool: the call that this is the answer to."""

    @model_validator(mode="after")
    def _refuse_the_unseen(self) -> Self:
        """Refuse what the model would not see."""
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], {}, ""):
                raise ValueError(f"{name[:64]!r} of a message is not supported: only role, content and tool calls are")
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant's messages have tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a message of the role tool needs a tool_call_id, and no other has one")
        return self

    @property
    def text(self) -> str:
        """The content in one piece."""
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""

    def as_turn(self) -> dict[str, Any]:
        """What the engine gets: keys that do not apply are left out."""
        body: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.tool_calls:
            body["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            body["tool_call_id"] = self.tool_call_id
        return body


class StreamOptions(Request):
    """How a stream is to be."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = None
    """Of no effect: nothing is padded here."""


class CreateChat(Request):
    """A chat to be answered."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    """Answers; with a seed the second is drawn with the next one, and so on."""
    tools: list[dict[str, Any]] | None = None
    """Functions that the model may call, where its chat template has tools."""

    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    moderation: Any = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    parallel_tool_calls: Any = None

    @field_validator(*_NEUTRAL)
    @classmethod
    def _asks_for_nothing(cls, value: Any, info: Any) -> Any:
        allowed, reason = _NEUTRAL[info.field_name]
        if value and value not in allowed:
            raise ValueError(reason)
        return value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > _MAX_STOPS:
            raise ValueError(f"at most {_MAX_STOPS} stop texts")
        if any(not 0 < len(stop) <= _MAX_STOP_CHARS for stop in stops):
            raise ValueError(f"a stop text has 1 to {_MAX_STOP_CHARS} characters")
        return value

    def turn(self, index: int) -> dict[str, Any]:
        """What the engine is to do for an answer, of which there are `n` (`lomo_core.chat.ChatTurn`)."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "messages": [message.as_turn() for message in self.messages],
            "tools": [] if self.tool_choice == "none" else self.tools or [],
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": None if self.seed is None else self.seed + index,
            "stop": stops,
        }


class Usage(Answer):
    """Tokens of a chat."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
