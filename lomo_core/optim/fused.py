"""The update inside the backward pass: one hook per parameter, called when that parameter's gradient is complete.

The hook (`register_post_accumulate_grad_hook`) sees one gradient, uses it and drops it, so that the next layer's
gradient is only made once this one is gone. It costs nothing per parameter but itself: no loop over the model.
Weights change without gradient tracking and never through `.data`, so autograd's version counter still catches a stale
read. A tied weight has one gradient accumulator, so it is updated once, with the whole gradient.

Exact clipping by the global norm needs the norm before the first update. `backward(loss)` has two ways to it that give
the same bits: a second backward pass over the retained graph (arXiv 2306.09782, section 3.2; with activation
checkpointing the random state is replayed, so dropout agrees), or one pass that spills the gradients (`spill.py`) and
applies them afterwards. fp16 takes the same way in every clip mode: an overflow is found before any weight changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lomo_core.optim.clip import NO_CLIPPING, ClipMode, Clipping, GlobalNorm, clip_coefficient, tensor_norm
from lomo_core.optim.data_parallel import refuse_data_parallel
from lomo_core.optim.loss_scale import LossScale
from lomo_core.optim.protocol import RunOptimizer
from lomo_core.optim.rounding import BLOCK, Rounding, Workspace, Writer, check_rounding
from lomo_core.optim.spill import PIECE, GradientStore, SpillTo, make_store, pieces

_CLIP_MODES = ("norm", "delayed", "value", "group", "none")


@dataclass(slots=True)
class Update:
    """What an update rule gets beside weight and gradient. One object per parameter, brought up to date at each
    step: small tensors are updated in microseconds, of which making it anew would be a good part."""

    lr: float
    weight_decay: float
    step: int
    """1-based number of this update."""
    state: dict[str, Tensor]
    """This parameter's own moments; the rule fills it at the first update."""
    writer: Writer


@dataclass(slots=True, eq=False)
class _Slot:
    """A parameter with its group and what is known of it."""

    param: Tensor
    group: dict[str, Any]
    index: int
    visited_in: int = -1
    """Number of the backward pass that its gradient last came in."""
    update: Update | None = None


class _Phase(Enum):
    """What becomes of a gradient."""

    UPDATE = auto()
    MEASURE = auto()
    """Its norm counts and it is dropped, or spilled."""
    DROP = auto()


def load_gradient(grad: Tensor, writer: Writer, clipping: Clipping) -> Tensor:
    """The clipped gradient as fp32 [n]: itself where nothing needs doing, else in scratch."""
    if grad.dtype == torch.float32:
        if clipping.is_identity:
            return grad
        scratch = writer.workspace.buffer("gradient", grad.numel())
        if clipping.limit is None:
            assert clipping.coefficient is not None
            return torch.mul(grad, clipping.coefficient, out=scratch)
        scratch.copy_(grad)
    else:
        scratch = writer.workspace.buffer("gradient", grad.numel()).copy_(grad)
    if clipping.limit is not None:
        scratch.clamp_(-clipping.limit, clipping.limit)
    return scratch if clipping.coefficient is None else scratch.mul_(clipping.coefficient)


