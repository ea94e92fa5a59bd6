"""Being asked to stop (SIGTERM): a flag, tested between steps, in evaluation and while loading. Torch-free.

The first signal asks for a checkpoint and an orderly end; the second ends the process at once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from lomo_core.errors import InterruptedRunError


class StopRequest:
    """Whether the run has been asked to stop."""

    def __init__(self) -> None:
        self.is_requested = False

    def install(self) -> None:
        """Catch SIGTERM from now on (main thread only)."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def raise_if_requested(self) -> None:
        """Leave the current phase.

        Raises:
            InterruptedRunError: a stop was asked for.
        """
        if self.is_requested:
            raise InterruptedRunError("the run was asked to stop")

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.is_requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.is_requested = True
