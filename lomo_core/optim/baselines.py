"""torch's own SGD and AdamW behind the interface of the fused optimizers: what LOMO is compared with.

Nothing is fused: every gradient is alive at the end of the backward pass, is checked and clipped there, and the update
comes after. Memory and results are therefore those that people know from these optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm
from torch.optim.optimizer import ParamsT

BaselineName = Literal["sgd", "adamw"]
BaselineClipMode = Literal["norm", "value", "group", "none"]
# Moments per parameter: AdamW's exp_avg and exp_avg_sq (torch.optim.AdamW), in the parameter's dtype.
_NUM_MOMENTS: dict[BaselineName, int] = {"sgd": 0, "adamw": 2}


class Baseline:
    """One of torch's optimizers, clipped by torch's own functions.

    Args:
        name: `sgd` (no momentum; its weight decay equals a decoupled one) or `adamw`.
        params: parameters or parameter groups, fp32 or bf16; moments have the same dtype.
        lr: learning rate.
        weight_decay: per step, times the learning rate.
        max_grad_norm: the threshold of clipping, or None for none.
        clip_mode: `norm` (all gradients together), `group` (each tensor), `value` (element-wise), `none`.

    Both run without `foreach`, whose temporaries are as large as all gradients.
    """

    def __init__(
        self,
        name: BaselineName,
        params: ParamsT,
        lr: float,
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        clip_mode: BaselineClipMode = "norm",
    ) -> None:
        if name == "sgd":
            self._optimizer: torch.optim.Optimizer = torch.optim.SGD(
                params, lr=lr, weight_decay=weight_decay, foreach=False
            )
        else:
            self._optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, foreach=False)
        self._name: BaselineName = name
        self._clip_mode: BaselineClipMode = "none" if max_grad_norm is None else clip_mode
        self._threshold = max_grad_norm or 0.0
        self._steps = 0
        self._norm_of_step: float | None = None
        self._is_applied = False
        self._noted_bytes = 0
        self.peak_gradient_bytes = 0
        self.loss_scale: float | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """torch's; change `lr` here between steps."""
        return self._optimizer.param_groups

    @property
    def state(self) -> Mapping[Any, Any]:
        """Moments by parameter."""
        return self._optimizer.state

    @property
    def num_steps(self) -> int:
        """Steps finished so far."""
        return self._steps

    @property
    def last_grad_norm(self) -> float | None:
        """Global L2 norm of the last step's gradient before clipping: known in every mode, the gradients are there."""
        return self._norm_of_step

    def backward(self, loss: Tensor) -> bool:
        """Fill the gradients and clip them; the weights change in `step`.

        Returns False where the norm is inf or nan: the gradients are dropped and `step` will change nothing.
        """
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        self.note_gradient(sum(param.grad.numel() * param.grad.element_size() for param in params))
        self._norm_of_step = float(self._clip(params))
        self._is_applied = math.isfinite(self._norm_of_step)
        if not self._is_applied:
            self._drop_gradients()
        return self._is_applied

    def step(self) -> None:
        """Update the weights where `backward` came out finite, drop the gradients, count the step."""
        if self._is_applied:
            self._optimizer.step()
        self._drop_gradients()
        self._is_applied = False
        self._steps += 1

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Backward passes inside only show whether memory suffices: their gradients, with moments beside them, are
        dropped at the end."""
        try:
            yield
            params = [param for group in self.param_groups for param in group["params"]]
            if not self.state:
                # Written to, not only reserved: a page that nobody has touched costs nothing.
                _ = [torch.ones_like(param) for _ in range(_NUM_MOMENTS[self._name]) for param in params]
        finally:
            self._drop_gradients()

    def takes_rows(self, param: Tensor) -> bool:
        """Never: the update needs whole gradients."""
        return False

    def take_rows(self, param: Tensor, first_row: int, grad: Tensor) -> None:
        """Refused.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self._name} takes whole gradients only: see takes_rows")

    def take_scattered_rows(self, param: Tensor, rows: Tensor, grad: Tensor) -> None:
        """Refused.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self._name} takes whole gradients only: see takes_rows")

    def note_gradient(self, num_bytes: int) -> None:
        """Count gradient memory (negative when it is freed), for `peak_gradient_bytes`."""
        self._noted_bytes += num_bytes
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, self._noted_bytes)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and the step."""
        return {**self._optimizer.state_dict(), "step": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments, rates and step.

        Raises:
            ValueError: the groups do not match this optimizer's.
        """
        self._optimizer.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._steps = int(state_dict["step"])

    def _clip(self, params: list[Tensor]) -> Tensor:
        """Clip in place; returns the global norm from before, 0-dim."""
        if self._clip_mode == "norm":
            return clip_grad_norm_(params, self._threshold, foreach=False)
        norm = get_total_norm([param.grad for param in params if param.grad is not None], foreach=False)
        if self._clip_mode == "group":
            for param in params:
                clip_grad_norm_([param], self._threshold, foreach=False)
        if self._clip_mode == "value":
            clip_grad_value_(params, self._threshold, foreach=False)
        return norm

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._noted_bytes = 0
