"""The engine's `chat` command as a child: one model, requests in and events out as JSON lines over pipes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worker.engine_process import EngineProcess, engine_environment
from worker.settings import WorkerSettings

_READ_BYTES = 1 << 16


class EngineEndedError(Exception):
    """The child has ended; the text is the end of what it wrote on stderr."""


class ChatEngine:
    """A model in a process of its own. Used by the thread that made it alone.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, settings: WorkerSettings, *, folder: Path, needed_bytes: int, place: int) -> None:
        self.folder = folder
        self.place = place
        """Its number among those that are loaded at once, which has a log of its own."""
        self.needed_bytes = needed_bytes
        """What it takes, as it was reckoned before it was loaded."""
        self.is_ready = False
        """Whether it has said that its model is loaded."""
        self.used_at = time.monotonic()
        own = settings.data_dir / "chat" / settings.worker_name / str(place)
        own.mkdir(parents=True, exist_ok=True, mode=0o700)
        (own / "engine.log").unlink(missing_ok=True)
        self._process = EngineProcess(
            [*settings.engine_command, "chat", "--model", str(folder)],
            folder=own,
            environment=engine_environment(num_threads=settings.engine_threads),
            with_pipes=True,
        )
        self._rest = b""

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, request_id: str, turn: Mapping[str, Any]) -> None:
        """Send a request.

        Raises:
            EngineEndedError: it runs no more.
        """
        self._write({"id": request_id, **turn})

    def stop(self, request_id: str) -> None:
        """End an answer early; what it still says of it has that id."""
        if self.is_alive:
            self._write({"stop_id": request_id})

    def read(self, *, wait_s: float) -> list[dict[str, Any]]:
        """The events that have come, after a wait of at most `wait_s` for the first.

        Raises:
            EngineEndedError: it runs no more.
        """
        self.used_at = time.monotonic()
        ready, _, _ = select.select([self._process.stdout], [], [], wait_s)
        if not ready:
            return []
        chunk = os.read(self._process.stdout.fileno(), _READ_BYTES)
        if not chunk:
            raise self._ended()
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()

    def _write(self, message: Mapping[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def _ended(self) -> EngineEndedError:
        lines = self._process.log_tail().splitlines()
        return EngineEndedError(lines[-1] if lines else "it said nothing, so it was probably killed")
