"""How the evaluations of a run have gone: which one was the best, and for how long none was better. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lomo_core.events import Evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Saved with each checkpoint, so that a resumed run stops and chooses as an uninterrupted one does."""

    best_step: int | None = None
    best_score: float | None = None
    """Higher is better: choice accuracy, or the validation loss with its sign turned."""
    best_weights_sha256: str | None = None
    """Of the kept model of the best evaluation; None where none is kept."""
    num_since_best: int = 0
    """Evaluations in a row that were not better."""

    def after(self, evaluation: Evaluation) -> Progress:
        """Take in an evaluation. The base model's, before the first step, does not compete."""
        score = _score(evaluation)
        if evaluation.step == 0:
            return self
        if math.isfinite(score) and (self.best_score is None or score > self.best_score):
            return Progress(best_step=evaluation.step, best_score=score)
        return replace(self, num_since_best=self.num_since_best + 1)

    def has_stalled(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row were not better."""
        return patience is not None and self.num_since_best >= patience


def _score(evaluation: Evaluation) -> float:
    if evaluation.choice_accuracy is not None:
        return evaluation.choice_accuracy
    return math.nan if evaluation.valid_loss is None else -evaluation.valid_loss
