"""What of a job's attempts stays on disk.

Every attempt has a folder of its own, so that an engine that should be dead can harm nobody's work. Once a later
attempt has published as many checkpoints as are to be kept, or the job has its model, the earlier ones' weights are of
no more use and go; their journals, specifications and logs stay. Within its own attempt the engine itself keeps the
last checkpoints.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import structlog

_ATTEMPT_PREFIX = "attempt-"
# Folders of weights: the only large things in an attempt's folder. Each is written as ".tmp-..." first.
_WEIGHTS = ("checkpoints", "model")

log = structlog.get_logger(__name__)


def attempt_folder(runs_dir: Path, *, job_id: str, attempt: int) -> Path:
    """Where an attempt's files lie."""
    return runs_dir / job_id / f"{_ATTEMPT_PREFIX}{attempt}"


def prune_superseded(job_folder: Path, *, attempt: int, keep: Path | None = None) -> None:
    """Delete the weights of the attempts before `attempt`, but not the folder `keep` (a published model)."""
    for folder in job_folder.glob(f"{_ATTEMPT_PREFIX}*"):
        number = folder.name.removeprefix(_ATTEMPT_PREFIX)
        if not number.isdecimal() or int(number) >= attempt:
            continue
        for path in folder.iterdir():
            if path.is_dir() and (path.name in _WEIGHTS or path.name.startswith(".tmp-")) and path != keep:
                _remove(path)


def _remove(path: Path) -> None:
    """A folder that cannot be deleted costs disk; it must not cost the job."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        log.warning("cannot_delete", path=str(path), error=str(error))
