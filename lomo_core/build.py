"""From a run's configuration to what trains: model, optimizer, meter and executor, all made for each other.

A rollback makes them anew from other weights, so nothing here knows where the run stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from lomo_core.clipping_choice import (
    SMALLEST_CHOICE_BYTES,
    ExactWay,
    StepCost,
    choose_exact_clipping,
    measure_host,
)
from lomo_core.config import OptimizerConfig, TrainConfig
from lomo_core.data.packing_check import check_packing
from lomo_core.events import MemoryBytes
from lomo_core.execute.plain import PlainExecutor
from lomo_core.journal import Journal
from lomo_core.memory.meter import Meter
from lomo_core.model import DTYPES, enable_activation_checkpointing, load_model
from lomo_core.oom import out_of_memory_named
from lomo_core.optim import AdaLomo, Lomo
from lomo_core.optim.baselines import Baseline, BaselineClipMode, BaselineName
from lomo_core.optim.protocol import RunOptimizer
from lomo_core.param_groups import group_parameters

_WAYS: dict[ExactWay, str] = {
    "second_backward": "a second backward pass",
    "spill_memory": "gradients put aside in host memory",
    "spill_file": "gradients put aside in a file",
}


@dataclass(frozen=True, slots=True)
class Training:
    """What a step needs."""

    model: Any
    optimizer: RunOptimizer
    meter: Meter
    executor: PlainExecutor
    way: ExactWay | None
    """How the norm is had before the first update, where it is needed there."""

    @property
    def keeps_graph(self) -> bool:
        """Whether the optimizer walks each graph twice."""
        return self.way == "second_backward"


def build_training(
    config: TrainConfig,
    source: str | Path,
    *,
    device: torch.device,
    tokens_per_step: float,
    journal: Journal,
    planned: MemoryBytes | None,
) -> Training:
    """Load the weights at `source` and put the run's optimizer on them. `planned`: what to tell where they do not fit.

    Raises:
        EngineError: of the class that names the cause.
    """
    with out_of_memory_named("while loading the model", lambda: planned, is_loading=True):
        model = load_model(source, precision=config.precision, device=device)
    if config.data.packing:
        check_packing(model)
    if config.activation_checkpointing and not enable_activation_checkpointing(model):
        journal.say("warn", "this architecture has no activation checkpointing: the setting has no effect")
    way = exact_way(config, model, device=device, tokens_per_step=tokens_per_step, journal=journal)
    optimizer = build_optimizer(config, model, way=way)
    meter = Meter(model, optimizer, device)
    with out_of_memory_named("while trying the model's head", lambda: planned, is_loading=True):
        executor = PlainExecutor(model, optimizer, meter)
    if executor.has_own_head:
        journal.say("info", "this architecture does more in its head than multiply: its logits are made as a whole")
    return Training(model=model, optimizer=optimizer, meter=meter, executor=executor, way=way)


def exact_way(
    config: TrainConfig, model: Any, *, device: torch.device, tokens_per_step: float, journal: Journal
) -> ExactWay | None:
    """How the norm is to be had before the first update; None where it is not needed there.

    fp16 needs it in every clip mode: an overflow must not reach a weight.
    """
    clip = config.optimizer.clip
    if config.optimizer.is_baseline or (clip.mode != "norm" and config.precision != "fp16"):
        return None
    if clip.exact != "auto":
        return clip.exact
    dtype = DTYPES[config.precision]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    step = StepCost(
        num_parameters=num_parameters,
        gradient_bytes=num_parameters * dtype.itemsize,
        tokens_per_step=tokens_per_step,
        recomputes=config.activation_checkpointing,
    )
    if step.gradient_bytes < SMALLEST_CHOICE_BYTES:
        return "second_backward"
    way, seconds = choose_exact_clipping(step, measure_host(device, dtype, Path(config.run_dir)))
    estimates = ", ".join(f"{name} {value:.2g} s" for name, value in seconds.items())
    journal.say("info", f"the norm comes from {_WAYS[way]} (estimates per step: {estimates})")
    return way


def build_optimizer(config: TrainConfig, model: torch.nn.Module, *, way: ExactWay | None) -> RunOptimizer:
    """The optimizer of a run over all parameters of a model but the frozen ones, which stop requiring gradients.

    Raises:
        ConfigError: a pattern takes no parameter.
    """
    optimizer = config.optimizer
    clip = optimizer.clip
    groups = _torch_groups(optimizer, model)
    common: dict[str, Any] = {
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": None if clip.mode == "none" else clip.threshold,
    }
    if optimizer.is_baseline:
        mode = cast(BaselineClipMode, clip.mode)
        name = cast(BaselineName, optimizer.name)
        return Baseline(name, groups, optimizer.peak_learning_rate, clip_mode=mode, **common)
    common |= {"clip_mode": clip.mode, "rounding": optimizer.weight_rounding, "seed": config.seed}
    if way == "spill_memory":
        common["spill_to"] = "memory"
    if way == "spill_file":
        common["spill_to"] = Path(config.run_dir)
    return (Lomo if optimizer.name == "lomo" else AdaLomo)(groups, optimizer.peak_learning_rate, **common)


def _torch_groups(config: OptimizerConfig, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameter groups as torch's optimizers take them; `learning_rate_scale` is the trainer's own key."""
    parameters = dict(model.named_parameters())
    grouping = group_parameters(list(parameters), config)
    for name in grouping.frozen:
        parameters[name].requires_grad = False
    return [
        {
            "params": [parameters[name] for name in group.names],
            "learning_rate_scale": group.learning_rate_scale,
            "weight_decay": group.weight_decay,
        }
        for group in grouping.groups
    ]
