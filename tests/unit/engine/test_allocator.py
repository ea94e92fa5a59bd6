"""The watch over the heap's holes: trims inside of a step and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lomo_core.memory import allocator
from lomo_core.memory.allocator import HeapWatch, find_live_heap_bytes
from lomo_core.memory.process import MOST_HOLES_BYTES

pytestmark = pytest.mark.skipif(find_live_heap_bytes() is None, reason="the C library is not glibc 2.33 or later")


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(512, 512) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each trim."""
    seen: list[str] = []
    monkeypatch.setattr(allocator, "trim_heap", lambda: seen.append("trim"))
    return seen


def test_the_live_heap_is_exact_to_the_tensor() -> None:
    before = find_live_heap_bytes()
    tensor = torch.empty(10_000_000, dtype=torch.float32)
    after = find_live_heap_bytes()
    assert before is not None and after is not None
    assert abs(after - before - tensor.nbytes) < 64 * 1024


def test_holes_beyond_the_limit_are_given_back_before_a_block_and_at_a_large_gradient(
    trims: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = [100]
    monkeypatch.setattr(allocator, "_find_resident_bytes", lambda: resident[0])
    monkeypatch.setattr(allocator, "find_live_heap_bytes", lambda: 50)
    model = _Model()
    watch = HeapWatch(model)
    with watch.step():
        assert trims == ["trim"]  # a step starts without holes
        resident[0] += MOST_HOLES_BYTES
        loss = model(torch.ones(1, 512)).sum()
        assert trims == ["trim"]  # up to the limit they may stay
        resident[0] += 1
        model(torch.ones(1, 512))
        assert len(trims) == 1 + len(model.blocks)
        loss.backward()
        assert len(trims) == 1 + 2 * len(model.blocks)  # weights are large, biases are not


def test_outside_of_a_step_nothing_is_asked(trims: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Model()
    watch = HeapWatch(model)
    with watch.step():
        pass
    trims.clear()
    monkeypatch.setattr(allocator, "_find_resident_bytes", lambda: pytest.fail("asked outside of a step"))
    model(torch.ones(1, 512)).sum().backward()
    assert trims == []
