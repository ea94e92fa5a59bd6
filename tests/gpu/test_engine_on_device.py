"""The engine's numbers on each device there is: the CPU always, CUDA where PyTorch finds one.

What must be equal between ways of doing a thing is equal on every device; between devices, results agree to rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lomo_core.data.batches import Batch, positions
from lomo_core.execute.plain import PlainExecutor
from lomo_core.memory.meter import Meter
from lomo_core.model import enable_activation_checkpointing, load_model
from lomo_core.optim import AdaLomo, Lomo
from lomo_core.optim.fused import FusedOptimizer
from lomo_core.optim.rounding import BLOCK, NoisePool
from tests.support.tiny_model import make_tiny_model

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model. Costs 0.2 s, once."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def batch_on(device: torch.device, step: int) -> Batch:
    ids = torch.randint(4, 500, (4, 48), generator=torch.Generator().manual_seed(step))
    mask = torch.ones_like(ids)
    return Batch(ids, mask, positions(mask), ids.clone(), num_tokens=192, num_trained=4 * 47).to(device)


def train(
    folder: Path, device: torch.device, precision: Any, cls: type[FusedOptimizer], **options: Any
) -> tuple[list[float], list[Tensor]]:
    """Losses and weights of six steps with activation checkpointing."""
    model = load_model(folder, precision=precision, device=device)
    assert enable_activation_checkpointing(model)
    optimizer = cls(model.parameters(), 0.05 if cls is Lomo else 0.005, rounding="stochastic", **options)
    executor = PlainExecutor(model, optimizer, Meter(model, optimizer, device))
    assert not executor.has_own_head
    losses = [executor.run([batch_on(device, step % 2)]).loss for step in range(6)]
    return losses, [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("cls", [Lomo, AdaLomo])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_ways_to_the_norm_give_the_same_bits(
    folder: Path, device: torch.device, cls: type[FusedOptimizer], precision: str, tmp_path: Path
) -> None:
    runs = [
        train(folder, device, precision, cls, max_grad_norm=1.0, spill_to=spill) for spill in (None, "memory", tmp_path)
    ]
    assert runs[0][0] == runs[1][0] == runs[2][0]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0][1], other[1], strict=True))
    assert runs[0][0][-1] < runs[0][0][0]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_device_agrees_with_the_cpu(folder: Path, device: torch.device) -> None:
    here, there = (train(folder, one, "fp32", Lomo, max_grad_norm=1.0)[0] for one in (CPU, device))
    assert here == pytest.approx(there, rel=1e-4)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_noise_is_the_same_everywhere(device: torch.device, dtype: torch.dtype) -> None:
    value = torch.linspace(-2, 2, 1000)
    found = []
    for one in (CPU, device):
        x = value.to(one, copy=True)
        NoisePool(5, one).round_(x, dtype, step=3, parameter=2, start=BLOCK + 7)
        found.append(x.cpu())
    assert torch.equal(*found)


@pytest.mark.parametrize("device", [device for device in DEVICES if device.type == "cuda"], ids=str)
def test_gradients_do_not_pile_up_on_the_device(folder: Path, device: torch.device) -> None:
    model = load_model(folder, precision="bf16", device=device)
    optimizer = Lomo(model.parameters(), 0.05)
    executor = PlainExecutor(model, optimizer, Meter(model, optimizer, device))
    executor.run([batch_on(device, 0)])
    assert torch.cuda.memory_allocated(device) < 1.5 * sum(p.nbytes for p in model.parameters()) + 64 * 2**20
    assert all(p.grad is None for p in model.parameters())
