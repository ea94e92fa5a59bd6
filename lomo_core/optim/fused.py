"""The update inside the backward pass: one hook per parameter, called when that parameter's gradient is complete.

The hook (`register_post_accumulate_grad_hook`) sees one gradient, uses it and drops it, so that the next layer's
gradient is only made once this one is gone. It costs nothing per parameter but itself: no loop over the model.
Weights change under `no_grad` and never through `.data`, so autograd's version counter still catches a stale read. A
tied weight has one gradient accumulator, so it is updated once, with the whole gradient.

Exact clipping by the global norm needs the norm before the first update: `backward(loss)` walks the graph twice, first
summing norms and dropping each gradient, then updating (arXiv 2306.09782, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lomo_core.optim.clip import ClipMode, Clipping, GlobalNorm, clip_coefficient, tensor_norm
from lomo_core.optim.protocol import RunOptimizer
from lomo_core.optim.rounding import BLOCK, Rounding, Workspace, Writer, check_rounding

_CLIP_MODES = ("norm", "value", "group", "none")


@dataclass(frozen=True, slots=True)
class Update:
    """What an update rule gets beside weight and gradient."""

    lr: float
    weight_decay: float
    step: int
    """1-based number of this update."""
    state: dict[str, Tensor]
    """This parameter's own moments; the rule fills it at the first update."""
    writer: Writer


