"""Stop texts in a stream: what may be the beginning of one must not be sent before it is known. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence


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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
