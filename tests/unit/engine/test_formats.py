"""Every way in which a file of rows can be wrong is answered with line, field and cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lomo_core.data.formats import MAX_LINE_BYTES, ChatRow, ChoiceRow, read_chat_rows, read_rows
from lomo_core.errors import DataError
from tests.support.tiny_model import chat, choice_rows, write_jsonl

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


def messages(*items: Any) -> dict[str, Any]:
    return {"messages": list(items)}


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    return caught.value.message


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1], "expected a JSON object, not a list"),
        ("text", "expected a JSON object, not a string"),
        ({"prompt": "a", "completion": "b"}, '"messages" is missing (the row has completion, prompt)'),
        ({"messages": {}}, "messages must be a list, not an object"),
        (messages(), "messages is empty"),
        (messages("x"), "messages[0] must be an object"),
        (
            messages({"role": "bot", "content": "x"}, ANSWER),
            'messages[0].role is "bot": it must be one of system, user',
        ),
        (messages({"content": "x"}, ANSWER), "messages[0].role is missing"),
        (messages({"role": "user"}, ANSWER), "messages[0].content is missing"),
        (messages(USER, {"role": "assistant", "content": None}), "messages[1].content must be a string, not null"),
        (messages({"role": "user", "content": [{"type": "text"}]}, ANSWER), "messages[0].content must be a string"),
        (messages(USER, {"role": "assistant", "content": " "}), "messages[1].content is empty"),
        (messages(USER), "no message has the role assistant"),
        (messages(USER, {**ANSWER, "weight": 0}), "every assistant message has weight 0"),
        (messages(USER, {**ANSWER, "weight": -3}), "messages[1].weight is -3: it must be 0 or 1"),
        (messages(USER, {**ANSWER, "weight": "1"}), 'messages[1].weight is "1": it must be 0 or 1'),
        (messages(USER, {**ANSWER, "weight": True}), "messages[1].weight is true: it must be 0 or 1"),
        (messages({**USER, "weight": 1}, ANSWER), "only assistant messages have a weight"),
        (messages(USER, {**ANSWER, "tool_calls": [1]}), "tool_calls is not supported"),
        ({**messages(USER, ANSWER), "tools": [1]}, '"tools" is not supported'),
        ({**messages(USER), "choices": ["a"], "answer": 0}, "choices must be a list of at least 2"),
        ({**messages(USER), "choices": ["a", ""], "answer": 0}, "choices[1] must be a string"),
        (
            {**messages(USER), "choices": ["a", "b"], "answer": 2},
            "answer must be the index of the right choice, 0 to 1",
        ),
        ({**messages(USER), "choices": ["a", "b"]}, "answer must be the index"),
        ({**messages(USER, ANSWER), "choices": ["a", "b"], "answer": 0}, "ends with an assistant message"),
    ],
)
def test_a_wrong_row(tmp_path: Path, row: Any, expected: str) -> None:
    message = error_of(write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert message.startswith("1 row is wrong:\nline 1: ")
    assert expected in message


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b'{"messages": [}\n', "line 1: not valid JSON (Expecting value, column 15)"),
        (b"<html>\n", "the file must be JSON lines"),
        (b'{"messages": "\xff"}\n', "line 1: not UTF-8 (byte 15)"),
        (b"[" * 100_000, "line 1: the JSON is nested too deeply"),
        (b'{"messages": NaN}\n', "NaN is not a JSON number"),
        (b'{"n": ' + b"1" * 5000 + b"}\n", "line 1: not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}\n', "half of a surrogate pair"),
        (b'{"a": "' + b"x" * MAX_LINE_BYTES + b'"}\n' + b"{}\n", "line 1: the line is longer than 16 MiB\nline 2:"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else None,
)
def test_a_wrong_file(tmp_path: Path, raw: bytes, expected: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(raw)
    assert expected in error_of(tmp_path / "rows.jsonl")


def test_the_first_twenty_errors_are_listed(tmp_path: Path) -> None:
    rows: list[Any] = [chat("a", "b"), *[{"messages": []}] * 30]
    message = error_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert message.startswith("30 rows are wrong, the first 20 of them:\nline 2: ")
    assert message.count("\n") == 20


def test_formats_do_not_mix(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b"), *choice_rows(1)])
    assert "line 2: the format differs from the first row's" in error_of(path)


def test_choice_rows_are_no_training_data(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", choice_rows(2))
    with pytest.raises(DataError, match="validation file") as caught:
        read_chat_rows(path)
    assert caught.value.param == "training_file"


def test_a_missing_file(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in error_of(tmp_path / "none.jsonl")


def test_good_rows(tmp_path: Path) -> None:
    rows = [messages({"role": "system", "content": ""}, USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1})]
    text = "\ufeff" + json.dumps(rows[0]) + "\r\n\r\n" + json.dumps(messages(USER, ANSWER))
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    first, second = read_chat_rows(tmp_path / "rows.jsonl")
    assert [message.trained for message in first.messages] == [False, False, False, False, True]
    assert (first.line, second.line) == (1, 3)
    found = read_rows(write_jsonl(tmp_path / "choices.jsonl", choice_rows(2)))
    assert [type(row) for row in found] == [ChoiceRow, ChoiceRow]
    assert isinstance(first, ChatRow)