def blocks_of(weight: Tensor, grad: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk over weight and gradient together: (flat index, weight [n], gradient [n]).

    Blocks bound the fp32 transient; where neither side needs one (both fp32) the whole tensor is one block.
    """
    if not weight.is_contiguous():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is not contiguous: call .contiguous() on it first")
    flat_weight, flat_grad = weight.view(-1), grad.reshape(-1)
    size = flat_weight.numel() if weight.dtype == grad.dtype == torch.float32 else BLOCK
    for start in range(0, flat_weight.numel(), max(size, 1)):
        yield start, flat_weight[start : start + size], flat_grad[start : start + size]


def load_gradient(grad: Tensor, writer: Writer, *, limit: float | None) -> Tensor:
    """The gradient as fp32 [n], clamped to +-`limit`; itself where nothing needs doing, else a copy."""
    if limit is not None:
        return writer.workspace.buffer("gradient", grad.numel()).copy_(grad).clamp_(-limit, limit)
    return grad if grad.dtype == torch.float32 else writer.workspace.buffer("gradient", grad.numel()).copy_(grad)


class FusedOptimizer(torch.optim.Optimizer):
    """Base of `Lomo` and `AdaLomo`: registers the hooks, clips, counts, saves.

    Args:
        params: parameters or parameter groups as for any torch optimizer; `lr` and `weight_decay` may differ by group.
        lr: learning rate; change it between steps through `param_groups`, as schedulers do.
        weight_decay: decoupled; the weights shrink by `lr * weight_decay` per step.
        max_grad_norm: the threshold of clipping, or None for none.
        clip_mode: `norm` (global L2 norm, exact; needs `opt.backward(loss)`), `group` (the norm of each tensor),
            `value` (element-wise), `none`.
        rounding: how fp32 results go back to bf16 weights, `nearest` or `stochastic`; fp32 weights need none.
        seed: of the stochastic rounding.

    The loop is SGD's, `loss.backward(); opt.step(); opt.zero_grad()`, or with the global norm
    `opt.backward(loss); opt.step()`. One backward per step: gradients cannot be accumulated, they are gone.

    Raises:
        ValueError: an argument is out of range, or weights are neither fp32 nor bf16.
    """

    def __init__(  # noqa: PLR0913 - the argument table of an optimizer; everything after lr by keyword
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        clip_mode: ClipMode = "norm",
        rounding: Rounding = "nearest",
        seed: int = 0,
    ) -> None:
        if clip_mode not in _CLIP_MODES:
            raise ValueError(f"clip_mode must be one of {', '.join(_CLIP_MODES)}, not {clip_mode!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, or None for no clipping, not {max_grad_norm}")
        if not lr >= 0 or not weight_decay >= 0:
            raise ValueError(f"lr and weight_decay must be 0 or more, not {lr} and {weight_decay}")
        self._clip_mode: ClipMode = "none" if max_grad_norm is None else clip_mode
        self._threshold = max_grad_norm or 0.0
        self._rounding: Rounding = rounding
        self._seed = seed
        self._steps = 0
        self._workspaces: dict[torch.device, Workspace] = {}
        self._norm = GlobalNorm()
        self._norm_of_step: Tensor | None = None
        self._gathering = False
        self._is_probing = False
        self.loss_scale: float | None = None
        self._coefficient: Tensor | None = None
        self._alive_bytes = 0
        self.peak_gradient_bytes = 0
        self._handles: list[Any] = []
        self._updated_in: list[int] = []
        # Last: it calls `add_param_group`, which registers the hooks.
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, and registers the hooks of the group's parameters (frozen ones get none)."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            check_rounding(self._rounding, param.dtype)
            if param.requires_grad:
                hook = partial(self._hook, group, len(self._updated_in))
                self._handles.append(param.register_post_accumulate_grad_hook(hook))
            self._updated_in.append(-1)

    # -- the loop -------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> bool:
        """Run the backward pass (two of them when the global norm is clipped) and update every parameter in it.

        Returns False, with no parameter changed, where the global norm came out as inf or nan.
        """
        if self._clip_mode != "norm":
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
            return True
        self._norm = GlobalNorm()
        self._gathering = True
        try:
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        finally:
            self._gathering = False
        norm = self._norm_of_step = self._norm.result()
        # The one wait for the device of a step: without it a bad gradient would reach every weight.
        if not bool(torch.isfinite(norm)):
            return False
        self._coefficient = clip_coefficient(norm, self._threshold)
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            self._coefficient = None
        return True

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """End the step: the updates have happened inside the backward pass; this counts it.

        Raises:
            ValueError: a closure is given (it would run a second backward).
        """
        if closure is not None:
            raise ValueError("a fused optimizer takes no closure: the update happens inside the backward pass")
        if self._clip_mode == "group":
            self._norm_of_step = self._norm.result()
            self._norm = GlobalNorm()
        self._alive_bytes = 0
        self._steps += 1

    @property
    def num_steps(self) -> int:
        """Steps finished so far."""
        return self._steps

    @property
    def last_grad_norm(self) -> float | None:
        """Global L2 norm of the last step's gradient before clipping; None where the clip mode does not compute it."""
        return None if self._norm_of_step is None else float(self._norm_of_step)

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Backward passes inside only show whether memory suffices: the hooks drop every gradient."""
        self._is_probing = True
        try:
            yield
        finally:
            self._is_probing = False
            self._alive_bytes = 0

    def note_gradient(self, num_bytes: int) -> None:
        """Count gradient memory that no hook sees (negative when it is freed), for `peak_gradient_bytes`."""
        self._alive_bytes += num_bytes
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, self._alive_bytes)

    def remove_hooks(self) -> None:
        """Give the parameters back: later backward passes fill `.grad` as usual."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # -- inside the backward pass ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _hook(self, group: dict[str, Any], index: int, param: Tensor) -> None:
        """Use the complete gradient of one parameter, then drop it."""
        grad = param.grad
        assert grad is not None
        param.grad = None
        num_bytes = grad.numel() * grad.element_size()
        self.note_gradient(num_bytes)
        if self._is_probing:
            pass
        elif self._gathering:
            self._norm.add(tensor_norm(grad))
        else:
            self._refuse_second_update(index)
            self._update(param, grad, group=group, index=index)
        self.note_gradient(-num_bytes)

    def _refuse_second_update(self, index: int) -> None:
        if self._clip_mode == "norm" and self._coefficient is None:
            raise RuntimeError(
                "clipping by the global norm needs the norm before the first update: call opt.backward(loss) instead "
                "of loss.backward(), or choose clip_mode='group', 'value' or 'none'"
            )
        if self._updated_in[index] == self._steps:
            raise RuntimeError(
                "a parameter was about to be updated twice in one step. Gradients cannot be accumulated over several "
                "backward passes (call opt.step() after each), and reentrant activation checkpointing of a shared "
                "weight is not supported (use use_reentrant=False)"
            )
        self._updated_in[index] = self._steps

    def _update(self, param: Tensor, grad: Tensor, *, group: dict[str, Any], index: int) -> None:
        writer = Writer(self._workspace(param.device), step=self._steps + 1, parameter=index)
        update = Update(
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            step=self._steps + 1,
            state=self.state[param],
            writer=writer,
        )
        self._apply(param, grad, update, clipping=self._clipping(grad))

    def _apply(self, param: Tensor, grad: Tensor, update: Update, *, clipping: Clipping) -> None:
        """The update rule: one pure function of weight, gradient and `update`."""
        raise NotImplementedError

    def _clipping(self, grad: Tensor) -> Clipping:
        match self._clip_mode:
            case "norm":
                assert self._coefficient is not None
                return Clipping(coefficient=self._coefficient.to(grad.device))
            case "group":
                norm = tensor_norm(grad)
                self._norm.add(norm)
                return Clipping(coefficient=clip_coefficient(norm, self._threshold))
            case "value":
                return Clipping(limit=self._threshold)
            case _:
                return Clipping()

    def _workspace(self, device: torch.device) -> Workspace:
        found = self._workspaces.get(device)
        if found is None:
            found = self._workspaces[device] = Workspace(device, rounding=self._rounding, seed=self._seed)
        return found

    # -- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and the step and seed."""
        return {**super().state_dict(), "step": self._steps, "seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments (fp32 stays fp32: torch's own would cast them to the weights' dtype), rates, step and seed.

        Raises:
            ValueError: the groups do not match this optimizer's.
        """
        saved_groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in saved_groups] != sizes:
            raise ValueError("the saved optimizer has other parameter groups than this one")
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        params = [param for group in self.param_groups for param in group["params"]]
        self.state.clear()
        for index, moments in cast(dict[int, dict[str, Tensor]], state_dict["state"]).items():
            param = params[index]
            self.state[param] = {name: moment.to(param.device, copy=True) for name, moment in moments.items()}
        self._steps = int(state_dict["step"])
        if self._seed != state_dict["seed"]:
            self._seed = int(state_dict["seed"])
            self._workspaces.clear()
        self._updated_in = [-1] * len(params)


def state_bytes(optimizer: RunOptimizer) -> int:
    """Bytes of all moments that an optimizer holds."""
    moments: Iterable[Tensor] = (
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
    return sum(moment.numel() * moment.element_size() for moment in moments)
