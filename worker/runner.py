"""One claimed job, from its claim to its end.

    leftovers of dead attempts -> model (from disk, or the hub) -> run.json -> engine -> verdict -> the job's new status

Three threads share the work: one renews the lease, one ships the journal, and this one starts the engine and watches
them all. Whatever says that the lease is gone ends in the same way: the engine's group is killed and nothing more is
written.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from jobs import catalog, lifecycle, reads, step_metrics
from jobs.db import Database
from jobs.errors import BusyError, InvalidRequestError, LeaseLostError, StorageError
from jobs.lifecycle import Claim, JobFailure, RetryPolicy
from jobs.owner import Owner
from jobs.run_config import RUN_CONFIG_NAME, RunPaths, api_param, to_train_config
from jobs.shape_cache import SHAPES_NAME, ShapeCache
from jobs.step_metrics import ResultFile, write_step_metrics
from lomo_core.config import CalibrationConfig
from lomo_core.errors import ConfigError, DiskFullError
from lomo_core.events import JOURNAL_NAME
from worker.engine_process import ENGINE_LOG_NAME, EngineProcess, engine_environment, hub_environment
from worker.heartbeat import Heartbeat
from worker.input_files import InputFiles, row_finder, send_result
from worker.journal_shipper import JournalReader, JournalShipper, Listeners, find_finished, ship_leftovers
from worker.log_shipper import ship_log
from worker.outage import STOP_PATIENCE_S, StillAwayError, persist
from worker.outcome import (
    RELEASED_REASON,
    Asked,
    Cancelled,
    Died,
    GaveUp,
    Paused,
    Released,
    Succeeded,
    Verdict,
    judge,
)
from worker.retention import ENCODED_NAME, INPUTS_NAME, attempt_folder, prune_superseded, remove_data
from worker.settings import WorkerSettings
from worker.trackers import Trackers, retell

T = TypeVar("T")

_HUB_COMMAND = (sys.executable, "-m", "worker.hub")
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_POLL_S = 0.05  # how late an engine's end is seen; a poll is one system call

log = structlog.get_logger(__name__)


class _GaveUpError(Exception):
    """The attempt ends before its engine has started; carries the verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(str(verdict))
        self.verdict = verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What all jobs of a worker share."""

    db: Database
    settings: WorkerSettings
    stopping: threading.Event
    """Set when the worker is told to stop."""

    @property
    def retry_policy(self) -> RetryPolicy:
        """How often a job is tried again."""
        return RetryPolicy(max_failures=self.settings.max_failures, backoff_s=self.settings.retry_backoff_s)


class JobRunner:
    """Runs one claimed job; `run` returns when the claim has ended, however it did."""

    def __init__(self, host: Host, claim: Claim, *, calibration: CalibrationConfig | None = None) -> None:
        self._host = host
        self._claim = claim
        self._calibration = calibration
        self._db = host.db
        self._settings = host.settings
        # Absolute, since the engine has another working directory and its paths come back in the journal.
        self._data_dir = host.settings.data_dir.absolute()
        self._job_folder = self._data_dir / "runs" / claim.lease.job_id
        self._folder = attempt_folder(self._data_dir / "runs", job_id=claim.lease.job_id, attempt=claim.lease.attempt)
        self._wake = threading.Event()
        self._heartbeat = Heartbeat(
            host.db,
            claim,
            every_s=host.settings.heartbeat_s,
            lease_s=host.settings.lease_s,
            wake=self._wake,
        )
        self._beating: Future[None] | None = None
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix=claim.lease.job_id)

    def run(self) -> None:
        """Run the job to the end of this attempt and write down how it ended.

        Raises:
            StillAwayError: the worker was told to stop while the database was away; the lease will run out.
        """
        with (
            self._threads,
            structlog.contextvars.bound_contextvars(job_id=self._claim.lease.job_id, attempt=self._claim.lease.attempt),
        ):
            log.info("job_claimed", model=self._claim.spec.model)
            self._beating = self._start_thread(self._heartbeat.run)
            try:
                self._conclude(self._attempt())
            except LeaseLostError:
                log.warning("lease_lost")
            finally:
                self._heartbeat.stop()

    def _attempt(self) -> Verdict:
        try:
            finished = self._ship_leftovers()
            if finished is not None:
                return finished
            self._prepare()
            return self._train()
        except (_GaveUpError, StorageError) as error:
            return error.verdict if isinstance(error, _GaveUpError) else Died(error.message.rstrip("."))
        except InvalidRequestError as error:
            return GaveUp(failure=JobFailure(code=error.code, message=error.message, param=error.param))
        except ConfigError as error:
            failure = JobFailure(code=error.code, message=error.message, param=api_param(error.param))
            return GaveUp(failure=failure)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            message = "The worker's disk is full: the run's folder could not be written."
            return GaveUp(failure=JobFailure(code=DiskFullError.code, message=message))

    # -- before the engine

    def _ship_leftovers(self) -> Succeeded | None:
        """Ship what killed workers left in the journals of earlier attempts. A model that one of them had already
        completed is taken as this attempt's result."""
        lease, result = self._claim.lease, None
        for earlier in self._persist(lambda: reads.list_attempts(self._db, job_id=lease.job_id), "reading attempts"):
            if earlier.number >= lease.attempt:
                continue
            path = attempt_folder(self._data_dir / "runs", job_id=lease.job_id, attempt=earlier.number) / JOURNAL_NAME
            if JournalReader(path, first=earlier.shipped_lines).read(1):
                self._warn(retell(self._job_folder, attempt=earlier.number, journal=path))
            self._persist(self._leftover_shipper(path, attempt=earlier.number, first=earlier.shipped_lines), "shipping")
            self._ship_log(attempt=earlier.number)
            finished = find_finished(path)
            if finished is not None and Path(finished.model_path).is_dir():
                result = Succeeded(finished)
        return result

    def _leftover_shipper(self, path: Path, *, attempt: int, first: int) -> Callable[[], int]:
        return lambda: ship_leftovers(
            self._db, self._claim, path, attempt=attempt, first=first, relative=self._relative
        )

    def _ship_log(self, *, attempt: int) -> None:
        """Ship what is left of the output of an attempt's processes."""
        job_id = self._claim.lease.job_id
        path = attempt_folder(self._data_dir / "runs", job_id=job_id, attempt=attempt) / ENGINE_LOG_NAME
        self._persist(lambda: ship_log(self._db, self._claim, path, attempt=attempt), "shipping the log")

    def _prepare(self) -> None:
        """Write the engine's specification into the attempt's folder."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        spec = self._claim.spec
        model = self._find_model()
        inputs = self._inputs()
        paths = RunPaths(
            run_dir=self._folder,
            model=model,
            train=inputs.find(spec.training_file, param="training_file"),
            validation=inputs.find(spec.validation_file, param="validation_file") if spec.validation_file else None,
            resume_from=self._find_checkpoints(),
            encoded=self._job_folder / ENCODED_NAME,
            shapes=self._find_shapes(model),
            calibration=self._calibration,
        )
        text = to_train_config(spec, paths).to_json()
        (self._folder / RUN_CONFIG_NAME).write_text(text, encoding="utf-8")

    def _find_model(self) -> Path:
        claim = self._claim
        source = self._persist(
            lambda: catalog.resolve_model(
                self._db, self._settings, owner=Owner(claim.organization_id), name=claim.spec.model
            ),
            "finding the model",
        )
        if source.path is not None:
            return source.path.absolute()
        if source.hub_id is None:
            raise AssertionError("a model is in a folder or on the hub")
        return self._download(source.hub_id)

    def _find_shapes(self, model: Path) -> Path | None:
        """Where the model's shapes are, by which the engine plans its memory; None where they are not known. The server
        has read them when the job was created, unless the model has only just been downloaded."""
        try:
            config = catalog.read_config(model, name=self._claim.spec.model)
        except InvalidRequestError:
            return None
        shapes = ShapeCache(self._data_dir / SHAPES_NAME)
        if model.is_relative_to(self._data_dir / "hub"):
            with contextlib.suppress(InvalidRequestError, BusyError):
                shapes.read(config)
        path = shapes.path_of(config)
        return path if path.is_file() else None

    def _download(self, hub_id: str) -> Path:
        self._persist(
            lambda: lifecycle.say(self._db, self._claim.lease, f"Downloading {hub_id} from the Hugging Face hub."),
            "reporting",
        )
        command = [*_HUB_COMMAND, hub_id, str(self._data_dir / "hub")]
        child = EngineProcess(command, folder=self._folder, environment=hub_environment())
        exit_code, asked = self._watch(child, shipping=None)
        *_, answer = child.log_tail().splitlines() or [""]
        if exit_code == 0:
            return Path(answer)
        self._end_as_asked(asked)
        if exit_code < 0:
            raise _GaveUpError(Died("The download of the base model was killed"))
        raise InvalidRequestError(answer, code="model_download_failed", param="model")

    def _inputs(self) -> InputFiles:
        find_row = row_finder(self._db, owner=Owner(self._claim.organization_id))
        return InputFiles(
            data_dir=self._data_dir,
            folder=self._job_folder / INPUTS_NAME,
            patience_s=self._settings.storage_patience_s,
            find_row=lambda file_id: self._persist(lambda: find_row(file_id), "finding a file"),
            heed=self._heed,
            wait=self._host.stopping.wait,
        )

    def _heed(self) -> None:
        """End the attempt, which has no engine yet, if that is asked for.

        Raises:
            LeaseLostError: the lease is gone.
        """
        self._check_threads(None)
        self._end_as_asked(self._asked())

    def _end_as_asked(self, asked: Asked) -> None:
        if asked is Asked.CANCEL:
            raise _GaveUpError(Cancelled())
        if asked is Asked.PAUSE:
            raise _GaveUpError(Paused())
        if asked is Asked.STOP:
            raise _GaveUpError(Released(RELEASED_REASON))

    def _find_checkpoints(self) -> tuple[Path, ...]:
        """Published checkpoints, newest first; what has gone from the disk is not worth offering to the engine."""
        job_id = self._claim.lease.job_id
        rows = self._persist(lambda: reads.resume_candidates(self._db, job_id=job_id), "reading checkpoints")
        return tuple(path for path in (self._data_dir / row.path for row in rows) if path.is_dir())

    # -- the engine

    def _train(self) -> Verdict:
        trackers = Trackers(self._job_folder, self._claim, self._settings)
        shipper = JournalShipper(
            self._db,
            self._claim,
            self._folder / JOURNAL_NAME,
            relative=self._relative,
            every_s=self._settings.ship_every_s,
            listeners=Listeners(on_lines=trackers.take, on_checkpoint=self._prune),
        )
        environment = engine_environment(num_threads=self._settings.engine_threads)
        command = [*self._settings.engine_command, "train", str(self._folder / RUN_CONFIG_NAME)]
        try:
            self._warn(trackers.begin())
            engine = EngineProcess(command, folder=self._folder, environment=environment)
            log.info("engine_started", pid=engine.pid)
            shipping = self._start_thread(shipper.run)
            exit_code, asked = self._watch(engine, shipping=shipping)
            log.info("engine_ended", exit_code=exit_code, asked=asked.value)
            shipper.end()
            self._await_shipping(shipping)
            self._warn(trackers.end(self._host.stopping))
        finally:
            trackers.kill()
            shipper.abort()
        verdict = judge(exit_code, asked=asked, finished=shipper.finished, failed=shipper.failed)
        if isinstance(verdict, GaveUp) and verdict.show_log:
            tail = engine.log_tail() or "(nothing)"
            self._persist(
                lambda: lifecycle.say(
                    self._db, self._claim.lease, f"The end of the engine's output:\n{tail}", level="error"
                ),
                "reporting",
            )
        return verdict

    def _watch(self, child: EngineProcess, *, shipping: Future[None] | None) -> tuple[int, Asked]:
        """Wait for a child's end, passing on what is asked of it. Returns its exit code and why it was told to stop.

        Raises:
            LeaseLostError: the lease is gone; the child has been killed.
        """
        asked, deadline = Asked.NOTHING, None
        try:
            while (exit_code := child.poll()) is None:
                self._check_threads(shipping)
                latest = self._asked() if asked in (Asked.NOTHING, Asked.PAUSE) else asked
                if latest is not asked:
                    log.info("engine_told_to_stop", reason=latest.value)
                    if asked is Asked.NOTHING:  # told twice, an engine leaves its checkpoint unwritten
                        child.terminate()
                    asked, deadline = latest, time.monotonic() + self._grace_s(latest)
                if deadline is not None and time.monotonic() > deadline:
                    log.warning("engine_killed", after_s=self._grace_s(asked))
                    child.kill()
                self._wake.wait(_POLL_S)
                self._wake.clear()
        finally:
            child.kill()
        return exit_code, asked

    def _grace_s(self, asked: Asked) -> float:
        return self._settings.pause_grace_s if asked is Asked.PAUSE else self._settings.stop_grace_s

    def _asked(self) -> Asked:
        if self._heartbeat.cancel_requested.is_set():
            return Asked.CANCEL
        if self._host.stopping.is_set():
            return Asked.STOP
        return Asked.PAUSE if self._heartbeat.pause_requested.is_set() else Asked.NOTHING

    def _check_threads(self, shipping: Future[None] | None) -> None:
        """Pass on what ended another thread: a lost lease, or a defect."""
        if self._heartbeat.lost.is_set():
            raise LeaseLostError(self._claim.lease.job_id, self._claim.lease.attempt)
        for thread in (self._beating, shipping):
            if thread is not None and thread.done():
                thread.result()

    def _start_thread(self, work: Callable[[], None]) -> Future[None]:
        """Run `work` beside this thread, its log lines bound to the job as well."""
        return self._threads.submit(contextvars.copy_context().run, work)

    def _await_shipping(self, shipping: Future[None]) -> None:
        """Wait until the journal's rest is in the database; not for long once the worker stops.

        Raises:
            StillAwayError: the rest was left to the next attempt.
        """
        deadline = None
        while not shipping.done():
            self._check_threads(None)
            if self._host.stopping.is_set():
                deadline = deadline or time.monotonic() + STOP_PATIENCE_S
                if time.monotonic() > deadline:
                    raise StillAwayError("gave up shipping the journal: its rest is left to the next attempt")
            self._wake.wait(_POLL_S)
            self._wake.clear()
        shipping.result()

    def _prune(self, *models: Path) -> None:
        """Delete what earlier attempts left and nobody can use any more."""
        published = {*self._find_checkpoints(), *models}
        prune_superseded(self._job_folder, attempt=self._claim.lease.attempt, published=published)

    # -- after the engine

    def _conclude(self, verdict: Verdict) -> None:
        """Write the verdict down; the one place where a claim ends."""
        # Of a download that failed; what an engine has said is there.
        self._ship_log(attempt=self._claim.lease.attempt)
        result_file = self._write_result_file() if isinstance(verdict, Succeeded) else None
        self._persist(lambda: self._write(verdict, result_file), "ending the job")
        log.info("attempt_ended", verdict=type(verdict).__name__.lower())
        if isinstance(verdict, Succeeded | GaveUp | Cancelled):
            remove_data(self._job_folder)
        if isinstance(verdict, Succeeded):
            self._prune(Path(verdict.finished.model_path))

    def _write_result_file(self) -> ResultFile | None:
        """The run's figures as a file. A full disk costs the file, of which the database has all, but not the model."""
        job_id, path = self._claim.lease.job_id, self._folder / step_metrics.FILE_NAME
        try:
            result = self._persist(
                lambda: write_step_metrics(self._db, job_id=job_id, path=path, data_dir=self._data_dir),
                "writing the result file",
            )
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            self._warn([f"The worker's disk is full: {step_metrics.FILE_NAME} could not be written."])
            return None
        url = self._settings.storage_url
        if not url:
            return result
        try:
            return self._persist(
                lambda: send_result(self._db, result, local=path, storage_url=url), "sending the result file"
            )
        except StorageError as error:
            # It stays in the data folder, as if there were no store: no reason to lose a model.
            log.warning("result_file_kept_here", error=error.message)
            return result

    def _write(self, verdict: Verdict, result_file: ResultFile | None) -> None:
        lease = self._claim.lease
        match verdict:
            case Succeeded():
                finished = verdict.finished
                lifecycle.succeed(
                    self._db,
                    lease,
                    model_path=self._relative(finished.model_path),
                    weights_sha256=finished.weights_sha256,
                    trained_tokens=finished.num_trained_tokens,
                    result_file=result_file,
                )
            case GaveUp():
                lifecycle.fail(self._db, lease, verdict.failure)
            case Cancelled():
                lifecycle.cancelled(self._db, lease)
            case Paused():
                lifecycle.paused(self._db, lease)
            case Released():
                lifecycle.release(self._db, lease, reason=verdict.reason)
            case Died():
                lifecycle.retry(self._db, lease, reason=verdict.reason, policy=self._host.retry_policy)

    def _warn(self, messages: Sequence[str]) -> None:
        for message in messages:
            self._persist(partial(lifecycle.say, self._db, self._claim.lease, message, level="warn"), "reporting")

    def _persist(self, write: Callable[[], T], what: str) -> T:
        return persist(write, what=what, stopping=self._host.stopping)

    def _relative(self, path: str) -> str:
        return Path(path).relative_to(self._data_dir).as_posix()
