"""Where a run that has diverged goes back to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from lomo_core import checkpoint as checkpoints
from lomo_core.errors import CheckpointError
from lomo_core.journal import Journal


def earlier_checkpoints(
    paths: Iterable[Path], *, first: int, every: int, run_sha256: str, journal: Journal
) -> Iterator[tuple[Path, checkpoints.TrainerState]]:
    """The valid regular checkpoints of at most `first` steps, newest first; each rejected one is reported.

    Regular means at a multiple of `every`: those that an interruption wrote are not there in an uninterrupted run, and
    both are to go back to the same one.
    """
    regular = [path for path in set(paths) if every > 0 and checkpoints.step_of(path) % every == 0]
    for path in sorted(regular, key=checkpoints.step_of, reverse=True):
        if checkpoints.step_of(path) > first:
            continue
        try:
            yield path, checkpoints.verify_checkpoint(path, run_sha256=run_sha256)
        except CheckpointError as error:
            journal.say("warn", f"checkpoint {path.name} is not used: {error.message}")


def drop_abandoned(parent: Path, *, step: int) -> None:
    """Delete the checkpoints of more than `step` steps: the run goes another way from there."""
    for path in checkpoints.checkpoint_folders(parent):
        if checkpoints.step_of(path) > step:
            checkpoints.delete_folder(path)
