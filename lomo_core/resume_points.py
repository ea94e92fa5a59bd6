"""Which checkpoint a run goes on from: after an interruption, or after it has diverged. Each one that cannot be used is
reported, and none of them ends the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from lomo_core import checkpoint as checkpoints
from lomo_core.errors import CheckpointError
from lomo_core.journal import Journal
from lomo_core.stop import StopRequest

ResumePoint = tuple[Path, checkpoints.TrainerState]


def newest_valid(paths: Iterable[Path], *, run_sha256: str, stop: StopRequest, journal: Journal) -> ResumePoint | None:
    """The first valid checkpoint of those given, newest first; None where the run begins at step 0.

    Raises:
        InterruptedRunError: a stop was asked for.
    """
    path = None
    for path in paths:
        stop.raise_if_requested()
        if found := _verified(path, run_sha256=run_sha256, journal=journal):
            return found
    if path is not None:
        journal.say("warn", "no checkpoint is valid: the run begins anew at step 0")
    return None


def earlier_checkpoints(
    paths: Iterable[Path], *, first: int, run_sha256: str, journal: Journal
) -> Iterator[ResumePoint]:
    """The valid checkpoints of at most `first` steps, newest first; each rejected one is reported."""
    for path in sorted(set(paths), key=checkpoints.step_of, reverse=True):
        if checkpoints.step_of(path) <= first and (found := _verified(path, run_sha256=run_sha256, journal=journal)):
            yield found


def drop_abandoned(parent: Path, *, step: int) -> None:
    """Delete the checkpoints of more than `step` steps: the run goes another way from there."""
    for path in checkpoints.checkpoint_folders(parent):
        if checkpoints.step_of(path) > step:
            checkpoints.delete_folder(path)


def _verified(path: Path, *, run_sha256: str, journal: Journal) -> ResumePoint | None:
    try:
        return path, checkpoints.verify_checkpoint(path, run_sha256=run_sha256)
    except CheckpointError as error:
        journal.say("warn", f"checkpoint {path.name} is not used: {error.message}")
        return None
