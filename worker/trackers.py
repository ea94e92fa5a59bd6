"""The tools that draw a run, told of one attempt's figures. None of them can fail or hold up the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import structlog

from jobs.eventlog import NumberedLine
from worker.tensorboard import EventFile, event_path, rewrite
from worker.tracked import read_tracked

log = structlog.get_logger(__name__)


class Trackers:
    """Those of one attempt. Whatever goes wrong comes back as sentences for the job's events, each once."""

    def __init__(self, job_folder: Path, *, attempt: int) -> None:
        self._path = event_path(job_folder, attempt=attempt)
        self._file: EventFile | None = EventFile(self._path)

    def take(self, lines: Sequence[NumberedLine]) -> list[str]:
        """Tell the figures of the journal's next lines. Called before they are shipped: what a killed worker has not
        told is then among what it has not shipped, and the next attempt makes good for both."""
        tracked = read_tracked(lines)
        if not tracked or self._file is None:
            return []
        try:
            self._file.write(tracked)
        except OSError as error:
            self._file = None
            return [_unwritable(self._path, error)]
        return []


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