def blocks_of(weight: Tensor, grad: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk over weight and gradient together: (flat index, weight [n], gradient [n]), a block of scratch at a time."""
    if not weight.is_contiguous():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is not contiguous: call .contiguous() on it first")
    flat_weight, flat_grad = weight.view(-1), grad.reshape(-1)
    for start in range(0, flat_weight.numel(), BLOCK):
        yield start, flat_weight[start : start + BLOCK], flat_grad[start : start + BLOCK]


class FusedOptimizer(torch.optim.Optimizer):
    """Base of `Lomo` and `AdaLomo`: registers the hooks, clips, scales the loss, counts, saves.

    Args:
        params: parameters or parameter groups as for any torch optimizer; `lr` and `weight_decay` may differ by group.
        lr: learning rate; change it between steps through `param_groups`, as schedulers do.
        weight_decay: decoupled; the weights shrink by `lr * weight_decay` per step.
        max_grad_norm: the threshold of clipping, or None for none.
        clip_mode: `norm` (global L2 norm, exact; needs `opt.backward(loss)`), `delayed` (the global norm of the step
            before; the first step is exact; needs `opt.backward(loss)`), `group` (the norm of each tensor), `value`
            (element-wise), `none`.
        rounding: how fp32 results go back to 16-bit weights, `nearest` or `stochastic`; fp32 weights need none.
        seed: of the stochastic rounding.
        spill_to: where gradients wait for the global norm, `"memory"` (of the host) or a folder; None runs a second
            backward pass instead. The result is the same.

    The loop is SGD's, `loss.backward(); opt.step(); opt.zero_grad()`, or with the global norm
    `opt.backward(loss); opt.step()`. One backward per step: gradients cannot be accumulated, they are gone. fp16
    weights get dynamic loss scaling, hence need `opt.backward(loss)` in every mode.

    Raises:
        ValueError: an argument is out of range, or weights are neither fp32, bf16 nor fp16.
    """

    is_element_wise: ClassVar[bool] = False
    """Whether the rule treats each element for itself, so that any part of a tensor can be updated alone."""

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
        spill_to: SpillTo | None = None,
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
        self._store: GradientStore | None = None if spill_to is None else make_store(spill_to)
        self._loss_scale: LossScale | None = None
        self._steps = 0
        self._workspaces: dict[torch.device, Workspace] = {}
        self._phase = _Phase.UPDATE
        self._pass = 0
        self._has_gradients = self._is_measured = self._is_skipped = False
        self._norm = GlobalNorm()
        self._norm_of_step: Tensor | None = None
        self._previous_norm: Tensor | None = None
        self._coefficient: Tensor | None = None
        self._alive_bytes = 0
        self.peak_gradient_bytes = 0
        self._handles: list[Any] = []
        self._slots: list[_Slot] = []
        self._slot_of: dict[Tensor, _Slot] = {}
        # Last: it calls `add_param_group`, which registers the hooks.
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, and registers the hooks of the group's parameters (frozen ones get none)."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            check_rounding(self._rounding, param.dtype)
            slot = _Slot(param, group, len(self._slots))
            self._slots.append(slot)
            self._slot_of[param] = slot
            if param.requires_grad:
                self._handles.append(param.register_post_accumulate_grad_hook(partial(self._hook, slot)))
                if param.dtype == torch.float16 and self._loss_scale is None:
                    self._loss_scale = LossScale()

    # -- the loop -------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> bool:
        """Run the backward pass and update every parameter in it.

        Returns False, with no parameter changed, where the norm was needed first and came out as inf or nan.

        Raises:
            RuntimeError: `step()` was not called since the last backward pass.
        """
        if self._has_gradients:
            raise RuntimeError(_TWICE)
        is_first_delayed = self._clip_mode == "delayed" and self._previous_norm is None
        if self._clip_mode == "norm" or is_first_delayed or self._loss_scale is not None:
            return self._measure_then_update(loss)
        if self._previous_norm is not None:
            self._coefficient = clip_coefficient(self._previous_norm, self._threshold)
        try:
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
        finally:
            self._coefficient = None
        return True

    def _measure_then_update(self, loss: Tensor) -> bool:
        scale = self.loss_scale or 1.0
        loss = loss * scale
        # A backward pass that was broken off may have left its part.
        self._norm = GlobalNorm()
        if self._store is not None:
            self._store.clear()
        with self._in_phase(_Phase.MEASURE):
            loss.backward(retain_graph=self._store is None)  # type: ignore[no-untyped-call]
        norm = self._norm_of_step = self._norm.result() / scale
        self._is_measured = True
        # The one wait for the device of a step: without it a bad gradient would reach every weight.
        self._is_skipped = not bool(torch.isfinite(norm))
        if not self._is_skipped:
            self._coefficient = self._global_coefficient(norm) / scale
            try:
                self._update_all(loss)
            finally:
                self._coefficient = None
        if self._store is not None:
            self._store.clear()
        return not self._is_skipped

    def _global_coefficient(self, norm: Tensor) -> Tensor:
        if self._clip_mode == "delayed" and self._previous_norm is not None:
            return clip_coefficient(self._previous_norm, self._threshold)
        if self._clip_mode in ("norm", "delayed"):
            return clip_coefficient(norm, self._threshold)
        return torch.ones_like(norm)

    @torch.no_grad()
    def _update_all(self, loss: Tensor) -> None:
        if self._store is None:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        for index in self._store.parameters():
            slot = self._slots[index]
            param = slot.param
            size = PIECE if self._is_piecewise else param.numel()
            for start, num_elements in pieces(param.numel(), size):
                grad = self._store.get(index, start, num_elements, device=param.device)
                self._take(slot, grad if self._is_piecewise else grad.view(param.shape), start)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """End the step: the updates have happened inside the backward pass; this counts it.

        Raises:
            ValueError: a closure is given (it would run a second backward).
        """
        if closure is not None:
            raise ValueError("a fused optimizer takes no closure: the update happens inside the backward pass")
        if not self._is_measured:
            self._norm_of_step = self._norm.result() if self._norm.has_any else None
        elif self._loss_scale is not None:
            self._loss_scale.update(has_overflowed=self._is_skipped)
        if self._clip_mode == "delayed" and self._norm_of_step is not None and not self._is_skipped:
            self._previous_norm = self._norm_of_step
        self._norm = GlobalNorm()
        self._has_gradients = self._is_measured = self._is_skipped = False
        self._alive_bytes = 0
        self._pass += 1
        self._steps += 1

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Inside, a backward pass drops every gradient: nothing changes, only the memory of a step is needed."""
        try:
            with self._in_phase(_Phase.DROP):
                yield
        finally:
            self._has_gradients = False

    @property
    def num_steps(self) -> int:
        """Steps finished so far."""
        return self._steps

    @property
    def last_grad_norm(self) -> float | None:
        """Global L2 norm of the last step's gradient before clipping; None where the clip mode does not compute it."""
        return None if self._norm_of_step is None else float(self._norm_of_step)

    @property
    def loss_scale(self) -> float | None:
        """The factor on the loss at the next step; None unless there are fp16 weights."""
        return None if self._loss_scale is None else self._loss_scale.scale

    def note_gradient(self, num_bytes: int) -> None:
        """Count gradient memory that no hook sees (negative when it is freed), for `peak_gradient_bytes`."""
        self._alive_bytes += num_bytes
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, self._alive_bytes)

    def remove_hooks(self) -> None:
        """Give the parameters back: later backward passes fill `.grad` as usual."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # -- gradients that are finished a part at a time --------------------------------------------------------------

    def takes_rows(self, param: Tensor) -> bool:
        """Whether a parameter's gradient may be handed over in rows, outside of its hook: the rule and the clipping
        need no more than the rows themselves."""
        return self._is_piecewise and param in self._slot_of and param.requires_grad

    def take_rows(self, param: Tensor, first_row: int, grad: Tensor) -> None:
        """Use the finished gradient [n, H] (the parameter's dtype) of the rows from `first_row` on of a parameter
        [V, H]. A pass begins with row 0."""
        slot = self._slot_of[param]
        if first_row == 0:
            self._visit(slot)
        with torch.no_grad():
            self._take(slot, grad, first_row * param.shape[1])

    def take_scattered_rows(self, param: Tensor, rows: Tensor, grad: Tensor) -> None:
        """Use the finished gradient [n, H] (the parameter's dtype) of the rows `rows` (int64 [n], each once). What
        `take_rows` was given for them in this pass must have been zero, and undone."""
        if rows.numel() == 0:
            return
        slot = self._slot_of[param]
        with torch.no_grad():
            if self._phase is _Phase.UPDATE:
                self._apply_rows(param, rows, grad, self._update_of(slot), clipping=self._clipping(grad))
            elif self._phase is _Phase.MEASURE:
                self._norm.add(tensor_norm(grad))
                if self._store is not None:
                    self._store.put_rows(slot.index, rows, grad, numel=param.numel())

    @property
    def _is_piecewise(self) -> bool:
        return self.is_element_wise and self._clip_mode != "group"

    # -- inside the backward pass ---------------------------------------------------------------------------------

    def _hook(self, slot: _Slot, param: Tensor) -> None:
        """Use the complete gradient of one parameter, then drop it. Autograd runs it without gradient tracking."""
        grad = param.grad
        assert grad is not None
        param.grad = None
        self._visit(slot)
        self._take(slot, grad, 0)

    def _visit(self, slot: _Slot) -> None:
        """Note that a parameter's gradient has come; refuse what would make it come in parts.

        Raises:
            RuntimeError: the loop cannot work with updates inside the backward pass; says what to change.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True cannot work here: the weights change during the backward pass")
        if slot.visited_in == self._pass:
            raise RuntimeError(_TWICE)
        slot.visited_in = self._pass
        if self._has_gradients:
            return
        refuse_data_parallel(slot.param)
        if self._phase is _Phase.UPDATE and self._coefficient is None and self._needs_own_backward:
            raise RuntimeError(
                "clipping by the global norm, and fp16, need all gradients before the first update: call "
                "opt.backward(loss) instead of loss.backward(), or choose clip_mode='group', 'value' or 'none'"
            )
        self._has_gradients = True

    def _take(self, slot: _Slot, grad: Tensor, start: int) -> None:
        """Use a gradient, or the part of it from flat index `start` on."""
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, self._alive_bytes + grad.nbytes)
        if self._phase is _Phase.UPDATE:
            self._apply(slot.param, grad, self._update_of(slot), clipping=self._clipping(grad), start=start)
        elif self._phase is _Phase.MEASURE:
            self._norm.add(tensor_norm(grad))
            if self._store is not None:
                self._store.put(slot.index, start, grad, numel=slot.param.numel())

    def _update_of(self, slot: _Slot) -> Update:
        step = self._steps + 1
        update = slot.update
        if update is None:
            writer = Writer(self._workspace(slot.param.device), step=step, parameter=slot.index)
            update = slot.update = Update(0.0, 0.0, step, self.state[slot.param], writer)
        update.lr, update.weight_decay = slot.group["lr"], slot.group["weight_decay"]
        update.step = update.writer.step = step
        return update

    def _apply(self, param: Tensor, grad: Tensor, update: Update, *, clipping: Clipping, start: int) -> None:
        """The update rule: one pure function of weight, gradient and `update`. An element-wise rule may get a part of
        the gradient: flat [n], from flat index `start` on."""
        raise NotImplementedError

    def _apply_rows(self, param: Tensor, rows: Tensor, grad: Tensor, update: Update, *, clipping: Clipping) -> None:
        """As `_apply` for the rows `rows` (int64 [n]) of a matrix, `grad` [n, H]; element-wise rules only."""
        raise NotImplementedError

    def _clipping(self, grad: Tensor) -> Clipping:
        coefficient = self._coefficient
        if coefficient is None and self._clip_mode == "none":
            return NO_CLIPPING
        if coefficient is not None:
            coefficient = coefficient.to(grad.device)
        match self._clip_mode:
            case "delayed" if not self._is_measured:
                self._norm.add(tensor_norm(grad))
            case "group":
                norm = tensor_norm(grad)
                if self._is_measured:
                    norm = norm / (self.loss_scale or 1.0)
                else:
                    self._norm.add(norm)
                own = clip_coefficient(norm, self._threshold)
                return Clipping(own if coefficient is None else own.mul_(coefficient))
            case "value":
                return Clipping(coefficient, limit=self._threshold * (self.loss_scale or 1.0))
        return Clipping(coefficient)

    @property
    def _needs_own_backward(self) -> bool:
        return self._clip_mode in ("norm", "delayed") or self._loss_scale is not None

    @contextmanager
    def _in_phase(self, phase: _Phase) -> Iterator[None]:
        self._phase = phase
        try:
            yield
        finally:
            self._phase = _Phase.UPDATE
            self._pass += 1

    def _workspace(self, device: torch.device) -> Workspace:
        found = self._workspaces.get(device)
        if found is None:
            found = self._workspaces[device] = Workspace(device, rounding=self._rounding, seed=self._seed)
        return found

    # -- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and what is not a tensor: step, seed, loss scale, the norm for `delayed`."""
        return {
            **super().state_dict(),
            "step": self._steps,
            "seed": self._seed,
            "loss_scale": None if self._loss_scale is None else self._loss_scale.state_dict(),
            "previous_grad_norm": None if self._previous_norm is None else float(self._previous_norm),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments (fp32 stays fp32: torch's own would cast them to the weights' dtype), rates, step, seed,
        loss scale.

        Raises:
            ValueError: the groups do not match this optimizer's.
        """
        saved_groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in saved_groups] != sizes:
            raise ValueError("the saved optimizer has other parameter groups than this one")
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        self.state.clear()
        for index, moments in cast(dict[int, dict[str, Tensor]], state_dict["state"]).items():
            param = self._slots[index].param
            self.state[param] = {name: moment.to(param.device, copy=True) for name, moment in moments.items()}
        self._steps = int(state_dict["step"])
        if self._seed != state_dict["seed"]:
            self._seed = int(state_dict["seed"])
            self._workspaces.clear()
        if self._loss_scale is not None and state_dict["loss_scale"] is not None:
            self._loss_scale.load_state_dict(state_dict["loss_scale"])
        norm = state_dict["previous_grad_norm"]
        self._previous_norm = None if norm is None else torch.tensor(norm, dtype=torch.float32)
        self._has_gradients = self._is_measured = self._is_skipped = False
        self._norm = GlobalNorm()
        for slot in self._slots:
            slot.update = None
        self._pass += 1


_TWICE = (
    "a parameter was about to be updated twice in one step. Gradients cannot be accumulated over several backward "
    "passes (call opt.step() after each), and reentrant activation checkpointing of a shared weight is not supported "
    "(use use_reentrant=False)"
)


def state_bytes(optimizer: RunOptimizer) -> int:
    """Bytes of all moments that an optimizer holds."""
    moments: Iterable[Tensor] = (
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
    return sum(moment.numel() * moment.element_size() for moment in moments)
