"""Rings for jobs that have come to be queued, from a thread of its own: a broker that is down must neither delay nor
fail the request that made one."""

from __future__ import annotations

import threading

from celery import Celery

from jobs import dispatch

# A message costs 0.7 of the 5 ms that a submission takes the server. It may stand for several jobs, since a worker that
# finds one passes it on (`worker/node.py`); four, so that four hosts of one slot each begin at once.
_PAUSE_S = 0.1
_MAX_AT_ONCE = 4
# The broker's own time-outs are shorter; who waits longer than this for a stop kills the process.
_CLOSE_TIMEOUT_S = 4.0


class Doorbell:
    """Rings at once where nobody has asked for a while, else for all that have asked since it last did."""

    def __init__(self, broker: Celery) -> None:
        self._broker = broker
        self._num_asked = 0
        self._lock = threading.Lock()
        self._asked = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._live, name="doorbell", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def ask(self) -> None:
        """Have it rung for one more job, which is committed. Returns at once, from any thread."""
        with self._lock:
            self._num_asked += 1
        self._asked.set()

    def close(self) -> None:
        """Ring for those who have asked, and end the thread."""
        self._closed.set()
        self._asked.set()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _live(self) -> None:
        is_last = False
        while not is_last:
            self._asked.wait()
            is_last = self._closed.is_set()
            self._asked.clear()
            with self._lock:
                num_asked, self._num_asked = self._num_asked, 0
            for _ in range(min(num_asked, _MAX_AT_ONCE)):
                if not dispatch.ring(self._broker):
                    break  # a broker that takes none takes no other one either; the reaper rings when it does
            self._closed.wait(_PAUSE_S)
