"""What the engine needs of a run's optimizer, fused or not: one interface, so that trainer, meter and checkpoints do
not know which rule runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor


class RunOptimizer(Protocol):
    """An optimizer whose step is `backward(loss)`, then `step()`."""

    peak_gradient_bytes: int
    """High-water mark of complete gradients alive at once; the meter sets it back to 0."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As torch's; the trainer sets `lr` before each step."""
        ...

    @property
    def state(self) -> Mapping[Any, Any]:
        """Moments by parameter."""
        ...

    @property
    def num_steps(self) -> int:
        """Steps finished so far."""
        ...

    @property
    def last_grad_norm(self) -> float | None:
        """Global L2 norm of the last step's gradient before clipping; None where it is not computed."""
        ...

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by in fp16; None where it is not scaled."""
        ...

    def backward(self, loss: Tensor) -> bool:
        """Run the backward pass. Returns False, with no weight changed, where the gradient is not finite."""
        ...

    def step(self) -> None:
        """End the step."""
        ...

    def probing(self) -> AbstractContextManager[None]:
        """Inside of the block a backward pass only shows whether its memory suffices: nothing else changes."""
        ...

    def takes_rows(self, param: Tensor) -> bool:
        """Whether the parameter's gradient may come in rows (`vocabulary_head.py`)."""
        ...

    def take_rows(self, param: Tensor, first_row: int, grad: Tensor) -> None:
        """The finished gradient [n, H] of consecutive rows."""
        ...

    def take_scattered_rows(self, param: Tensor, rows: Tensor, grad: Tensor) -> None:
        """The finished gradient [n, H] of the rows `rows`."""
        ...

    def note_gradient(self, num_bytes: int) -> None:
        """Count gradient memory that no hook sees (negative when it is freed)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """`{"state": {index: {name: tensor}}, "param_groups": [...], **small}`, `small` as JSON holds it."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        ...
