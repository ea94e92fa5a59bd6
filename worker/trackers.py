"""The tools that draw a run, told of one attempt's figures. None of them can fail or hold up the run."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import structlog

from jobs.eventlog import NumberedLine
from jobs.lifecycle import Claim
from worker.settings import WorkerSettings
from worker.tensorboard import EventFile, event_path, rewrite
from worker.tracked import Point, read_tracked
from worker.tracker_process import TrackerProcess

Json = dict[str, Any]

_WANDB, _MLFLOW = "Weights & Biases", "MLflow"

log = structlog.get_logger(__name__)


class Trackers:
    """Those of one attempt. Whatever goes wrong comes back as sentences for the job's events, each once."""

    def __init__(self, job_folder: Path, claim: Claim, settings: WorkerSettings) -> None:
        self._job_folder = job_folder
        self._claim = claim
        self._settings = settings
        self._path = event_path(job_folder, attempt=claim.lease.attempt)
        self._file: EventFile | None = EventFile(self._path)
        self._processes: list[TrackerProcess] = []

    def begin(self) -> list[str]:
        """Start what the job asks for, and what the worker is set to."""
        return [warning for name, run in self._runs() for warning in self._start(name, run)]

    def take(self, lines: Sequence[NumberedLine]) -> list[str]:
        """Tell the figures of the journal's next lines. Called before they are shipped: what a killed worker has not
        told TensorBoard is then among what it has not shipped, and the next attempt makes good for both."""
        tracked = read_tracked(lines)
        points = [each for each in tracked if isinstance(each, Point)]
        for process in self._processes:
            process.tell(points)
        if not tracked or self._file is None:
            return []
        try:
            self._file.write(tracked)
        except OSError as error:
            self._file = None
            return [_unwritable(self._path, error)]
        return []

    def end(self, stopping: threading.Event) -> list[str]:
        """All is told: wait a while until it has arrived."""
        return [warning for process in self._processes for warning in process.end(stopping)]

    def kill(self) -> None:
        """End at once what has not ended."""
        for process in self._processes:
            process.kill()

    def _start(self, name: str, run: Json) -> list[str]:
        tool = run["tool"]
        if run.get("mode") == "off":
            return [f"{name} is switched off on this worker (LOMO_WANDB_MODE): it is not told of this run."]
        if importlib.util.find_spec(tool) is None:
            missing = f"{name} is not told of this run: its library is not installed on this worker"
            return [f"{missing}. Its administrator can install it: pip install 'lomo-server[{tool}]'."]
        try:
            self._processes.append(TrackerProcess(name, run, log_path=self._job_folder / f"{tool}.log"))
        except OSError as error:
            log.warning("tracker_not_started", tool=tool, error=str(error))
            return [f"{name} is not told of this run: its process could not be started ({error.strerror or error})."]
        return []

    def _runs(self) -> Iterator[tuple[str, Json]]:
        """Each tool's name and the first line of its process."""
        lease, spec = self._claim.lease, self._claim.spec
        # An attempt is a run of its own: it may repeat steps, which neither tool forgets.
        suffix = "" if lease.attempt == 1 else f"-{lease.attempt}"
        config = {"job_id": lease.job_id, "attempt": lease.attempt, **spec.model_dump(mode="json")}
        del config["integrations"]
        shared = {"id": f"{lease.job_id}{suffix}", "group": lease.job_id, "config": config}
        for number, integration in enumerate(spec.integrations):
            given = integration.wandb.model_dump(mode="json")
            run = {**shared, **given, "tool": "wandb", "mode": self._settings.wandb_mode}
            run["name"] = f"{given['name'] or lease.job_id}{suffix}"
            run["id"] += f"-to{number + 1}" if number else ""
            yield _WANDB, {**run, "folder": str(self._job_folder)}
        if self._settings.mlflow_tracking_uri:
            uri, experiment = self._settings.mlflow_tracking_uri, self._settings.mlflow_experiment
            run = {**shared, "tool": "mlflow", "tracking_uri": uri, "project": experiment}
            yield _MLFLOW, {**run, "name": f"{lease.job_id}{suffix}"}


def retell(job_folder: Path, *, attempt: int, journal: Path) -> list[str]:
    """Tell TensorBoard anew of an attempt whose worker was killed. Returns what went wrong."""
    path = event_path(job_folder, attempt=attempt)
    try:
        rewrite(path, journal=journal)
    except OSError as error:
        return [_unwritable(path, error)]
    return []


def _unwritable(path: Path, error: OSError) -> str:
    log.warning("tensorboard_unwritable", path=str(path), error=str(error))
    return (
        f"TensorBoard's file {path.parent.name}/{path.name} could not be written ({error.strerror or error}): "
        "the figures of this attempt are missing there. The job's metrics are complete."
    )
