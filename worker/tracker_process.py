"""A process that tells a run to one tool (`tracker_child.py`), and the queue before it, on which nobody waits."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worker.engine_process import tracker_environment
from worker.tracked import Point

Json = dict[str, Any]

_COMMAND = (sys.executable, "-m", "worker.tracker_child")
_MAX_WAITING = 10_000  # points: 8 MB, and at 10 steps a second a quarter of an hour
_END_PATIENCE_S = 30.0  # for the rest, once the run has ended: importing wandb takes 5 s on a busy host
_STOP_PATIENCE_S = 2.0  # the same where the worker stops: the job still has to be given back
_POLL_S = 0.05  # how late a stop is seen
_TAIL_BYTES = 4096  # of its output, to find the last line in


class TrackerProcess:
    """One run of one tool. `name` is the tool's, as users know it."""

    def __init__(self, name: str, run: Json, *, log_path: Path) -> None:
        self.name = name
        self._log_path = log_path
        self._num_dropped = 0
        self._waiting: queue.Queue[Json | None] = queue.Queue(_MAX_WAITING)
        with log_path.open("ab") as output:
            self._process = subprocess.Popen(
                _COMMAND,
                env=tracker_environment(),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
            )
        self._waiting.put_nowait(run)
        self._feeder = threading.Thread(target=self._feed, name=f"tracker-{name}", daemon=True)
        self._feeder.start()

    def tell(self, points: Sequence[Point]) -> None:
        """Queue figures; where the queue is full they are dropped and counted."""
        for point in points:
            try:
                self._waiting.put_nowait({"step": point.step, "time_s": point.time_s, "values": dict(point.values)})
            except queue.Full:
                self._num_dropped += 1

    def end(self, stopping: threading.Event) -> list[str]:
        """Wait a while for it to tell the rest; kill it then. Returns what went wrong, for the job's events."""
        exit_code = self._wait(stopping) if self._end_queue() else None
        self.kill()
        if exit_code is None:
            return [f"{self.name} did not take all of the run's figures in time: it lacks the last ones."]
        if exit_code:
            return [f"{self.name} does not have all of the run's figures: {self._last_line()}"]
        if self._num_dropped:
            return [f"{self.name} was too slow for the run: it lacks the figures of {self._num_dropped} steps."]
        return []

    def kill(self) -> None:
        """End it, and what it has started, at once."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._end_queue()

    def _end_queue(self) -> bool:
        """Tell the thread that nothing more comes. A full queue takes not even that; once the process is dead the
        thread then ends at its next write."""
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            return False
        return True

    def _wait(self, stopping: threading.Event) -> int | None:
        began = time.monotonic()
        while time.monotonic() - began < (_STOP_PATIENCE_S if stopping.is_set() else _END_PATIENCE_S):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(timeout=_POLL_S)
        return None

    def _feed(self) -> None:
        """Pass the queue on until its end, or until the process takes no more."""
        pipe = self._process.stdin
        if pipe is None:
            raise AssertionError("the process has a pipe")
        with contextlib.suppress(OSError), pipe:  # of one that has ended; its exit code and its last line say why
            while (item := self._waiting.get()) is not None:
                pipe.write(json.dumps(item) + "\n")
                pipe.flush()

    def _last_line(self) -> str:
        with self._log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = log.read().decode("utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a word.")
