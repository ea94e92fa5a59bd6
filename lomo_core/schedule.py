"""Learning-rate schedules as pure functions of (step, total, warm-up): a resumed run needs no scheduler state.
Torch-free.

Steps count from 0: `step` updates have been made before the one whose rate is asked for. The rate rises linearly over
`warmup_steps` (the first update already moves: its rate is `1 / warmup_steps` of the peak), then falls to 0 over the
rest (linear: LOMO's own schedule, arXiv 2306.09782 table 4; cosine: half a period, arXiv 1608.03983 eq. 5 without
restarts) or stays (constant). The last update of a falling schedule has a rate above 0.
"""

from __future__ import annotations

import math

from lomo_core.config import ScheduleName


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Number of updates below the peak rate: the ratio of the total, rounded up as Hugging Face's trainer does."""
    return math.ceil(total_steps * warmup_ratio)


def scale_at(name: ScheduleName, *, step: int, total_steps: int, warmup: int) -> float:
    """The share (0 to 1) of the peak learning rate for the update after `step` others.

    Raises:
        ValueError: `step` is not in 0 <= step < total_steps.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside of 0 <= step < {total_steps}")
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    progress = (step - warmup) / (total_steps - warmup)
    return 1.0 - progress if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
