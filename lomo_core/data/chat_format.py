"""Conversations as OpenAI's fine-tuning takes them, tools included, and choice rows, which share their messages.

The older `functions`, `function_call` and the role `function` are read as tools, the role `developer` as `system`
(OpenAI's new name for it, which few templates know). Torch-free.
"""

from __future__ import annotations

from typing import Any

from lomo_core.data.fields import check_text, check_tree, kind_name, names_of, parse_json, shorten, string_field
from lomo_core.data.rows import ChatMessage, ChatRow, ChoiceRow, RowError, ToolCall

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# A template is written out twice for each answer, with all that comes before it: 2,000 messages take 10 s, ten times as
# many would take a hundred times as long.
MAX_MESSAGES = 2048
# Text that the loss or the template would silently lose.
_UNSUPPORTED_FIELDS = {
    "audio": "only text can be learnt: leave the row out",
    "refusal": "write the refusal as content",
    "reasoning_content": "templates treat it differently: write it into content, as the model is to say it",
}


def chat_row(body: dict[str, Any], where: str) -> ChatRow:
    """A row of `messages`, with `tools` if functions may be called.

    Raises:
        RowError: a field is wrong.
    """
    messages = read_messages(body)
    if type(body.get("parallel_tool_calls", True)) is not bool:
        raise RowError(f"parallel_tool_calls must be true or false, not {shorten(body['parallel_tool_calls'])}")
    return make_chat_row(where, messages, tools=read_tools(body))


def choice_row(body: dict[str, Any], where: str) -> ChoiceRow:
    """A row of `messages`, `choices` and the index of the right one as `answer`.

    Raises:
        RowError: a field is wrong.
    """
    messages = read_messages(body)
    if messages[-1].role == "assistant":
        raise RowError("messages ends with an assistant message: the answer belongs into choices")
    if read_tools(body) or any(message.tool_calls for message in messages):
        raise RowError("tools are not supported in rows with choices")
    choices = body.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise RowError("choices must be a list of at least 2 strings")
    for place, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise RowError(f"choices[{place}] must be a string that is not empty")
        check_text(choice, f"choices[{place}]")
    answer = body.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise RowError(f"answer must be the index of the right choice, 0 to {len(choices) - 1}, not {shorten(answer)}")
    return ChoiceRow(where, messages, tuple(choices), answer)


def make_chat_row(where: str, messages: tuple[ChatMessage, ...], *, tools: tuple[dict[str, Any], ...] = ()) -> ChatRow:
    """A conversation that has something to learn.

    Raises:
        RowError: no assistant message is trained.
    """
    assistants = [message for message in messages if message.role == "assistant"]
    if not assistants:
        raise RowError("no message has the role assistant: there is nothing to learn from")
    if not any(message.trained for message in assistants):
        raise RowError("every assistant message has weight 0: there is nothing to learn from")
    return ChatRow(where, messages, tools)


def read_messages(body: dict[str, Any]) -> tuple[ChatMessage, ...]:
    """The conversation under `messages`.

    Raises:
        RowError: it is missing, or a message is wrong.
    """
    if "messages" not in body:
        keys = names_of(body)
        raise RowError(f'"messages" is missing (the row has {keys}): write {{"messages": [...]}} in every row')
    raw = body["messages"]
    if not isinstance(raw, list):
        raise RowError(f"messages must be a list, not {kind_name(raw)}")
    if not raw:
        raise RowError("messages is empty: give at least a user and an assistant message")
    refuse_too_many(raw, "messages")
    messages: list[ChatMessage] = []
    names: dict[str, str] = {}
    for place, item in enumerate(raw):
        message = _message(item, f"messages[{place}]", names=names)
        names.update({call.id: call.name for call in message.tool_calls})
        messages.append(message)
    return tuple(messages)


def refuse_too_many(turns: list[Any], where: str) -> None:
    """Refuse a conversation that would take minutes to write out.

    Raises:
        RowError: it has more than `MAX_MESSAGES`.
    """
    if len(turns) > MAX_MESSAGES:
        raise RowError(f"{where} has {len(turns)} messages, more than {MAX_MESSAGES}: split the conversation")


