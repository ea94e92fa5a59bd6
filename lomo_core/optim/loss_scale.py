"""Dynamic loss scaling for fp16 (arXiv 1710.03740, section 3.2): the loss is multiplied so that small gradients do not
become zero, and the factor is halved whenever a gradient overflows.

The numbers are those of `torch.amp.GradScaler`. Its class is not used because it divides gradients that an optimizer
holds; here there is never more than one.
"""

from __future__ import annotations

from typing import Any

_INITIAL_SCALE = 65536.0
_FACTOR = 2.0
_GROWTH_INTERVAL = 2000
# At 1 the loss is not scaled any more: an overflow that is left is the model's, not the format's.
_SMALLEST_SCALE = 1.0
# fp32 holds it, and 2^24 times the smallest fp16 number is already 1.
_LARGEST_SCALE = 2.0**24


class LossScale:
    """The factor on the loss, halved at an overflow and doubled after 2000 steps without one."""

    def __init__(self) -> None:
        self.scale = _INITIAL_SCALE
        self._num_good_steps = 0

    def update(self, *, has_overflowed: bool) -> None:
        """Tell how a step ended."""
        if has_overflowed:
            self.scale = max(self.scale / _FACTOR, _SMALLEST_SCALE)
            self._num_good_steps = 0
            return
        self._num_good_steps += 1
        if self._num_good_steps == _GROWTH_INTERVAL:
            self.scale = min(self.scale * _FACTOR, _LARGEST_SCALE)
            self._num_good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON-able."""
        return {"scale": self.scale, "num_good_steps": self._num_good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.scale = float(state["scale"])
        self._num_good_steps = int(state["num_good_steps"])
