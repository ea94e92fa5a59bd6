"""The model of a run's best evaluation so far: `best/step-<n>/`, a plain model folder of its own.

It is apart from the checkpoints, so that pruning those never touches it. An older best stays as long as a checkpoint
names it: who resumes there goes on with that one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lomo_core import checkpoint as checkpoints

_FOLDER = "best"


class BestModels:
    """The best models of one run's folder."""

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = Path(run_dir)

    def path(self, step: int) -> Path:
        """Where the model of that step is, if it is kept."""
        return self._run_dir / _FOLDER / f"step-{step}"

    def save(self, *, model: Any, tokenizer: Any, step: int) -> None:
        """Write the model as it is now.

        Raises:
            DiskFullError: there is not enough space; nothing is left behind.
        """
        checkpoints.save_final_model(self.path(step), model=model, tokenizer=tokenizer, step=step)

    def take_over(self, checkpoint: Path, step: int) -> None:
        """Bring the best model over that belongs to a checkpoint, of this run's folder or of an earlier attempt's.

        Raises:
            CheckpointError: it is missing or damaged.
            DiskFullError: there is not enough space.
        """
        source = BestModels(checkpoint.parent.parent).path(step)
        if source.resolve() == self.path(step).resolve():
            checkpoints.verify_manifest(source)
        else:
            checkpoints.copy_model(source, self.path(step), step=step)

    def prune(self, *, best_step: int | None) -> None:
        """Delete all but the best one and those that the run's checkpoints name."""
        needed = checkpoints.best_steps(self._run_dir / checkpoints.CHECKPOINTS_NAME) | {best_step}
        for path in checkpoints.checkpoint_folders(self._run_dir / _FOLDER):
            if not any(step is not None and path == self.path(step) for step in needed):
                checkpoints.delete_folder(path)
