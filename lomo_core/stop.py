"""Being asked to stop (SIGTERM): a flag, tested between steps, in evaluation and while loading. Torch-free.

The first signal asks for a checkpoint and an orderly end; the second ends the process at once. Where there is nothing
to save yet, the first one ends a long call of a library from within.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lomo_core.errors import InterruptedRunError


class StopRequest:
    """Whether the run has been asked to stop."""

    def __init__(self) -> None:
        self.is_requested = False
        self._may_raise = False

    def install(self) -> None:
        """Catch SIGTERM from now on (main thread only)."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def raise_if_requested(self) -> None:
        """Leave the current phase.

        Raises:
            InterruptedRunError: a stop was asked for.
        """
        if self.is_requested:
            raise InterruptedRunError("the run was asked to stop while it was loading")

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside of the block a signal raises where it arrives: for loading, when nothing can be left half done.

        Raises:
            InterruptedRunError: a stop was asked for, before or in the block.
        """
        self._may_raise = True
        try:
            self.raise_if_requested()
            yield
        finally:
            self._may_raise = False
        self.raise_if_requested()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.is_requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.is_requested = True
        if self._may_raise:
            self.raise_if_requested()
