"""Clipping in its several ways, spilled gradients, fp16 with its loss scale, and the loops that are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lomo_core.optim import AdaLomo, Lomo
from lomo_core.optim.fused import FusedOptimizer
from lomo_core.optim.loss_scale import LossScale
from lomo_core.optim.rounding import NoisePool
from lomo_core.optim.spill import PIECE, FileStore, MemoryStore

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Net(nn.Module):
    """Dropout, a checkpointed block, a shared weight, and one parameter that odd steps do not use."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 16)
        self.block = nn.Sequential(nn.Linear(16, 24), nn.Dropout(0.2), nn.GELU(), nn.Linear(24, 16))
        self.extra = nn.Parameter(torch.full((16,), 0.1))
        self.to(dtype)

    def loss(self, step: int) -> Tensor:
        torch.manual_seed(step)
        ids = torch.randint(0, 40, (4, 12))
        x = self.embedding(ids[:, :-1])
        x = x + torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        if step % 2 == 0:
            x = x * (1 + self.extra)
        logits = (x @ self.embedding.weight.t()).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(optimizer: FusedOptimizer, model: Net, *, steps: int = 4) -> list[float | None]:
    norms = []
    for step in range(steps):
        # In half precision the first scale may be too large.
        assert optimizer.backward(model.loss(step)) or (optimizer.loss_scale or 0) > 1
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        norms.append(optimizer.last_grad_norm)
    return norms


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", [Lomo, AdaLomo])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_spilled_gradients_give_the_bits_of_a_second_backward(
    dtype: torch.dtype, cls: type[FusedOptimizer], where: str, tmp_path: Path
) -> None:
    models = Net(dtype), Net(dtype)
    options = {"max_grad_norm": 0.3, "rounding": "stochastic", "weight_decay": 0.1}
    norms = [
        train(cls(model.parameters(), 0.05, spill_to=spill, **options), model)  # type: ignore[arg-type]
        for model, spill in zip(models, (None, "memory" if where == "memory" else tmp_path), strict=True)
    ]
    assert norms[0] == norms[1]
    assert same(*models)
    assert not same(models[0], Net(dtype))
    assert list(tmp_path.iterdir()) == []


def test_a_store_returns_what_it_was_given(tmp_path: Path) -> None:
    grad = torch.randn(7, 5).bfloat16()
    rows = torch.tensor([1, 4])
    for store in (MemoryStore(), FileStore(tmp_path)):
        store.put(3, 0, torch.zeros(2), numel=2)
        store.put(9, 0, grad[:3], numel=35)
        store.put(9, 15, grad[3:], numel=35)
        store.put_rows(9, rows, grad[:2], numel=35)
        expected = grad.clone()
        expected[rows] = grad[:2]
        assert store.parameters() == [3, 9]
        found = store.get(9, 0, 35, device=torch.device("cpu"))
        assert torch.equal(found.view(7, 5), expected)
        assert torch.equal(store.get(9, 6, 3, device=torch.device("cpu")), expected.view(-1)[6:9])
        store.clear()
        assert store.parameters() == []


def test_a_large_spilled_gradient_is_applied_in_pieces() -> None:
    numel = PIECE + 100
    weights = [nn.Parameter(torch.linspace(0, 1, numel).bfloat16()) for _ in range(2)]
    for weight, spill in zip(weights, (None, "memory"), strict=True):
        optimizer = Lomo([weight], 0.3, max_grad_norm=1e3, rounding="stochastic", spill_to=spill)  # type: ignore[arg-type]
        assert optimizer.backward((weight.float() ** 2).sum() * 0.01)
    assert torch.equal(*weights)


@pytest.mark.parametrize("cls", [Lomo, AdaLomo])
def test_a_backward_pass_that_broke_off_leaves_nothing_behind(cls: type[FusedOptimizer]) -> None:
    """In an even step `extra` has a gradient; the odd one after it must not be given that."""
    broken, plain = Net(), Net()
    optimizers = [cls(net.parameters(), 0.05, max_grad_norm=0.3, spill_to="memory") for net in (broken, plain)]
    handle = broken.embedding.weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizers[0].backward(broken.loss(0))
    handle.remove()
    optimizers[0].step()
    assert same(broken, plain)
    optimizers[1].step()
    for optimizer, net in zip(optimizers, (broken, plain), strict=True):
        assert optimizer.backward(net.loss(1))
        optimizer.step()
    assert optimizers[0].last_grad_norm == optimizers[1].last_grad_norm
    assert same(broken, plain)


