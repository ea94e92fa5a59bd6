"""Signs of life: a running job's lease is renewed, and with the same answer comes what its user asked for.

An outage of the database ends nothing: the lease may be renewed after its end as long as nobody has reaped it. A lost
lease ends everything: somebody else may run the job by now.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from jobs import host_registry, lifecycle
from jobs.db import Database
from jobs.errors import LeaseLostError
from jobs.lifecycle import Claim
from worker.outage import OUTAGES, Backoff


class Heartbeat:
    """Renews one lease in a thread of its own until `stop`, or until the lease is lost.

    `wake` is set whenever something has changed that the runner has to look at.
    """

    def __init__(self, db: Database, claim: Claim, *, every_s: float, lease_s: float, wake: threading.Event) -> None:
        self._db = db
        self._claim = claim
        self._every_s = every_s
        self._lease_s = lease_s
        self._wake = wake
        self._stopped = threading.Event()
        self.lost = threading.Event()
        """The lease is gone."""
        self.cancel_requested = threading.Event()
        """The job's user wants it to end."""
        self.pause_requested = threading.Event()
        """The job's user wants it to stop for now."""

    def run(self) -> None:
        """Renew at once and then every `every_s`. After a failure the next try comes sooner."""
        backoff = Backoff("renewing a lease")
        wait_s = 0.0
        while not self._stopped.wait(wait_s):
            try:
                asked = lifecycle.renew(self._db, self._claim.lease, lease_s=self._lease_s)
            except LeaseLostError:
                self.lost.set()
                self._wake.set()
                return
            except OUTAGES as error:
                wait_s = min(backoff.failed(error), self._every_s)
                continue
            backoff.worked()
            wait_s = self._every_s
            for is_asked, event in ((asked.cancel, self.cancel_requested), (asked.pause, self.pause_requested)):
                if is_asked and not event.is_set():
                    event.set()
                    self._wake.set()

    def stop(self) -> None:
        """Renew no more; `run` returns."""
        self._stopped.set()


class HostPulse:
    """Reports the host as alive for as long as the worker runs, jobs or none: what `/readyz` and the dashboard show.

    Every `measure_every_s` it asks `measure` for the device's free memory and reports that, too, if there is an answer.
    """

    def __init__(
        self,
        db: Database,
        *,
        name: str,
        every_s: float,
        measure_every_s: float,
        measure: Callable[[], int | None],
    ) -> None:
        self._db = db
        self._name = name
        self._every_s = every_s
        self._measure_every_s = measure_every_s
        self._measure = measure

    def run(self, stopped: threading.Event) -> None:
        """Report every `every_s` until `stopped`."""
        backoff = Backoff("reporting the host")
        measured_at = time.monotonic()
        while not stopped.wait(self._every_s):
            available_bytes = None
            if time.monotonic() - measured_at >= self._measure_every_s:
                available_bytes = self._measure()
                measured_at = time.monotonic()
            try:
                host_registry.see_host(self._db, name=self._name, available_bytes=available_bytes)
            except OUTAGES as error:
                backoff.failed(error)
            else:
                backoff.worked()
