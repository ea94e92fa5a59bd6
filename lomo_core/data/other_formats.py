"""Rows of the other formats in use: prompt and completion, Alpaca, ShareGPT, and plain text. Torch-free."""

from __future__ import annotations

from typing import Any

from lomo_core.data.chat_format import call_of, made_up_id, make_chat_row, refuse_too_many, tool_of, weight_of
from lomo_core.data.fields import kind_name, parse_json, shorten, string_field
from lomo_core.data.rows import ChatMessage, ChatRow, CompletionRow, RowError, TextRow, ToolCall

# Names of speakers found in public ShareGPT sets, and the role each one has.
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


def completion_row(body: dict[str, Any], where: str) -> CompletionRow:
    """`{"prompt", "completion"}`, two strings; the prompt may be empty.

    Raises:
        RowError: a field is wrong.
    """
    completion = string_field(body, "completion")
    if not completion:
        raise RowError("completion is empty: there is nothing to learn from")
    return CompletionRow(where, string_field(body, "prompt"), completion)


def text_row(body: dict[str, Any], where: str) -> TextRow:
    """`{"text"}`, a document.

    Raises:
        RowError: it is missing or empty.
    """
    text = string_field(body, "text")
    if not text:
        raise RowError("text is empty: there is nothing to learn from")
    return TextRow(where, text, is_end=True)


def alpaca_row(body: dict[str, Any], where: str) -> ChatRow:
    """`{"instruction", "input"?, "output", "system"?}` as a conversation of one turn; an input follows its instruction
    on a new line, as LLaMA-Factory joins them.

    Raises:
        RowError: a field is wrong.
    """
    if body.get("history"):
        raise RowError('history is not supported: write the turns as {"messages": [...]}')
    instruction = string_field(body, "instruction")
    given = string_field(body, "input") if body.get("input") is not None else ""
    output = string_field(body, "output")
    prompt = "\n".join(part for part in (instruction, given) if part)
    if not prompt.strip():
        raise RowError("instruction is empty: it must say what is asked")
    if not output.strip():
        raise RowError("output is empty: there is nothing to learn from")
    turns = [ChatMessage("user", prompt, trained=False), ChatMessage("assistant", output, trained=True)]
    if body.get("system"):
        turns.insert(0, ChatMessage("system", string_field(body, "system"), trained=False))
    return make_chat_row(where, tuple(turns))


def sharegpt_row(body: dict[str, Any], where: str) -> ChatRow:
    """`{"conversations": [{"from", "value"}], "system"?, "tools"?}`; a call of a function and its answer are turns of
    their own, whose values are JSON and text.

    Raises:
        RowError: a field is wrong.
    """
    turns = body.get("conversations")
    if not isinstance(turns, list):
        raise RowError(f"conversations must be a list, not {kind_name(turns)}")
    refuse_too_many(turns, "conversations")
    messages: list[ChatMessage] = []
    if body.get("system"):
        messages.append(ChatMessage("system", string_field(body, "system"), trained=False))
    unanswered: list[ToolCall] = []
    num_calls = 0
    for place, turn in enumerate(turns):
        message = _sharegpt_message(turn, f"conversations[{place}]", unanswered=unanswered, num_calls=num_calls)
        if message.tool_calls:
            unanswered = list(message.tool_calls)
            num_calls += len(unanswered)
        messages.append(message)
    return make_chat_row(where, tuple(messages), tools=_sharegpt_tools(body.get("tools")))


def _sharegpt_message(turn: object, where: str, *, unanswered: list[ToolCall], num_calls: int) -> ChatMessage:
    """One turn; a tool's answer takes the first of the `unanswered` calls off the list."""
    if not isinstance(turn, dict):
        raise RowError(f"{where} must be an object with from and value, not {kind_name(turn)}")
    speaker = turn.get("from")
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        problem = "is missing" if "from" not in turn else f"is {shorten(speaker)}"
        raise RowError(f"{where}.from {problem}: it must be one of {', '.join(_SHAREGPT_ROLES)}")
    value = string_field(turn, "value", where)
    trained = weight_of(turn, where, is_assistant=role in ("assistant", "call"))
    if role == "call":
        return ChatMessage(
            "assistant", "", trained=trained, tool_calls=_sharegpt_calls(value, where, num_calls=num_calls)
        )
    if role == "tool":
        if not unanswered:
            raise RowError(f"{where}.from is {shorten(speaker)}, but no call of a function waits for an answer")
        call = unanswered.pop(0)
        return ChatMessage("tool", value, trained=False, tool_call_id=call.id, name=call.name)
    if role == "assistant" and not value.strip():
        raise RowError(f"{where}.value is empty: an assistant's turn needs text to learn")
    return ChatMessage(role, value, trained=trained)


def _sharegpt_calls(value: str, where: str, *, num_calls: int) -> tuple[ToolCall, ...]:
    try:
        parsed = parse_json(value)
    except RowError as error:
        raise RowError(f"{where}.value is {error}: it must be the called function with its arguments") from error
    items = parsed if isinstance(parsed, list) else [parsed]
    if not items:
        raise RowError(f"{where}.value calls no function")
    return tuple(
        call_of(item, f"{where}.value", call_id=made_up_id(num_calls + place)) for place, item in enumerate(items)
    )


def _sharegpt_tools(raw: object) -> tuple[dict[str, Any], ...]:
    """The row's tools: a list, or (as is usual) a string with a list as JSON."""
    if isinstance(raw, str) and raw.strip():
        try:
            raw = parse_json(raw)
        except RowError as error:
            raise RowError(f"tools is {error}: it must be a list of functions") from error
    if not raw:
        return ()
    if not isinstance(raw, list):
        raise RowError(f"tools must be a list, not {kind_name(raw)}")
    return tuple(tool_of(item, f"tools[{place}]") for place, item in enumerate(raw))