def test_no_scattered_rows_are_no_work() -> None:
    weight = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    optimizer = Lomo([weight], 1.0, rounding="stochastic")
    optimizer.take_scattered_rows(weight, torch.empty(0, dtype=torch.int64), torch.empty(0, 2, dtype=torch.bfloat16))
    assert weight.tolist() == [[1.0, 1.0]] * 3


def test_a_folder_that_is_missing_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Lomo([nn.Parameter(torch.ones(1))], max_grad_norm=1.0, spill_to=tmp_path / "none")


def test_delayed_clipping_uses_the_norm_of_the_step_before() -> None:
    exact, delayed, plain = Net(), Net(), Net()
    (first,) = train(Lomo(exact.parameters(), 0.5, max_grad_norm=0.3), exact, steps=1)
    optimizer = Lomo(delayed.parameters(), 0.5, max_grad_norm=0.3, clip_mode="delayed")
    assert train(optimizer, delayed, steps=1) == [first]
    assert same(exact, delayed)
    assert first is not None and first > 0.3

    plain.load_state_dict(delayed.state_dict())
    loss = plain.loss(1)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in plain.parameters() if p.grad is not None))
    with torch.no_grad():
        for p in plain.parameters():
            if p.grad is not None:
                p.sub_(0.5 * p.grad * (0.3 / (first + 1e-6)))
    assert optimizer.backward(delayed.loss(1))
    optimizer.step()
    assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-6)
    for a, b in zip(plain.parameters(), delayed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_delayed_clipping_goes_on_from_a_saved_state() -> None:
    left, right = Net(), Net()
    first = Lomo(left.parameters(), 0.5, max_grad_norm=0.3, clip_mode="delayed")
    train(first, left, steps=2)
    right.load_state_dict(left.state_dict())
    second = Lomo(right.parameters(), 0.1, max_grad_norm=0.3, clip_mode="delayed")
    second.load_state_dict(first.state_dict())
    for optimizer, model in ((first, left), (second, right)):
        assert optimizer.backward(model.loss(2))
        optimizer.step()
    assert same(left, right)


@pytest.mark.parametrize("mode", ["norm", "delayed"])
def test_a_bare_backward_is_refused_where_the_norm_comes_first(mode: str) -> None:
    model = Net()
    Lomo(model.parameters(), 0.1, max_grad_norm=1.0, clip_mode=mode)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"call opt\.backward\(loss\)"):
        model.loss(0).backward()
    assert same(model, Net())


# -- fp16 -------------------------------------------------------------------------------------------------------------


def test_the_loss_scale_halves_and_grows_again() -> None:
    scale = LossScale()
    scale.update(has_overflowed=True)
    assert scale.scale == 32768.0
    for _ in range(1999):
        scale.update(has_overflowed=False)
    assert scale.scale == 32768.0
    scale.update(has_overflowed=False)
    assert scale.scale == 65536.0
    again = LossScale()
    again.load_state_dict(scale.state_dict())
    assert again.state_dict() == scale.state_dict()
    for _ in range(40):
        scale.update(has_overflowed=True)
    assert scale.scale == 1.0
    for _ in range(2000 * 30):
        scale.update(has_overflowed=False)
    assert scale.scale == 2.0**24


@pytest.mark.parametrize("mode", ["norm", "delayed", "value", "group", "none"])
def test_an_overflow_in_half_precision_changes_nothing_but_the_scale(mode: str) -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    options = {} if mode == "none" else {"max_grad_norm": 1.0, "clip_mode": mode}
    optimizer = Lomo([weight], lr=0.5, **options)  # type: ignore[arg-type]
    # 2 x 65536 is beyond fp16's largest number, 65504; 1 x 32768 is not.
    for factor, is_applied in ((2.0, False), (1.0, True)):
        assert optimizer.backward((weight * factor).float().sum()) is is_applied
        optimizer.step()
        assert (weight.tolist() == [1.0] * 4) is not is_applied
        assert optimizer.loss_scale == 32768.0
    # The norm is that of the unscaled gradient: 4 elements of 1.
    assert optimizer.last_grad_norm == 2.0
    expected = {"norm": 0.75, "delayed": 0.75, "group": 0.75, "value": 0.5, "none": 0.5}[mode]
    assert weight.tolist() == pytest.approx([expected] * 4, abs=1e-6)


