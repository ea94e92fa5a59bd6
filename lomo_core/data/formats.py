"""Rows of training and validation files, checked line by line so that each error names its line, field and cure.

Two formats, one per file: chat rows as OpenAI's fine-tuning takes them, `{"messages": [{"role", "content",
"weight"?}]}`, and choice rows for accuracy by likelihood, `{"messages": [...], "choices": [...], "answer": index}`.
Strict JSON and strict UTF-8. Torch-free: a server checks uploads with the same code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from lomo_core.errors import DataError

RowKind = Literal["chat", "choice"]

ROLES = ("system", "user", "assistant")
# Enough to see the pattern of what is wrong, few enough to read.
MAX_LISTED_ERRORS = 20
# A line is read whole; the longest row of public chat sets is below 1 MiB.
MAX_LINE_BYTES = 16 * 1024 * 1024
# Deeper JSON ends in RecursionError near 1000 levels; no row needs more than a few.
_TOO_DEEP = "the JSON is nested too deeply"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. `trained` says whether its tokens may have a loss (only the assistant's ever do by default)."""

    role: str
    content: str
    trained: bool

    def as_dict(self) -> dict[str, str]:
        """What a chat template gets."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation to learn from."""

    line: int
    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """A prompt, the possible answers, and the index of the right one."""

    line: int
    messages: tuple[ChatMessage, ...]
    choices: tuple[str, ...]
    answer: int


class RowError(Exception):
    """What is wrong with one row; becomes a line of a `DataError`."""


def read_chat_rows(path: str | Path, *, param: str = "training_file") -> list[ChatRow]:
    """Read a file of chat rows.

    Raises:
        DataError: the file cannot be read, is empty, or rows are wrong (the first 20 are listed).
    """
    rows = read_rows(path, param=param)
    if rows and isinstance(rows[0], ChoiceRow):
        raise DataError("rows with choices measure accuracy: use them as validation file, not to train", param=param)
    return [row for row in rows if isinstance(row, ChatRow)]


def read_rows(path: str | Path, *, param: str = "validation_file") -> list[ChatRow] | list[ChoiceRow]:
    """Read a file of either format; the first row decides which, and the others must follow.

    Raises:
        DataError: the file cannot be read, is empty, or rows are wrong (the first 20 are listed).
    """
    rows: list[Any] = []
    errors: list[str] = []
    num_errors = 0
    kind: RowKind | None = None
    try:
        with Path(path).open("rb") as stream:
            for line, raw in _lines(stream):
                try:
                    body = _parse(raw, line=line)
                    kind = kind or _kind_of(body)
                    rows.append(_row(body, line=line, kind=kind))
                except RowError as error:
                    num_errors += 1
                    if len(errors) < MAX_LISTED_ERRORS:
                        errors.append(f"line {line}: {error}")
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", param=param) from error
    if num_errors:
        raise DataError(_summary(errors, num_errors), param=param)
    if not rows:
        raise DataError("the file is empty: it needs at least one row", param=param)
    return rows


def summarise_errors(errors: list[str], num_errors: int) -> str:
    """The text of a `DataError` over many rows: how many, then the first ones, one per line."""
    return _summary(errors, num_errors)


