"""torch's own optimizers behind the run's interface give torch's own results."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lomo_core.optim.baselines import Baseline, BaselineClipMode, BaselineName

NAMES: list[BaselineName] = ["sgd", "adamw"]
MODES: list[BaselineClipMode] = ["norm", "value", "group", "none"]


def make_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def loss_of(net: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(net.parameters()).dtype
    loss: Tensor = net(torch.randn(5, 6, generator=generator).to(dtype)).float().square().sum()
    return loss


def naive(name: str, net: nn.Module, *, mode: str, threshold: float) -> Any:
    """A step as anybody writes it with torch."""
    cls = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
    optimizer = cls(net.parameters(), lr=0.01, weight_decay=0.1, foreach=False)

    def step(number: int) -> None:
        loss_of(net, number).backward()  # type: ignore[no-untyped-call]
        if mode == "norm":
            torch.nn.utils.clip_grad_norm_(net.parameters(), threshold)
        if mode == "value":
            torch.nn.utils.clip_grad_value_(net.parameters(), threshold)
        if mode == "group":
            for param in net.parameters():
                torch.nn.utils.clip_grad_norm_([param], threshold)
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_torchs_own(name: BaselineName, mode: BaselineClipMode, dtype: torch.dtype) -> None:
    ours, theirs = make_net(dtype), make_net(dtype)
    optimizer = Baseline(name, ours.parameters(), 0.01, weight_decay=0.1, max_grad_norm=0.5, clip_mode=mode)
    step = naive(name, theirs, mode=mode, threshold=0.5)
    for number in range(4):
        assert optimizer.backward(loss_of(ours, number))
        optimizer.step()
        step(number)
    assert optimizer.num_steps == 4
    assert optimizer.last_grad_norm is not None and optimizer.last_grad_norm > 0.5
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_finite_changes_nothing(name: BaselineName, mode: BaselineClipMode) -> None:
    net = make_net()
    optimizer = Baseline(name, net.parameters(), 0.01, max_grad_norm=0.5, clip_mode=mode)
    optimizer.backward(loss_of(net, 0))
    optimizer.step()
    weights = [param.detach().clone() for param in net.parameters()]
    moments = [moment.clone() for state in optimizer.state.values() for moment in state.values() if moment is not None]
    assert not optimizer.backward(loss_of(net, 1) * math.inf)
    optimizer.step()
    assert optimizer.num_steps == 2
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    after = [moment for state in optimizer.state.values() for moment in state.values() if moment is not None]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert all(param.grad is None for param in net.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_probe_leaves_no_trace(name: BaselineName) -> None:
    net = make_net()
    optimizer = Baseline(name, net.parameters(), 0.01)
    weights = [param.detach().clone() for param in net.parameters()]
    with optimizer.probing():
        loss_of(net, 0).backward()  # type: ignore[no-untyped-call]
    assert all(param.grad is None for param in net.parameters())
    assert not optimizer.state and optimizer.num_steps == 0 and optimizer.last_grad_norm is None
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_come_whole_or_not_at_all(name: BaselineName) -> None:
    net = make_net()
    optimizer = Baseline(name, net.parameters(), 0.01)
    weight = next(net.parameters())
    assert not optimizer.takes_rows(weight)
    with pytest.raises(TypeError, match="whole gradients"):
        optimizer.take_rows(weight, 0, weight)
    with pytest.raises(TypeError, match="whole gradients"):
        optimizer.take_scattered_rows(weight, torch.zeros(1, dtype=torch.int64), weight)


@pytest.mark.parametrize("name", NAMES)
def test_all_gradients_are_counted_as_alive(name: BaselineName) -> None:
    net = make_net()
    optimizer = Baseline(name, net.parameters(), 0.01)
    for number in range(2):
        optimizer.backward(loss_of(net, number))
        optimizer.step()
    assert optimizer.peak_gradient_bytes == sum(4 * param.numel() for param in net.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_state_survives(name: BaselineName) -> None:
    straight, net = make_net(torch.bfloat16), make_net(torch.bfloat16)
    first, second = Baseline(name, straight.parameters(), 0.01), Baseline(name, net.parameters(), 0.01)
    first.backward(loss_of(straight, 0))
    first.step()
    net.load_state_dict(straight.state_dict())
    # torch's own takes over the tensors themselves.
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, of in ((first, straight), (second, net)):
        optimizer.backward(loss_of(of, 1))
        optimizer.step()
    assert second.num_steps == 2
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), net.parameters(), strict=True))
