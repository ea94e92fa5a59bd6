"""What of a job's attempts stays on disk.

Every attempt has a folder of its own, so that an engine that should be dead can harm nobody's work. What is published
(a checkpoint's row, a finished model) stays; other weights of earlier attempts are of no more use and go. Journals,
specifications and logs stay. Within its own attempt the engine itself keeps the last checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import structlog

_ATTEMPT_PREFIX = "attempt-"
# The training data as token ids, which the attempts of a job share: worth its place only while the job runs.
ENCODED_NAME = "tokens"
# Copies of files that an object store keeps; the same is true of them.
INPUTS_NAME = "inputs"
log = structlog.get_logger(__name__)


def attempt_folder(runs_dir: Path, *, job_id: str, attempt: int) -> Path:
    """Where an attempt's files lie."""
    return runs_dir / job_id / f"{_ATTEMPT_PREFIX}{attempt}"


def remove_data(job_folder: Path) -> None:
    """Delete the copies of the data, and what the engine has made of it, once no attempt will come."""
    for path in (job_folder / ENCODED_NAME, job_folder / INPUTS_NAME):
        if path.is_dir():
            _remove(path)


def prune_superseded(job_folder: Path, *, attempt: int, published: Collection[Path]) -> None:
    """Delete the weights of the attempts before `attempt` that are not among the `published` folders."""
    for folder in job_folder.glob(f"{_ATTEMPT_PREFIX}*"):
        number = folder.name.removeprefix(_ATTEMPT_PREFIX)
        if not number.isdecimal() or int(number) >= attempt:
            continue
        # A checkpoint or a model that was being written when its engine was killed is called ".tmp-...".
        weights = [*folder.glob("checkpoints/*"), folder / "model", *folder.glob(".tmp-*")]
        if not any(path.is_relative_to(folder / "checkpoints") for path in published):
            # Who goes on from a checkpoint takes the best model of its attempt over.
            weights.append(folder / "best")
        for path in weights:
            if path.is_dir() and path not in published:
                _remove(path)


def _remove(path: Path) -> None:
    """A folder that cannot be deleted costs disk; it must not cost the job."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        log.warning("cannot_delete", path=str(path), error=str(error))