def read_tools(body: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The functions under `tools` (or the older `functions`) in OpenAI's form.

    Raises:
        RowError: one has no name, or is not an object.
    """
    if body.get("functions") and body.get("tools"):
        raise RowError("the row has both tools and functions: give the functions as tools")
    key = "functions" if body.get("functions") else "tools"
    raw = body.get(key) or []
    if not isinstance(raw, list):
        raise RowError(f"{key} must be a list, not {kind_name(raw)}")
    return tuple(tool_of(item, f"{key}[{place}]") for place, item in enumerate(raw))


def tool_of(raw: object, where: str) -> dict[str, Any]:
    """One tool, `{"type": "function", "function": {"name", ...}}`; the function alone is taken too.

    Raises:
        RowError: it has no name, or is not an object.
    """
    if not isinstance(raw, dict):
        raise RowError(f'{where} must be an object {{"type": "function", "function": {{...}}}}, not {kind_name(raw)}')
    if raw.get("type", "function") != "function":
        raise RowError(f'{where}.type is {shorten(raw["type"])}: it must be "function"')
    is_wrapped = isinstance(raw.get("function"), dict)
    function = raw["function"] if is_wrapped else raw
    _name(function, f"{where}.function" if is_wrapped else where)
    check_tree(function, where)
    return {"type": "function", "function": {key: item for key, item in function.items() if key != "type"}}


def call_of(raw: object, where: str, *, call_id: str) -> ToolCall:
    """One called function, `{"name", "arguments"}`; the arguments are an object, or a string that holds one.

    Raises:
        RowError: it has no name, or its arguments are no JSON object.
    """
    if not isinstance(raw, dict):
        raise RowError(f"{where} must be an object with name and arguments, not {kind_name(raw)}")
    arguments = raw.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except RowError as error:
            raise RowError(f"{where}.arguments is {error}") from error
    if not isinstance(arguments, dict):
        raise RowError(f"{where}.arguments must be a JSON object, not {kind_name(arguments)}")
    check_tree(arguments, f"{where}.arguments")
    return ToolCall(call_id, _name(raw, where), arguments)


def weight_of(raw: dict[str, Any], where: str, *, is_assistant: bool) -> bool:
    """Whether a message is trained, by its `weight` (0 or 1; 1 where it is missing).

    Raises:
        RowError: it is neither, or the message is not the assistant's.
    """
    weight = raw.get("weight", 1)
    if type(weight) not in (int, float) or weight not in (0, 1):
        raise RowError(f"{where}.weight is {shorten(weight)}: it must be 0 or 1")
    if "weight" in raw and not is_assistant:
        raise RowError(f"{where}.weight: only assistant messages have a weight")
    return is_assistant and bool(weight)


def _name(raw: dict[str, Any], where: str) -> str:
    name = string_field(raw, "name", where)
    if not name:
        raise RowError(f"{where}.name is empty: it must be the function's name")
    return name


def _message(raw: object, where: str, *, names: dict[str, str]) -> ChatMessage:
    """One message; `names` maps the ids of the calls so far to their functions."""
    if not isinstance(raw, dict):
        raise RowError(f"{where} must be an object with role and content, not {kind_name(raw)}")
    role = raw.get("role")
    if role not in ROLES:
        problem = "is missing" if "role" not in raw else f"is {shorten(role)}"
        raise RowError(f"{where}.role {problem}: it must be one of {', '.join(ROLES)}")
    for name, cure in _UNSUPPORTED_FIELDS.items():
        if raw.get(name):
            raise RowError(f"{where}.{name} is not supported: {cure}")
    trained = weight_of(raw, where, is_assistant=role == "assistant")
    if role in ("tool", "function"):
        return _tool_message(raw, where, names=names)
    if role != "assistant":
        if raw.get("tool_calls") or raw.get("function_call"):
            raise RowError(f"{where}: only assistant messages have tool_calls")
        return ChatMessage("system" if role == "developer" else str(role), _content(raw, where), trained=False)
    calls = _calls(raw, where, num_before=len(names))
    content = "" if calls and raw.get("content") is None else _content(raw, where)
    if not calls and not content.strip():
        raise RowError(f"{where}.content is empty: an assistant message needs text to learn")
    return ChatMessage("assistant", content, trained=trained, tool_calls=calls)


def _content(raw: dict[str, Any], where: str) -> str:
    """A message's text: a string, or a list of text parts, which are joined."""
    parts = raw.get("content")
    if not isinstance(parts, list):
        return string_field(raw, "content", where)
    texts = []
    for place, part in enumerate(parts):
        path = f"{where}.content[{place}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = shorten(part.get("type")) if isinstance(part, dict) else kind_name(part)
            raise RowError(f'{path} is {kind}: only text parts can be learnt, {{"type": "text", "text": "..."}}')
        texts.append(string_field(part, "text", path))
    return "".join(texts)


def _calls(raw: dict[str, Any], where: str, *, num_before: int) -> tuple[ToolCall, ...]:
    if raw.get("function_call") and raw.get("tool_calls"):
        raise RowError(f"{where} has both tool_calls and function_call: give the call in tool_calls")
    if raw.get("function_call"):
        return (call_of(raw["function_call"], f"{where}.function_call", call_id=made_up_id(num_before)),)
    items = raw.get("tool_calls") or []
    if not isinstance(items, list):
        raise RowError(f"{where}.tool_calls must be a list, not {kind_name(items)}")
    calls = []
    for place, item in enumerate(items):
        path = f"{where}.tool_calls[{place}]"
        if not isinstance(item, dict):
            raise RowError(f"{path} must be an object with id, type and function, not {kind_name(item)}")
        call_id = string_field(item, "id", path) if "id" in item else made_up_id(num_before + place)
        calls.append(call_of(item.get("function"), f"{path}.function", call_id=call_id))
    return tuple(calls)


def made_up_id(number: int) -> str:
    """An id for a call that has none: nine letters and digits, as Mistral's templates insist on."""
    return f"call{number:05d}"


def _tool_message(raw: dict[str, Any], where: str, *, names: dict[str, str]) -> ChatMessage:
    """A tool's answer: to the call of its `tool_call_id`, or (role `function`) to the last call of its `name`."""
    content = _content(raw, where)
    if raw["role"] == "function":
        name = _name(raw, where)
        call_id = next((key for key in reversed(names) if names[key] == name), None)
        if call_id is None:
            raise RowError(f"{where}.name is {shorten(name)}, which no earlier function_call names")
        return ChatMessage("tool", content, trained=False, tool_call_id=call_id, name=name)
    call_id = string_field(raw, "tool_call_id", where)
    if call_id not in names:
        raise RowError(f"{where}.tool_call_id is {shorten(call_id)}: no earlier message has a call of this id")
    return ChatMessage("tool", content, trained=False, tool_call_id=call_id, name=names[call_id])
