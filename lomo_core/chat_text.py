"""Stop texts and calls of functions in a stream: what may be the beginning of one must not be sent before it is known.
Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

# As the templates of Qwen, Hermes and SmolLM3 have their models write calls.
_CALL = "<tool_call>"
_CALLS = re.compile(r"\s*<tool_call>(.*?)</tool_call>", re.DOTALL)


class StopText:
    """Passes text on up to the first of the given stop texts, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.was_found = False
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def feed(self, text: str, *, is_last: bool = False) -> str:
        """Take the next piece. Returns what may be sent now; with `is_last` nothing is held back."""
        if self.was_found:
            return ""
        pending = self._held + text
        places = [place for stop in self._stops if (place := pending.find(stop)) >= 0]
        if places:
            self.was_found, self._held = True, ""
            return pending[: min(places)]
        keep = 0 if is_last else max((_overlap(pending, stop) for stop in self._stops), default=0)
        cut = len(pending) - keep
        self._held = pending[cut:]
        return pending[:cut]


class CallText:
    """Passes text on up to the first `<tool_call>` and keeps the rest until the end: calls, or text after all."""

    def __init__(self) -> None:
        self._held = ""
        self._has_begun = False

    def feed(self, text: str) -> str:
        """Take the next piece. Returns what may be sent now."""
        pending = self._held + text
        place = 0 if self._has_begun else pending.find(_CALL)
        self._has_begun = place >= 0
        cut = place if self._has_begun else len(pending) - _overlap(pending, _CALL)
        self._held = pending[cut:]
        return pending[:cut]

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What is still to be sent, and the calls, each with `name` and `arguments`; one of the two is empty."""
        calls, end = [], 0
        while match := _CALLS.match(self._held, end):
            call = _read_call(match[1])
            if call is None:
                return self._held, []
            calls.append(call)
            end = match.end()
        return ("", calls) if calls and not self._held[end:].strip() else (self._held, [])


def _read_call(text: str) -> dict[str, Any] | None:
    """A call as JSON with a name and an object of arguments; None where it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return {"name": call["name"], "arguments": arguments} if isinstance(arguments, dict) else None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