def test_small_gradients_survive_in_half_precision_by_the_scale() -> None:
    # 1e-8 is below fp16's smallest number, 6e-8: without the scale the gradient would be 0.
    weight = nn.Parameter(torch.zeros(8, dtype=torch.float16))
    optimizer = Lomo([weight], lr=1e5)
    assert optimizer.backward((weight.float() * 1e-8).sum())
    optimizer.step()
    assert weight.tolist() == pytest.approx([-1e-3] * 8, rel=1e-2)


def test_a_bare_backward_is_refused_in_half_precision() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    Lomo([weight], lr=0.1)
    with pytest.raises(RuntimeError, match="fp16"):
        weight.sum().backward()


def test_half_precision_goes_on_from_a_saved_state() -> None:
    left, right = Net(torch.float16), Net(torch.float16)
    first = Lomo(left.parameters(), 0.05, max_grad_norm=0.3, rounding="stochastic", seed=5)
    first.backward(left.loss(0) * math.inf)
    first.step()
    train(first, left, steps=2)
    right.load_state_dict(left.state_dict())
    second = Lomo(right.parameters(), 0.05, max_grad_norm=0.3, rounding="stochastic")
    second.load_state_dict(first.state_dict())
    assert second.loss_scale == first.loss_scale
    assert first.loss_scale is not None and first.loss_scale <= 32768.0
    for optimizer, model in ((first, left), (second, right)):
        assert optimizer.backward(model.loss(2))
    assert same(left, right)


@pytest.mark.parametrize("value", [1.0003, -0.7001, 3.3e-5, -2.9e-5, 5e-8, 2.0**-14 - 1e-9, 60001.0, 0.0])
def test_stochastic_rounding_to_half_precision(value: float) -> None:
    pool = NoisePool(1, torch.device("cpu"))
    x = torch.full((1 << 18,), value)
    exact = float(x[0])
    pool.round_(x, torch.float16, step=1, parameter=0, start=0)
    assert torch.equal(x.half().float(), x)
    low = torch.tensor(exact).half()
    neighbours = {float(low), *(float(torch.nextafter(low, torch.tensor(to).half())) for to in (-math.inf, math.inf))}
    assert set(x.unique().tolist()) <= neighbours
    ulp = max(neighbours) - min(neighbours)
    # The noise is balanced: the error of the mean is far below one part in 2^9 of the spacing, its own grain 2^-13.
    assert float(x.double().mean()) == pytest.approx(exact, abs=ulp * 2.0**-10)


def test_special_values_in_half_precision() -> None:
    pool = NoisePool(0, torch.device("cpu"))
    value = torch.tensor([0.0, math.inf, -math.inf, math.nan, 65504.0, 2.0**-24])
    pool.round_(value, torch.float16, step=1, parameter=0, start=0)
    assert value[:3].tolist() == [0.0, math.inf, -math.inf]
    assert math.isnan(value[3])
    assert value[4:].tolist() == [65504.0, 2.0**-24]


# -- parts of a gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip_mode", ["none", "norm", "value"])
def test_rows_in_blocks_and_scattered_equal_the_whole(dtype: torch.dtype, clip_mode: str) -> None:
    torch.manual_seed(3)
    start = torch.randn(900, 400).to(dtype)
    grad = (torch.randn(900, 400) * 0.01).to(dtype)
    rows = torch.tensor([0, 5, 317, 655, 656, 899])
    whole, parts = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {} if clip_mode == "none" else {"max_grad_norm": 0.01, "clip_mode": clip_mode}
    optimizers = [Lomo([p], 0.5, weight_decay=0.1, rounding="stochastic", seed=2, **options) for p in (whole, parts)]  # type: ignore[arg-type]

    class Rows(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, anchor: Tensor) -> Tensor:
            return anchor.sum()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> None:
            for first in range(0, 900, 256):
                some = rows[(rows >= first) & (rows < first + 256)]
                block = (grad[first : first + 256] * g).to(dtype)
                block[some - first] = 0
                kept = parts.detach()[some]
                optimizers[1].take_rows(parts, first, block)
                with torch.no_grad():
                    parts[some] = kept
            optimizers[1].take_scattered_rows(parts, rows, (grad[rows] * g).to(dtype))

    assert optimizers[0].backward((whole.float() * grad.float()).sum())
    assert optimizers[1].backward(Rows.apply(torch.zeros(0, requires_grad=True)))  # type: ignore[no-untyped-call]
    if clip_mode == "norm" and dtype == torch.float32:
        # The norm is summed in another order.
        torch.testing.assert_close(whole, parts, rtol=1e-6, atol=0)
    else:
        assert torch.equal(whole, parts)
    assert not torch.equal(whole, start)


