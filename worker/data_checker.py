"""Checks the files of jobs that are to be queued: one at a time per host, beside the slots, in a limited process.

The process is the engine's (`lomo_core.data.check`): it reads the tokenizer and no weights, and bounds its own memory
and CPU time before it reads anything of a stranger's. This thread bounds its time on the clock, keeps its claim alive,
and ends it where the job was cancelled.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog

from jobs import catalog, checking
from jobs.checking import CheckClaim
from jobs.db import Database
from jobs.errors import InvalidRequestError, LeaseLostError, StorageError
from jobs.lifecycle import JobFailure
from jobs.owner import Owner
from jobs.status import JobStatus
from lomo_core.data.check_config import CheckConfig
from lomo_core.errors import EXIT_CODES, EngineError
from worker.engine_process import EngineProcess, engine_environment
from worker.input_files import InputFiles, row_finder
from worker.outage import NOT_READY, StillAwayError, first_line, persist
from worker.retention import INPUTS_NAME
from worker.settings import WorkerSettings

CHECKS_NAME = "checks"
_SPEC_NAME, _REPORT_NAME = "check.json", "report.json"
# A ring may be lost, or wait behind a job; asking is one read of an index that is empty most of the time.
_LOOK_EVERY_S = 1.0
_POLL_S = 0.05  # how late a process's end is seen; a poll is one system call
# The start takes 1.5 CPU seconds (transformers, without torch). SmolLM2's tokenizer and template then do 1.3 MB of
# chats in a CPU second (8,000 rows of 480 bytes); a twentieth of that is for slower templates and machines.
_START_CPU_S, _CPU_BYTES_PER_S = 60, 64 * 1024
# On the clock: the machine has other work than this.
_CLOCK_PER_CPU_S = 4

log = structlog.get_logger(__name__)


class _StoppingError(Exception):
    """The worker stops before the check has begun."""


class DataChecker:
    """The thread of a host that checks files. `send_ring` is called for every job that it queues."""

    def __init__(
        self,
        db: Database,
        settings: WorkerSettings,
        *,
        owner: str,
        stopping: threading.Event,
        send_ring: Callable[[], object],
    ) -> None:
        self._db = db
        self._settings = settings
        self._owner = owner
        self._stopping = stopping
        self._send_ring = send_ring
        self._wake = threading.Event()
        self._data_dir = settings.data_dir.absolute()
        self._folder = self._data_dir / CHECKS_NAME / settings.worker_name

    def wake(self) -> None:
        """Look at once: a job may have come."""
        self._wake.set()

    def run(self) -> None:
        """Check what there is to check until the worker stops."""
        while not self._stopping.is_set():
            try:
                found = self.check_next()
            except NOT_READY as error:
                log.warning("check_without_database", error=first_line(error))
                found = False
            except StillAwayError:
                return
            except Exception:
                log.exception("check_failed")
                found = False
            if not found:
                self._wake.wait(_LOOK_EVERY_S)
                self._wake.clear()

    def check_next(self) -> bool:
        """Check the files of one job, if there is one that waits for it."""
        settings = self._settings
        claim = checking.claim_check(
            self._db, owner=self._owner, lease_s=settings.lease_s, max_failures=settings.max_failures
        )
        if claim is None:
            return False
        log.info("check_started", job_id=claim.job_id, number=claim.number)
        try:
            self._check(claim)
        except LeaseLostError:
            log.info("check_not_wanted", job_id=claim.job_id)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        return True

    def _check(self, claim: CheckClaim) -> None:
        try:
            config = self._prepare(claim)
        except _StoppingError:
            self._release(claim)
            return
        except (InvalidRequestError, StorageError) as error:
            self._give_up(claim, JobFailure(code=error.code, message=error.message, param=error.param))
            return
        command = [*self._settings.engine_command, "check-data", str(self._folder / _SPEC_NAME)]
        environment = engine_environment(num_threads=self._settings.engine_threads)
        child = EngineProcess(command, folder=self._folder, environment=environment)
        exit_code = self._await(child, claim, most_s=config.most_cpu_s * _CLOCK_PER_CPU_S)
        if exit_code is None:
            self._release(claim)
        elif exit_code == 0:
            self._finish(claim)
        else:
            self._give_up(claim, _failure(exit_code, child.log_tail(), most_cpu_s=config.most_cpu_s))

    def _prepare(self, claim: CheckClaim) -> CheckConfig:
        """Write the specification of a check into a folder of its own."""
        spec = claim.spec
        source = persist(
            lambda: catalog.resolve_model(
                self._db, self._settings, owner=Owner(claim.organization_id), name=spec.model
            ),
            what="finding the model",
            stopping=self._stopping,
        )
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, mode=0o700)
        inputs = self._inputs(claim)
        training = inputs.find(spec.training_file, param="training_file")
        validation = None
        if spec.validation_file is not None:
            validation = inputs.find(spec.validation_file, param="validation_file")
        num_bytes = sum(path.stat().st_size for path in (training, validation) if path is not None)
        config = CheckConfig(
            train_path=str(training),
            validation_path=None if validation is None else str(validation),
            report_path=str(self._folder / _REPORT_NAME),
            model_path=None if source.path is None else str(source.path.absolute()),
            format=spec.training_format,
            validation_format=spec.validation_format,
            max_seq_length=spec.lomo.max_seq_length,
            train_on=spec.lomo.train_on,
            packing=spec.lomo.packing,
            n_epochs=spec.n_epochs,
            batch_size=spec.batch_size,
            max_steps=spec.lomo.max_steps,
            seed=spec.seed,
            most_cpu_s=_START_CPU_S + num_bytes // _CPU_BYTES_PER_S,
        )
        (self._folder / _SPEC_NAME).write_text(config.to_json(), encoding="utf-8")
        return config

    def _inputs(self, claim: CheckClaim) -> InputFiles:
        find_row = row_finder(self._db, owner=Owner(claim.organization_id))
        renewed = time.monotonic()

        def heed() -> None:
            nonlocal renewed
            if self._stopping.is_set():
                raise _StoppingError
            if time.monotonic() - renewed > self._settings.heartbeat_s:
                renewed = time.monotonic()
                self._renew(claim)

        return InputFiles(
            data_dir=self._data_dir,
            folder=self._folder / INPUTS_NAME,
            patience_s=self._settings.storage_patience_s,
            find_row=lambda file_id: persist(lambda: find_row(file_id), what="finding a file", stopping=self._stopping),
            heed=heed,
            wait=self._stopping.wait,
        )

    def _await(self, child: EngineProcess, claim: CheckClaim, *, most_s: float) -> int | None:
        """The exit code of a check; None where the worker stops meanwhile.

        Raises:
            LeaseLostError: the job is to be checked no more, or by another; the child has been killed.
        """
        begin = renewed = time.monotonic()
        pause = threading.Event()
        try:
            while (exit_code := child.poll()) is None:
                now = time.monotonic()
                if self._stopping.is_set():
                    return None
                if now - begin > most_s:
                    return -signal.SIGXCPU
                if now - renewed > self._settings.heartbeat_s:
                    renewed = now
                    self._renew(claim)
                pause.wait(_POLL_S)
        finally:
            child.kill()
        return exit_code

    def _renew(self, claim: CheckClaim) -> None:
        try:
            is_ours = checking.renew_check(self._db, claim, lease_s=self._settings.lease_s)
        except NOT_READY as error:
            # Whether it is still ours shows at the end.
            log.warning("check_without_database", error=first_line(error))
            return
        if not is_ours:
            raise LeaseLostError(claim.job_id, claim.number)

    def _finish(self, claim: CheckClaim) -> None:
        report: dict[str, Any] = json.loads((self._folder / _REPORT_NAME).read_text(encoding="utf-8"))
        status = persist(
            lambda: checking.finish_check(self._db, claim, report), what="ending a check", stopping=self._stopping
        )
        log.info("check_ended", job_id=claim.job_id, status=status.value)
        if status is JobStatus.QUEUED:
            self._send_ring()

    def _release(self, claim: CheckClaim) -> None:
        persist(lambda: checking.release_check(self._db, claim), what="giving a check back", stopping=self._stopping)

    def _give_up(self, claim: CheckClaim, failure: JobFailure) -> None:
        log.info("check_given_up", job_id=claim.job_id, code=failure.code)
        persist(
            lambda: checking.give_up_check(self._db, claim, failure), what="ending a check", stopping=self._stopping
        )


def _failure(exit_code: int, output: str, *, most_cpu_s: int) -> JobFailure:
    """Why a check came to nothing, by how its process ended."""
    *_, last_line = output.splitlines() or ["nothing"]
    kind = EXIT_CODES.get(exit_code, EngineError)
    if kind is not EngineError:
        return JobFailure(code=kind.code, message=f"{last_line[:1].upper()}{last_line[1:]}.", param="model")
    if exit_code in (-signal.SIGXCPU, -signal.SIGKILL):
        message = (
            f"The files could not be checked within {most_cpu_s} s of computing time: the model's chat template may "
            "never end, or the files are too large for this host."
        )
        return JobFailure(code="data_check_timeout", message=message, param="training_file")
    message = f"The files could not be checked: the process ended with {exit_code} and said: {last_line[:300]}"
    return JobFailure(code="data_check_failed", message=message, param="training_file")
