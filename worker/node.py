"""The state of one worker process: its name and incarnation, its slots, and the thread that reports the host as alive.

A host is served by one worker at a time: a lock in the data folder refuses a second one of the same name, which would
take the first one's running jobs for those of a dead predecessor.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

import structlog

from jobs import checking, files, host_registry, lifecycle, loose_objects, reads, uploads
from jobs.db import Database
from jobs.errors import LeaseLostError, StorageError
from jobs.host_registry import HostReport
from jobs.lifecycle import Claim
from lomo_core.config import CalibrationConfig
from worker.calibration import calibrate, run_overhead_bytes
from worker.chat import ChatService
from worker.data_checker import DataChecker
from worker.gpus import describe_devices, find_gpus, host_memory_bytes, measure_device
from worker.heartbeat import HostPulse
from worker.outage import NOT_READY, OUTAGES, StillAwayError, first_line, persist
from worker.runner import Host, JobRunner
from worker.settings import WorkerSettings

# Connections: per job the runner, its heartbeat and its shipper; beside them the host's pulse, ring, reaper, checker of
# files and chats.
_CONNECTIONS_PER_JOB = 3
_CONNECTIONS_BESIDE = 5
# A store that does not answer takes up to a minute of the reaper's thread.
_STORE_PAUSE_S = 60.0

log = structlog.get_logger(__name__)


class WorkerRefusedError(Exception):
    """This worker must not start; the text says why and what to do."""


class Node:
    """One worker of one host. `send_ring` sends a doorbell: the node rings for work that it finds and cannot take."""

    def __init__(self, settings: WorkerSettings, *, send_ring: Callable[[], object]) -> None:
        self.settings = settings
        self.stopping = threading.Event()
        """Set by SIGTERM; every job looks at it."""
        self.incarnation = secrets.token_hex(8)
        pool_size = _CONNECTIONS_PER_JOB * settings.slots + _CONNECTIONS_BESIDE
        self._db = Database(settings.database_url, pool_size=pool_size)
        self.host = Host(db=self._db, settings=settings, stopping=self.stopping)
        self._chats = ChatService(self._db, settings)
        self._send_ring = send_ring
        self._slots = threading.Semaphore(settings.slots)
        self._rung = threading.Event()
        self._closed = threading.Event()
        self._objects_not_before = 0.0
        self._lock_file: BinaryIO | None = None
        self._calibration: CalibrationConfig | None = None
        self._pulse = threading.Thread(target=self._live, name="host-pulse", daemon=True)
        self.checker = DataChecker(self._db, settings, owner=self.owner, stopping=self.stopping, send_ring=send_ring)
        self._checking = threading.Thread(target=self.checker.run, name="data-checker", daemon=True)

    @property
    def owner(self) -> str:
        """The name under which this process holds leases."""
        return f"{self.settings.worker_name}/{self.incarnation}"

    def start(self) -> None:
        """Take the host's lock, then announce the host and look for work, in a thread that waits for the database.

        Raises:
            WorkerRefusedError: another worker of this name runs here, or the data folder cannot be used.
        """
        self._lock_file = self._take_lock()
        self._pulse.start()
        self._checking.start()
        self._chats.start()

    def close(self) -> None:
        """End the thread and close the database's connections; the lock goes with its file."""
        self._closed.set()
        if not self.stopping.is_set():  # set twice, it could be caught in between by the signal handler that sets it
            self.stopping.set()
        self.checker.wake()
        for thread in (self._pulse, self._checking):
            if thread.ident is not None:
                thread.join()
        self._chats.close()
        self._db.dispose()
        if self._lock_file is not None:
            self._lock_file.close()

    def work(self) -> None:
        """Claim and run jobs until none is left. Returns at once where all slots are taken: their threads claim again.

        A ring that comes between a slot's last look at the queue and its release would be lost; so the ring is noted
        first, and whoever gives a slot back looks at the note.
        """
        self.checker.wake()
        self._rung.set()
        while self._rung.is_set() and not self.stopping.is_set():
            if not self._slots.acquire(blocking=False):
                return
            try:
                self._rung.clear()
                while not self.stopping.is_set() and self._run_next():
                    pass
            finally:
                self._slots.release()

    def reap(self) -> None:
        """Requeue what dead workers held, and ring for queued jobs: their message may be lost, or their wait over.

        One ring per host, since the host that takes a ring may not be the one that a job fits. What is left of uploads
        that were never completed is removed as well, and files whose time is over.
        """
        settings = self.settings
        reaped = lifecycle.reap(
            self._db,
            every_s=settings.reap_every_s,
            lease_s=settings.lease_s,
            grace_s=settings.lease_grace_s,
            policy=self.host.retry_policy,
        )
        if reaped:
            log.warning("jobs_reaped", job_ids=reaped)
        if reads.due_jobs(self._db) > 0:
            for _ in range(max(1, reads.num_live_hosts(self._db))):
                self._send_ring()
        expired = uploads.sweep(self._db, settings)
        if expired:
            log.info("uploads_expired", upload_ids=expired)
        removed = files.sweep_expired(self._db, data_dir=settings.data_dir)
        if removed:
            log.info("files_expired", file_ids=removed)
        self._remove_objects()

    def _remove_objects(self) -> None:
        """Remove what no file names any more from the object store; not soon again if that does not answer."""
        if time.monotonic() < self._objects_not_before:
            return
        try:
            num_removed = loose_objects.sweep(self._db)
        except StorageError as error:
            self._objects_not_before = time.monotonic() + _STORE_PAUSE_S
            log.warning("objects_not_removed", error=error.message)
            return
        if num_removed:
            log.info("objects_removed", num_objects=num_removed)

    def measure_idle(self) -> int | None:
        """What is free on the device now, in bytes; None while a job runs here, whose own memory would be missing.

        A start that follows a kill may measure while the killed engine still holds the card, and other programs come
        and go: without this, what was measured then would stand until the next start. Nobody claims meanwhile, since
        all slots are taken; a ring that came to nothing by that is repeated.
        """
        if self._chats.is_loaded:
            return None  # its model goes when a job needs the room, so the room counts as free
        num_taken = 0
        try:
            while num_taken < self.settings.slots:
                if not self._slots.acquire(blocking=False):
                    return None
                num_taken += 1
            return measure_device(find_gpus()).available_bytes
        finally:
            for _ in range(num_taken):
                self._slots.release()
            if self._rung.is_set():
                self._send_ring()

    def _run_next(self) -> bool:
        """Run one job, if there is one."""
        claim = lifecycle.claim(self._db, owner=self.owner, lease_s=self.settings.lease_s)
        if claim is None:
            return False
        self._chats.make_room()
        if self.settings.slots > 1:
            self._send_ring()  # one message may stand for several jobs: another slot looks too
        has_ended = False
        try:
            JobRunner(self.host, claim, calibration=self._calibration).run()
            has_ended = True
        except StillAwayError as error:
            log.warning("job_left_behind", job_id=claim.lease.job_id, error=str(error))
            has_ended = True
        finally:
            if not has_ended:
                self._give_back(claim)
        return True

    def _give_back(self, claim: Claim) -> None:
        """After a defect of the worker itself: the job need not wait for its lease to run out."""
        reason = "The worker met an unexpected error"
        try:
            lifecycle.retry(self._db, claim.lease, reason=reason, policy=self.host.retry_policy)
        except (LeaseLostError, *OUTAGES) as error:
            log.warning("job_not_given_back", job_id=claim.lease.job_id, error=first_line(error))

    def _live(self) -> None:
        try:
            persist(self._announce, what="announcing the host", stopping=self._closed, outages=NOT_READY)
        except StillAwayError:
            return
        self._send_ring()
        pulse = HostPulse(
            self._db,
            name=self.settings.worker_name,
            every_s=self.settings.heartbeat_s,
            measure_every_s=self.settings.measure_every_s,
            measure=self.measure_idle,
        )
        pulse.run(self._closed)

    def _announce(self) -> None:
        """Record the host, and free what its killed predecessor held: it cannot be running, since the lock is ours."""
        name = self.settings.worker_name
        gpus = find_gpus()
        device = measure_device(gpus)
        if device.kind == "cpu" and self._calibration is None:
            self._calibration = calibrate(self.settings, stopping=self._closed)
        report = HostReport(
            name=name,
            incarnation=self.incarnation,
            memory_bytes=host_memory_bytes(),
            available_bytes=device.available_bytes,
            run_overhead_bytes=0 if self._calibration is None else run_overhead_bytes(self._calibration),
            device_kind=device.kind,
            devices=describe_devices(gpus),
            slots=self.settings.slots,
        )
        host_registry.register_host(self._db, report)
        freed = lifecycle.release_dead(self._db, host=name, incarnation=self.incarnation, policy=self.host.retry_policy)
        checking.release_dead_checks(self._db, host=name, incarnation=self.incarnation)
        log.info("host_announced", host=name, incarnation=self.incarnation, freed_job_ids=freed)

    def _take_lock(self) -> BinaryIO:
        """Lock `worker-<name>.lock`. The kernel lets go of it when this process ends, however it ends."""
        path = self.settings.data_dir / f"worker-{self.settings.worker_name}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = path.open("ab")
        except OSError as error:
            raise WorkerRefusedError(
                f"The data folder {path.parent} cannot be written: {error.strerror}. Set LOMO_DATA_DIR to one that can."
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise WorkerRefusedError(
                f"A worker named {self.settings.worker_name!r} already runs on the data folder {path.parent}. "
                "Stop it, or give this one another name by LOMO_WORKER_NAME."
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode("ascii"))
        file.flush()
        return file