def _summary(errors: list[str], num_errors: int) -> str:
    head = "1 row is wrong" if num_errors == 1 else f"{num_errors} rows are wrong"
    if num_errors > len(errors):
        head += f", the first {len(errors)} of them"
    return head + ":\n" + "\n".join(errors)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines (from 1), blank ones left out; a line too long is cut (and then fails to parse)."""
    line = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        line += 1
        whole = len(raw) <= MAX_LINE_BYTES
        rest = raw
        while not rest.endswith(b"\n") and len(rest) > MAX_LINE_BYTES:
            rest = stream.readline(MAX_LINE_BYTES + 1)
        if line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            yield line, raw if whole else raw[: MAX_LINE_BYTES + 1]


def _parse(raw: bytes, *, line: int) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise RowError(f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte {error.start + 1}): save the file as UTF-8 text") from error
    try:
        body = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        hint = ": the file must be JSON lines, one object per line" if line == 1 else ""
        raise RowError(f"not valid JSON ({error.msg}, column {error.colno}){hint}") from error
    except RecursionError as error:
        raise RowError(_TOO_DEEP) from error
    except ValueError as error:
        raise RowError(f"not valid JSON ({error})") from error
    if not isinstance(body, dict):
        raise RowError(f"expected a JSON object, not {_kind_name(body)}")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _kind_of(body: dict[str, Any]) -> RowKind | None:
    if "messages" not in body:
        return None
    return "choice" if "choices" in body else "chat"


def _row(body: dict[str, Any], *, line: int, kind: RowKind | None) -> ChatRow | ChoiceRow:
    if "messages" not in body:
        keys = ", ".join(sorted(map(str, body))[:5]) or "nothing"
        raise RowError(f'"messages" is missing (the row has {keys}): write {{"messages": [...]}} in every row')
    if _kind_of(body) != kind:
        raise RowError('the format differs from the first row\'s: either all rows have "choices" or none')
    for name in ("tools", "functions"):
        if body.get(name):
            raise RowError(f'"{name}" is not supported: leave the row out, or write the call as text')
    messages = _messages(body["messages"])
    if kind == "choice":
        return _choice_row(body, line=line, messages=messages)
    assistants = [message for message in messages if message.role == "assistant"]
    if not assistants:
        raise RowError("no message has the role assistant: there is nothing to learn from")
    if not any(message.trained for message in assistants):
        raise RowError("every assistant message has weight 0: there is nothing to learn from")
    return ChatRow(line, messages)


def _messages(raw: object) -> tuple[ChatMessage, ...]:
    if not isinstance(raw, list):
        raise RowError(f"messages must be a list, not {_kind_name(raw)}")
    if not raw:
        raise RowError("messages is empty: give at least a user and an assistant message")
    return tuple(_message(item, f"messages[{place}]") for place, item in enumerate(raw))


def _message(raw: object, where: str) -> ChatMessage:
    if not isinstance(raw, dict):
        raise RowError(f"{where} must be an object with role and content, not {_kind_name(raw)}")
    role = raw.get("role")
    if role not in ROLES:
        problem = "is missing" if "role" not in raw else f"is {_short(role)}"
        raise RowError(f"{where}.role {problem}: it must be one of {', '.join(ROLES)}")
    for name in ("tool_calls", "function_call"):
        if raw.get(name):
            raise RowError(f"{where}.{name} is not supported: write the call as text in content")
    content = _text(raw, "content", where)
    if role == "assistant" and not content.strip():
        raise RowError(f"{where}.content is empty: an assistant message needs text to learn")
    weight = raw.get("weight", 1)
    if type(weight) not in (int, float) or weight not in (0, 1):
        raise RowError(f"{where}.weight is {_short(weight)}: it must be 0 or 1")
    if "weight" in raw and role != "assistant":
        raise RowError(f"{where}.weight: only assistant messages have a weight")
    return ChatMessage(str(role), content, trained=role == "assistant" and bool(weight))


def _text(raw: dict[str, Any], name: str, where: str) -> str:
    if name not in raw:
        raise RowError(f"{where}.{name} is missing: it must be a string")
    value = raw[name]
    if not isinstance(value, str):
        raise RowError(f"{where}.{name} must be a string, not {_kind_name(value)}")
    _check_text(value, f"{where}.{name}")
    return value


def _check_text(value: str, where: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{where} holds half of a surrogate pair (an escape such as \\ud83d alone)") from error


def _choice_row(body: dict[str, Any], *, line: int, messages: tuple[ChatMessage, ...]) -> ChoiceRow:
    if messages[-1].role == "assistant":
        raise RowError("messages ends with an assistant message: the answer belongs into choices")
    choices = body["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise RowError("choices must be a list of at least 2 strings")
    for place, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise RowError(f"choices[{place}] must be a string that is not empty")
        _check_text(choice, f"choices[{place}]")
    answer = body.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise RowError(f"answer must be the index of the right choice, 0 to {len(choices) - 1}, not {_short(answer)}")
    return ChoiceRow(line, messages, tuple(choices), answer)


def _kind_name(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names[type(value)]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