def test_rows_are_not_taken_where_the_rule_needs_the_whole_tensor() -> None:
    weight, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    assert Lomo([weight]).takes_rows(weight)
    assert not Lomo([weight]).takes_rows(other)
    assert not Lomo([weight], max_grad_norm=1.0, clip_mode="group").takes_rows(weight)
    assert not AdaLomo([weight]).takes_rows(weight)
    weight.requires_grad_(False)
    assert not Lomo([weight]).takes_rows(weight)


# -- loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["norm", "group", "none"])
def test_a_probe_changes_nothing(mode: str) -> None:
    probed, plain = Net(), Net()
    options = {"max_grad_norm": 0.3, "clip_mode": mode} if mode != "none" else {}
    optimizers = [AdaLomo(model.parameters(), 0.01, **options) for model in (probed, plain)]  # type: ignore[arg-type]
    with optimizers[0].probing():
        probed.loss(7).backward()
    assert same(probed, Net())
    assert all(p.grad is None for p in probed.parameters())
    assert optimizers[0].state == {}
    assert optimizers[0].peak_gradient_bytes > 0
    assert train(optimizers[0], probed) == train(optimizers[1], plain)
    assert same(probed, plain)


def test_a_second_backward_before_step_is_refused() -> None:
    model = Net()
    optimizer = Lomo(model.parameters(), 0.1, max_grad_norm=1.0)
    optimizer.backward(model.loss(0))
    with pytest.raises(RuntimeError, match="twice in one step"):
        optimizer.backward(model.loss(1))


def test_a_shared_weight_under_reentrant_checkpointing_is_refused_before_it_changes() -> None:
    layer = nn.Linear(8, 8)
    before = layer.weight.detach().clone()
    optimizer = Lomo(layer.parameters(), lr=0.1, max_grad_norm=1.0)
    x = torch.randn(2, 8, requires_grad=True)
    for _ in range(2):
        x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.backward(x.sum())
    assert torch.equal(layer.weight, before)


def test_a_double_backward_is_refused() -> None:
    model = Net()
    Lomo(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="create_graph"):
        model.loss(0).backward(create_graph=True)


def test_data_parallel_is_refused_with_the_reason(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        layer = nn.Linear(4, 4)
        before = layer.weight.detach().clone()
        optimizer = Lomo(layer.parameters(), 0.1)
        model = nn.parallel.DistributedDataParallel(layer)
        with pytest.raises(RuntimeError, match="replicas would drift apart"):
            model(torch.ones(1, 4)).sum().backward()
        assert torch.equal(layer.weight, before)
        del model
        layer.zero_grad()
        optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_torch_schedulers_drive_the_rate() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = Lomo([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(3):
        weight.sum().backward()
        optimizer.step()
        scheduler.step()
    assert weight.tolist() == [-1.75]


def test_frozen_and_unused_parameters_get_no_state_and_stay() -> None:
    model = Net()
    model.block[0].weight.requires_grad_(False)
    optimizer = AdaLomo(model.parameters(), 0.01, weight_decay=0.5)
    before = model.block[0].weight.detach().clone()
    for step in (1, 3):
        model.loss(step).backward()
        optimizer.step()
    assert torch.equal(model.block[0].weight, before)
    assert model.extra.tolist() == pytest.approx([0.1] * 16)
    assert model.block[0].weight not in optimizer.state
    assert model.extra not in optimizer.state
    assert model.embedding.weight in optimizer.state
