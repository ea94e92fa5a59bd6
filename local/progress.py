"""What `lomo up` says while it works: a spinner in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console


class Progress(Protocol):
    """Listener of a starting, running and stopping stack. `note` may be called from any thread."""

    def stage(self, text: str) -> AbstractContextManager[None]:
        """Announce a piece of work that lasts as long as the context."""
        ...

    def note(self, text: str) -> None:
        """Say a sentence."""
        ...


class Silent:
    """Says nothing: for tests, and for callers that report in their own way."""

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Let the work pass."""
        del text
        yield

    def note(self, text: str) -> None:
        """Drop the sentence."""


class ConsoleProgress:
    """Says each finished stage with its time; shows the running one as a spinner if this is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Show the work and, when it is done, how long it took. A failure is left to whoever reports it."""
        started_s = time.monotonic()
        if self._console.is_terminal:
            with self._console.status(f"{text} ..."):
                yield
        else:
            self.note(f"{text} ...")
            yield
        self.note(f"{text}: done ({time.monotonic() - started_s:.1f} s)")

    def note(self, text: str) -> None:
        """Print one line or more, as they are."""
        self._console.print(text, markup=False)
