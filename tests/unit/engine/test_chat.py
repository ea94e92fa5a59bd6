"""The chat engine: stop texts wherever they are cut, characters of several tokens, and the process itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lomo_core.chat_text import CallText, StopText
from tests.support.tiny_model import make_tiny_model

_TIMEOUT_S = 120


CALLS = '<tool_call>\n{"name": "look", "arguments": {"word": "day"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "sent", "calls"),
    [
        (CALLS, "", [{"name": "look", "arguments": {"word": "day"}}]),
        (f"Let me see. {CALLS}", "Let me see. ", [{"name": "look", "arguments": {"word": "day"}}]),
        (f"{CALLS}\n{CALLS}\n", "", [{"name": "look", "arguments": {"word": "day"}}] * 2),
        ('<tool_call>{"name": "now"}</tool_call>', "", [{"name": "now", "arguments": {}}]),
        # What is no call, or has an end that is none, is text.
        (f"{CALLS} and so on", f"{CALLS} and so on", []),
        (CALLS[:-5], CALLS[:-5], []),
        ("<tool_call>{]</tool_call>", "<tool_call>{]</tool_call>", []),
        ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
        ("a < b <tool", "a < b <tool", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_told_from_text_wherever_it_is_cut(text: str, sent: str, calls: list[object], size: int) -> None:
    call_text = CallText()
    pieces = [call_text.feed(text[start : start + size]) for start in range(0, len(text), size)]
    rest, found = call_text.finish()
    assert ("".join(pieces) + rest, found) == (sent, calls)


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=3), max_size=4), st.data())
def test_a_stop_text_is_found_wherever_the_text_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    stop_text = StopText(stops)
    sent, rest = "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        sent += stop_text.feed(rest[:size])
        rest = rest[size:]
        # What was sent can never have been the beginning of a stop text.
        assert not any(stop in sent for stop in stops)
    sent += stop_text.feed("", is_last=True)
    places = [text.find(stop) for stop in stops if stop in text]
    assert stop_text.was_found == bool(places)
    if not places:
        assert sent == text
    else:
        # The first to be complete counts, as with a reader who sees one character after the other.
        first_end = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        ended = [text.find(stop) for stop in stops if stop in text and text.find(stop) < first_end]
        assert sent == text[: len(sent)]
        assert min(places) <= len(sent) <= max(ended)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model. Costs half a second."""
    return make_tiny_model(tmp_path_factory.mktemp("chat") / "model", seed=12)


def run(folder: Path, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """All events of a process that gets these requests and the end of its input."""
    result = subprocess.run(
        [sys.executable, "-m", "lomo_core", "chat", "--model", str(folder)],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=True,
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_process_answers_in_turn(folder: Path) -> None:
    ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "seed": 3}
    events = run(
        folder,
        {"id": "a", **ask},
        {"id": "b", **ask},
        {"id": "c", **ask, "temperature": 0, "max_tokens": 3},
        {"id": "d", **ask, "max_tokens": 600},
    )
    assert events[0]["type"] == "ready"
    texts = {
        key: "".join(event["text"] for event in events if event["id"] == key and event["type"] == "delta")
        for key in "abc"
    }
    assert texts["a"] == texts["b"]
    assert texts["a"]
    ends = {event["id"]: event for event in events if event["type"] in ("finished", "refused")}
    assert ends["a"] == ends["b"] | {"id": "a"}
    assert (ends["c"]["finish_reason"], ends["c"]["completion_tokens"]) == ("length", 3)
    assert ends["d"]["code"] == "context_length_exceeded"


def test_a_folder_that_holds_no_model_is_one_sentence(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lomo_core", "chat", "--model", str(tmp_path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert result.returncode != 0
    assert "config.json" in result.stderr
    assert "Traceback" not in result.stderr
