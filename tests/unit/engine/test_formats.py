"""Every way in which a file of rows can be wrong is answered with line, field and cure."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lomo_core.config import DataConfig, DataFormat
from lomo_core.data.formats import RowReader, read_rows
from lomo_core.data.json_rows import MAX_ROW_BYTES, PIECE_CHARS
from lomo_core.data.rows import ChatMessage, ChatRow, ChoiceRow, CompletionRow, Row, TextRow, ToolCall
from lomo_core.errors import ConfigError, DataError
from tests.support.tiny_model import chat, choice_rows, write_jsonl

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


def messages(*items: Any) -> dict[str, Any]:
    return {"messages": list(items)}


def rows_of(path: Path, data_format: DataFormat = "auto") -> list[Row]:
    return read_rows(RowReader(path, data_format=data_format, param="training_file"))


def error_of(path: Path, data_format: DataFormat = "auto") -> str:
    with pytest.raises(DataError) as caught:
        rows_of(path, data_format)
    assert caught.value.param == "training_file"
    return caught.value.message


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "sun"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "a star"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1], "expected a JSON object, not a list"),
        ("text", "expected a JSON object, not a string"),
        ({"question": "a", "answer": "b"}, "no known format has the row's fields (answer, question)"),
        ({"messages": {}}, "messages must be a list, not an object"),
        (messages(), "messages is empty"),
        (messages("x"), "messages[0] must be an object"),
        (
            messages({"role": "bot", "content": "x"}, ANSWER),
            'messages[0].role is "bot": it must be one of system, developer, user',
        ),
        (messages({"content": "x"}, ANSWER), "messages[0].role is missing"),
        (messages({"role": "user"}, ANSWER), "messages[0].content is missing"),
        (messages(USER, {"role": "assistant", "content": None}), "messages[1].content must be a string, not null"),
        (messages({"role": "user", "content": [{"type": "text"}]}, ANSWER), "messages[0].content[0].text is missing"),
        (
            messages({"role": "user", "content": [{"type": "image_url"}]}, ANSWER),
            'content[0] is "image_url": only text',
        ),
        (messages(USER, {"role": "assistant", "content": " "}), "messages[1].content is empty"),
        (messages(USER), "no message has the role assistant"),
        (messages(USER, {**ANSWER, "weight": 0}), "every assistant message has weight 0"),
        (messages(USER, {**ANSWER, "weight": -3}), "messages[1].weight is -3: it must be 0 or 1"),
        (messages(USER, {**ANSWER, "weight": "1"}), 'messages[1].weight is "1": it must be 0 or 1'),
        (messages(USER, {**ANSWER, "weight": True}), "messages[1].weight is true: it must be 0 or 1"),
        (messages({**USER, "weight": 1}, ANSWER), "only assistant messages have a weight"),
        (messages(USER, {**ANSWER, "refusal": "no"}), "messages[1].refusal is not supported: write the refusal as"),
        (messages(USER, {**ANSWER, "tool_calls": [1]}), "messages[1].tool_calls[0] must be an object"),
        (messages(USER, {**ANSWER, "tool_calls": {}, "function_call": 1}), "messages[1].function_call must be an obj"),
        (
            messages(USER, {**CALLING, "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{"}}]}),
            "messages[1].tool_calls[0].function.arguments is not valid JSON",
        ),
        (
            messages(USER, {**CALLING, "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "[1]"}}]}),
            "messages[1].tool_calls[0].function.arguments must be a JSON object, not a list",
        ),
        (
            messages(USER, {**CALLING, "tool_calls": [{"function": {"name": "", "arguments": "{}"}}]}),
            "messages[1].tool_calls[0].function.name is empty",
        ),
        (messages({**USER, "tool_calls": [CALL]}, ANSWER), "only assistant messages have tool_calls"),
        (messages(USER, RESULT, ANSWER), 'messages[1].tool_call_id is "c1": no earlier message has a call of this id'),
        (
            messages(USER, {"role": "function", "name": "f", "content": "x"}, ANSWER),
            'messages[1].name is "f", which no earlier function_call names',
        ),
        ({**messages(USER, ANSWER), "tools": [1]}, "tools[0] must be an object"),
        ({**messages(USER, ANSWER), "tools": [{"type": "web_search"}]}, 'tools[0].type is "web_search"'),
        ({**messages(USER, ANSWER), "functions": [{"parameters": {}}]}, "functions[0].name is missing"),
        ({**messages(USER, ANSWER), "parallel_tool_calls": 1}, "parallel_tool_calls must be true or false"),
        ({**messages(USER), "choices": ["a", "b"], "answer": 0, "tools": [TOOL]}, "tools are not supported in rows wi"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": [USER], "completion": "b"}, "prompt must be a string, not a list"),
        ({"instruction": "", "output": "b"}, "instruction is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input must be a string, not a number"),
        ({"instruction": "a", "output": " "}, "output is empty"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history is not supported"),
        ({"text": ""}, "text is empty"),
        (messages(*[USER, ANSWER] * 1025), "messages has 2050 messages, more than 2048: split the conversation"),
        ({"conversations": [{"from": "gpt", "value": "x"}] * 2049}, "conversations has 2049 messages, more than 2048"),
        ({"conversations": {}}, "conversations must be a list, not an object"),
        ({"conversations": [{"from": "bard", "value": "x"}]}, 'conversations[0].from is "bard": it must be one of'),
        ({"conversations": [{"from": "gpt", "value": ""}]}, "conversations[0].value is empty"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "nothing to learn from"),
        ({"conversations": [{"from": "human", "value": "x", "weight": 1}]}, "only assistant messages have a weight"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "no call of a function waits for an answer"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "conversations[0].value is not valid JSON"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "tools": "[1"}, "tools is not valid JSON"),
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
        (b'{"a": "' + b"x" * MAX_ROW_BYTES + b'"}\n' + b"{}\n", "line 1: the row is longer than 16 MiB\nline 2:"),
        (b"PK\x03\x04", "line 1: the file is a zip archive: unpack it"),
        (b"\x89PNG\r\n", "line 1: the file is a picture"),
        (b"a\0b", "line 1: the file is not text"),
        ('{"text": "a"}'.encode("utf-16"), "line 1: the file is UTF-16 text: save it as UTF-8"),
        (b'[{"text": "a"},\n {"text": 3}]', "row 2 (line 2): text must be a string, not a number"),
        (b'[{"text": "a"},\n 3]', "row 2 (line 2): expected a JSON object, not a number"),
        (b'[{"text": "a"},\n {"text": "b"}', "row 2 (line 2): not valid JSON (expected a comma or the array's end)"),
        (b'[{"text": "a"}\n {"text": "b"}]', "row 1 (line 2): not valid JSON (expected a comma or the array's end)"),
        (b'[{"text": "a"},\n]', "row 2 (line 2): not valid JSON (Expecting value)"),
        (b'[{"text": "a"},\n {"text":\n "b",\n 3}]', "row 2 (line 4): not valid JSON (Expecting property name"),
        (b'[{"text": "a"}]\n[]', "row 1 (line 2): not valid JSON (something comes after the array's end)"),
        (b'[{"text": NaN}]', "row 1 (line 1): not valid JSON (NaN is not a JSON number)"),
        (b'[{"text": "\xff"}]', "row 1 (line 1): not UTF-8"),
        (b'[{"a":' + b"[" * 100_000, "row 1 (line 1): the JSON is nested too deeply"),
        (b"[]", "the file is empty"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else None,
)
def test_a_wrong_file(tmp_path: Path, raw: bytes, expected: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(raw)
    assert expected in error_of(tmp_path / "rows.jsonl")


ROW = b'{"text": "a"}'


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"\xef\xbb\xbf" * 2 + ROW, "a byte order mark stands before the row"),
        (b"<!doctype html>\n", "this is HTML or XML"),
        (b"# rows\n", "JSON has no comments"),
        (b"{'text': 'a'}\n", "JSON has double quotes"),
        (ROW + b"\r" + ROW + b"\r", "end each row with a line feed"),
        (ROW + "\u2028".encode() + ROW, "end each row with a line feed"),
        (ROW + b" " + ROW, "two rows are on one line"),
        (ROW + b",\n" + ROW, "a comma follows the row"),
        (b'{"text": "a\tb"}', r"write a tab as \t"),
        (b"text,more\na,b\n", "this may be CSV"),
        (b"1,2\n", "this may be CSV"),
        (b"- text: a\n", "this may be CSV, YAML"),
        (b'{\n "text": "a"\n}\n', "the line ends inside of the row"),
        (ROW[:-3], "the line ends inside of the row"),
        (b'{"text": "a", "x": [1,]}', "the comma before it is one too many"),
        (b'{"text": "a"' + b"\0" * 9000, "the file is not text"),
        (ROW + b"\n" * 5000 + b"\0\n", "line 5001: not valid JSON (Expecting value, column 1): it holds zero bytes"),
        (b'{"text": "a", "x": 1e400}', "not valid JSON (the number 1e400 is too large)"),
        (b'[{"text": "a", "x": -1e400}]', "not valid JSON (the number -1e400 is too large)"),
        (b'[{"x": ' + b"1" * 5000 + b"}]", "not valid JSON (a number of 5000 digits)"),
        (b"%PDF-1.7\n", "the file is a PDF"),
        (b"\x80\x04\x95", "the file is a Python pickle"),
        (b"SQLite format 3\0", "the file is an SQLite database"),
        (b"\xfd7zXZ\0\0", "compressed with xz"),
        (b"x" * 257 + b"ustar", "a tar archive"),
        (ROW.decode().encode("utf-16-le"), "the file is UTF-16 text"),
        (ROW.decode().encode("utf-16-be"), "the file is UTF-16 text"),
        (ROW.decode().encode("utf-32"), "the file is UTF-32 text"),
        ('{"a\u202eb\x9b": 1}'.encode(), "fields (a\ufffdb\ufffd): a row has"),
        (b'[{"\\ud800": 1, "\\ud800": 2}]', 'the key "\ufffd" is there twice'),
        (json.dumps({"k" * 9000: 1}).encode(), "...): a row has the fields messages"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else None,
)
def test_what_is_no_json_lines_is_told_what_it_is(tmp_path: Path, raw: bytes, expected: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(raw)
    assert expected in error_of(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("around", ["{}", "[{}]"])
def test_a_key_that_is_repeated_among_very_many_is_found_at_once(tmp_path: Path, around: str) -> None:
    """Comparing each with each took 11 s for 20,000, and the server reads arrays while their uploader waits."""
    keys = ", ".join(f'"k{number}": 1' for number in range(20_000))
    (tmp_path / "rows.jsonl").write_text(around.replace("{}", f'{{{keys}, "k19999": 2}}'), encoding="utf-8")
    begin = time.process_time()
    assert 'the key "k19999" is there twice' in error_of(tmp_path / "rows.jsonl")
    assert time.process_time() - begin < 2


def test_the_first_twenty_errors_are_listed(tmp_path: Path) -> None:
    rows: list[Any] = [chat("a", "b"), *[{"messages": []}] * 30]
    message = error_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert message.startswith("30 rows are wrong, the first 20 of them:\nline 2: ")
    assert message.count("\n") == 20


def test_choices_cannot_be_given_as_what_to_train_on() -> None:
    with pytest.raises(ConfigError, match="cannot be trained on") as caught:
        DataConfig(train_path="x", format="choice")
    assert caught.value.param == "format"
    assert DataConfig(train_path="x", validation_format="choice").packing is False


def test_formats_do_not_mix(tmp_path: Path) -> None:
    rows: list[Any] = [chat("a", "b"), *choice_rows(1), {"prompt": "a", "completion": "b"}, {"question": "a"}]
    message = error_of(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert "line 2: the format differs from the first row's: this row is choice, the file is chat" in message
    assert "line 3: the format differs from the first row's: this row is completion" in message
    assert 'line 4: "messages" is missing (the row has question)' in message


def test_a_format_can_be_given(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "prompt": "b", "completion": "c"}])
    assert isinstance(rows_of(path)[0], CompletionRow)
    assert "this row is completion, the file is text" in error_of(path, "text")
    for data_format in ("chat", "choice", "sharegpt", "alpaca"):
        other = write_jsonl(tmp_path / "other.jsonl", [{"a": 1}])
        assert error_of(other, data_format).startswith("1 row is wrong:\nline 1: ")


@pytest.mark.parametrize(
    "row",
    [
        {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"conversations": [{"from": "human", "value": "a"}], "chosen": {}, "rejected": {}},
    ],
)
def test_preferences_are_refused_with_a_reason(tmp_path: Path, row: Any) -> None:
    message = error_of(write_jsonl(tmp_path / "rows.jsonl", [row] * 100))
    assert message.startswith("line 1: rows of preferences") and "DPO" in message and "\n" not in message


def test_a_missing_file(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in error_of(tmp_path / "none.jsonl")
    assert "cannot be read: Is a directory" in error_of(tmp_path)


def test_good_rows(tmp_path: Path) -> None:
    rows = [messages({"role": "system", "content": ""}, USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1})]
    text = "\ufeff" + json.dumps(rows[0]) + "\r\n\r\n" + json.dumps(messages(USER, ANSWER))
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    first, second = rows_of(tmp_path / "rows.jsonl")
    assert isinstance(first, ChatRow)
    assert [message.trained for message in first.messages] == [False, False, False, False, True]
    assert (first.where, second.where) == ("line 1", "line 3")
    found = rows_of(write_jsonl(tmp_path / "choices.jsonl", choice_rows(2)))
    assert [type(row) for row in found] == [ChoiceRow, ChoiceRow]


def test_tools_in_every_way_of_writing_them(tmp_path: Path) -> None:
    call = ToolCall("c1", "look_up", {"word": "sun"})
    older = {"role": "assistant", "content": None, "function_call": {"name": "look_up", "arguments": '{"word": "sun"}'}}
    answer = {"role": "function", "name": "look_up", "content": "a star"}
    shared = [("human", "hi"), ("function_call", '{"name": "look_up", "arguments": {"word": "sun"}}')]
    shared += [("observation", "a star"), ("gpt", "hello")]
    rows: list[list[Any]] = [
        [{**messages(USER, CALLING, RESULT, ANSWER), "tools": [TOOL], "parallel_tool_calls": False}],
        [{**messages(USER, older, answer, ANSWER), "functions": [TOOL["function"]]}],
        [
            {
                "conversations": [{"from": speaker, "value": value} for speaker, value in shared],
                "tools": json.dumps([TOOL["function"]]),
            }
        ],
    ]
    for body in rows:
        (row,) = rows_of(write_jsonl(tmp_path / "rows.jsonl", body))
        assert isinstance(row, ChatRow)
        assert row.tools == (TOOL,)
        calling, result = row.messages[1:3]
        assert (calling.role, calling.content, calling.trained) == ("assistant", "", True)
        assert (calling.tool_calls[0].name, calling.tool_calls[0].arguments) == (call.name, call.arguments)
        assert result == ChatMessage(
            "tool", "a star", trained=False, tool_call_id=calling.tool_calls[0].id, name="look_up"
        )
        assert [message.content for message in row.messages] == ["hi", "", "a star", "hello"]


def test_parallel_calls_are_answered_in_their_order(tmp_path: Path) -> None:
    value = json.dumps([{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{}"}])
    turns = [("human", "a"), ("function_call", value), ("tool", "1"), ("tool", "2"), ("gpt", "b")]
    body: Any = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns], "system": "s"}
    (row,) = rows_of(write_jsonl(tmp_path / "rows.jsonl", [body]))
    assert isinstance(row, ChatRow)
    assert [(m.name, m.tool_call_id) for m in row.messages if m.role == "tool"] == [
        ("f", "call00000"),
        ("g", "call00001"),
    ]
    assert row.messages[0].role == "system"


def test_other_ways_of_writing_a_message(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = messages({"role": "developer", "content": "x"}, {"role": "user", "content": parts}, ANSWER)
    (row,) = rows_of(write_jsonl(tmp_path / "rows.jsonl", [body]))
    assert isinstance(row, ChatRow)
    assert [(m.role, m.content) for m in row.messages[:2]] == [("system", "x"), ("user", "ab")]


def test_flat_formats(tmp_path: Path) -> None:
    alpaca: list[Any] = [
        {"instruction": "Sort.", "input": "2 1", "output": "1 2"},
        {"instruction": "Say hi.", "input": "", "output": "hi", "system": "Be brief."},
    ]
    first, second = rows_of(write_jsonl(tmp_path / "rows.jsonl", alpaca))
    assert isinstance(first, ChatRow) and isinstance(second, ChatRow)
    assert [(m.role, m.content, m.trained) for m in first.messages] == [
        ("user", "Sort.\n2 1", False),
        ("assistant", "1 2", True),
    ]
    assert [m.content for m in second.messages] == ["Be brief.", "Say hi.", "hi"]
    assert rows_of(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b"}])) == [
        CompletionRow("line 1", "a", " b")
    ]
    assert rows_of(write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])) == [TextRow("line 1", "a", is_end=True)]


def test_an_array_is_read_like_lines(tmp_path: Path) -> None:
    # Longer than one read of the window, with texts that try to look like structure.
    bodies = [{"text": f'{place} }},{{ \\" ä ' * 50} for place in range(2000)]
    path = tmp_path / "rows.json"
    for indent in (None, 2):
        path.write_text("\ufeff \n" + json.dumps(bodies, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        rows = rows_of(path)
        assert [row.text for row in rows if isinstance(row, TextRow)] == [body["text"] for body in bodies]
        assert rows[-1].where == ("row 2000 (line 2)" if indent is None else "row 2000 (line 6000)")


def test_a_plain_text_is_one_document_in_pieces(tmp_path: Path) -> None:
    text = "".join(f"line {place} ä\n" for place in range(20_000)) + "x" * (2 * PIECE_CHARS) + " end"
    (tmp_path / "book.txt").write_text("\ufeff" + text, encoding="utf-8")
    pieces = rows_of(tmp_path / "book.txt")
    assert all(isinstance(piece, TextRow) and len(piece.text) <= PIECE_CHARS for piece in pieces)
    assert "".join(piece.text for piece in pieces if isinstance(piece, TextRow)) == text
    assert [piece.is_end for piece in pieces if isinstance(piece, TextRow)] == [False] * (len(pieces) - 1) + [True]
    assert pieces[0].where == "line 1" and pieces[-1].where == "line 20001"
    (tmp_path / "other").write_bytes(b"a\nb")
    assert rows_of(tmp_path / "other", "plain") == [TextRow("line 1", "a\nb", is_end=True)]
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1"))
    assert "not UTF-8" in error_of(tmp_path / "latin.txt")


def test_reading_says_how_far_it_is(tmp_path: Path) -> None:
    reader = RowReader(write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")] * 3), param="training_file")
    places = [reader.num_bytes_read / reader.num_bytes for _ in reader]
    assert places == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert not reader.has_choices()
