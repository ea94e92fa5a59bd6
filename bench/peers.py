"""The others, as their users call them: lomo-optim 0.1.1, torch's own optimizers, transformers' Trainer.

Forward pass and loss are transformers' own (`labels=`). Gradients are dropped right after the step, the smallest loop
that each of them allows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, Protocol

import lomo_optim
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

Step = Callable[[Tensor], float]
# More than anybody waits for: the Trainer ends when its callbacks get no more lines.
_MANY_STEPS = 1_000_000


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """transformers' own loss of ids [batch, seq] as their own labels: 0-dim."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def lomo_optim_lomo(model: Any, rate: float) -> Step:
    """`lomo_optim.Lomo` without clipping."""
    return _fused(model, lomo_optim.Lomo(model, lr=rate), rate)


def lomo_optim_adalomo(model: Any, rate: float) -> Step:
    """`lomo_optim.AdaLomo`; its moments are made with `.cuda()`, which is taken for the identity meanwhile."""
    original = torch.Tensor.cuda
    torch.Tensor.cuda = _stay  # type: ignore[method-assign, assignment]
    try:
        optimizer = lomo_optim.AdaLomo(model, lr=rate)
    finally:
        torch.Tensor.cuda = original  # type: ignore[method-assign]
    return _fused(model, optimizer, rate)


def torch_sgd(model: Any, rate: float) -> Step:
    """`torch.optim.SGD(foreach=False)`."""
    return _plain(model, torch.optim.SGD(model.parameters(), lr=rate, foreach=False))


def torch_adamw(model: Any, rate: float) -> Step:
    """`torch.optim.AdamW` as it comes."""
    return _plain(model, torch.optim.AdamW(model.parameters(), lr=rate))


STEPS: dict[tuple[str, str], Callable[[Any, float], Step]] = {
    ("lomo-optim", "lomo"): lomo_optim_lomo,
    ("lomo-optim", "adalomo"): lomo_optim_adalomo,
    ("torch", "sgd"): torch_sgd,
    ("torch", "adamw"): torch_adamw,
}


def _stay(tensor: Tensor) -> Tensor:
    return tensor


def _fused(model: Any, optimizer: Any, rate: float) -> Step:
    def step(ids: Tensor) -> float:
        loss = loss_of(model, ids)
        optimizer.fused_backward(loss, rate)
        return float(loss.detach())

    return step


def _plain(model: Any, optimizer: torch.optim.Optimizer) -> Step:
    def step(ids: Tensor) -> float:
        loss = loss_of(model, ids)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


class StepServer(Protocol):
    """Tells the Trainer's callbacks when to step."""

    def begin(self) -> bool:
        """Wait for leave to step; False: end."""

    def end(self) -> None:
        """The step is over."""


class _OnCommand(TrainerCallback):
    """Holds the Trainer at the start of each step until it is told to go on."""

    def __init__(self, server: StepServer) -> None:
        self._server = server
        self._stepping = False

    def on_step_begin(self, *arguments: Any, **_: Any) -> None:
        """Wait; with nothing more to do, this step is the last and is not measured."""
        self._stepping = self._server.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report, or end the training."""
        if self._stepping:
            self._server.end()
        else:
            control.should_training_stop = True


def run_trainer(model: Any, batches: list[Tensor], *, checkpointing: bool, serve: StepServer, rate: float) -> None:
    """`Trainer(optim="lomo")` over the batches until the server ends it."""
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            optim="lomo",
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            per_device_train_batch_size=len(batches[0]),
            max_steps=_MANY_STEPS,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[_OnCommand(serve)]).train()
