"""The update rules against independent formulas, torch's own optimizers, and themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lomo_core.memory.meter import reset_resident_peak, resident_peak_bytes
from lomo_core.optim import AdaLomo, Lomo
from lomo_core.optim.clip import NO_CLIPPING, tensor_norm
from lomo_core.optim.fused import FusedOptimizer, state_bytes
from lomo_core.optim.rounding import BLOCK, NoisePool

CPU = torch.device("cpu")
# What two-pass clipping may differ by from clip_grad_norm_ and SGD: below one unit in the last place at 1.0.
CLIPPING_TOLERANCE = 1e-7


class Tied(nn.Module):
    """Embedding, two layers, and a head that is the embedding's own weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16))

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embedding(ids)) @ self.embedding.weight.t()


def loss_of(model: Tied, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 50, (4, 12), generator=generator)
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def equal_after(steps: int, fused: Callable[[Tied], None], plain: Callable[[Tied], None]) -> float:
    """The largest difference between the weights after the two loops."""
    left, right = Tied(), Tied()
    fused(left)
    plain(right)
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def run_sgd(model: Tied, *, clip: float | None = None, group: bool = False) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    for step in range(5):
        loss_of(model, step).backward()
        if clip is not None:
            for params in [[p] for p in model.parameters()] if group else [list(model.parameters())]:
                nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        optimizer.zero_grad()


def run_lomo(model: Tied, **options: object) -> FusedOptimizer:
    optimizer = Lomo(model.parameters(), lr=0.1, **options)  # type: ignore[arg-type]
    for step in range(5):
        if options.get("clip_mode", "norm") == "norm" and "max_grad_norm" in options:
            assert optimizer.backward(loss_of(model, step))
        else:
            loss_of(model, step).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_lomo_is_sgd_bit_for_bit() -> None:
    assert equal_after(5, run_lomo, run_sgd) == 0.0


def test_exact_clipping_is_clip_grad_norm() -> None:
    assert equal_after(5, lambda m: run_lomo(m, max_grad_norm=0.2), lambda m: run_sgd(m, clip=0.2)) < CLIPPING_TOLERANCE


def test_group_clipping_is_clip_grad_norm_of_each_tensor() -> None:
    fused = lambda m: run_lomo(m, max_grad_norm=0.05, clip_mode="group")  # noqa: E731
    assert equal_after(5, fused, lambda m: run_sgd(m, clip=0.05, group=True)) < CLIPPING_TOLERANCE


def test_value_clipping() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = Lomo([weight], lr=1.0, max_grad_norm=0.5, clip_mode="value")
    (weight * torch.tensor([2.0, -3.0, 0.25])).sum().backward()
    optimizer.step()
    assert weight.tolist() == [-0.5, 0.5, -0.25]
    assert optimizer.last_grad_norm is None


def test_the_global_norm_is_reported_in_norm_and_group_mode() -> None:
    model = Tied()
    loss_of(model, 0).backward()
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    for mode in ("norm", "group"):
        again = Tied()
        optimizer = Lomo(again.parameters(), lr=0.0, max_grad_norm=1.0, clip_mode=mode)  # type: ignore[arg-type]
        optimizer.backward(loss_of(again, 0))
        optimizer.step()
        assert optimizer.last_grad_norm == pytest.approx(expected, rel=1e-6)


def test_a_bare_backward_with_the_global_norm_is_refused() -> None:
    model = Tied()
    before = [p.detach().clone() for p in model.parameters()]
    Lomo(model.parameters(), lr=0.1, max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"opt\.backward\(loss\)"):
        loss_of(model, 0).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_accumulation_is_refused() -> None:
    model = Tied()
    Lomo(model.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="twice in one step"):
        loss_of(model, 1).backward()


def test_reentrant_checkpointing_of_a_shared_weight_is_refused() -> None:
    layer = nn.Linear(8, 8)
    Lomo(layer.parameters(), lr=0.1)
    x = torch.randn(2, 8, requires_grad=True)
    for _ in range(2):
        x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        x.sum().backward()


def test_a_non_finite_norm_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = Lomo([weight], lr=1.0, max_grad_norm=1.0)
    assert not optimizer.backward((weight * torch.tensor([1.0, math.inf, 1.0])).sum())
    assert weight.tolist() == [1.0, 1.0, 1.0]


def test_only_one_gradient_is_alive() -> None:
    model = Tied()
    optimizer = run_lomo(model)
    assert optimizer.peak_gradient_bytes == max(p.numel() * 4 for p in model.parameters())


def test_groups_keep_their_own_rate_and_decay() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lomo([{"params": [a], "lr": 0.5}, {"params": [b], "weight_decay": 0.1}], lr=1.0)
    (a.sum() + b.sum()).backward()
    optimizer.step()
    assert a.tolist() == [0.5, 0.5]
    assert b.tolist() == pytest.approx([1.0 * 0.9 - 1.0] * 2)


def test_a_group_added_later_and_removed_hooks() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lomo([a], lr=1.0)
    optimizer.add_param_group({"params": [b]})
    (a.sum() + b.sum()).backward()
    assert b.tolist() == [0.0, 0.0]
    optimizer.remove_hooks()
    optimizer.step()
    a.sum().backward()
    assert a.grad is not None


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"max_grad_norm": 0.0}, {"clip_mode": "foo"}, {"rounding": "up"}, {"weight_decay": -1.0}]
)
def test_bad_arguments(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Lomo([nn.Parameter(torch.ones(1))], **options)  # type: ignore[arg-type]


def test_double_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        Lomo([nn.Parameter(torch.ones(1, dtype=torch.float64))])


def adafactor_reference(w: Tensor, grads: list[Tensor], *, lr: float) -> Tensor:
    """Algorithm 5 of arXiv 1804.04235 without momentum, whole tensors, fp64."""
    w = w.double()
    row = col = full = torch.zeros((), dtype=torch.float64)
    for t, g in enumerate((grad.double() for grad in grads), start=1):
        beta = 1 - t**-0.8
        s = g * g + 1e-30
        if g.dim() >= 2:
            row = beta * row + (1 - beta) * s.mean(-1)
            col = beta * col + (1 - beta) * s.mean(-2)
            v = row.unsqueeze(-1) * col.unsqueeze(-2) / row.mean(-1)[..., None, None]
        else:
            v = full = beta * full + (1 - beta) * s
        u = g / v.sqrt()
        u = u / max(1.0, float(u.square().mean().sqrt()))
        w = w - lr * max(1e-3, float(w.square().mean().sqrt())) * u
    return w


@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (600, 700), (3, 5, 9), (4, 300, 1100), (8, 4, 3, 3)])
def test_adalomo_is_adafactor_for_any_rank(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    grads = [torch.randn(shape, generator=generator) * 10.0**-i for i in range(4)]
    weight = nn.Parameter(start.clone())
    optimizer = AdaLomo([weight], lr=0.01)
    for grad in grads:
        (weight * grad).sum().backward()
        optimizer.step()
    expected = adafactor_reference(start, grads, lr=0.01)
    assert float((weight.detach().double() - expected).abs().max()) < 1e-6


def test_adalomo_state_is_small_and_survives_saving() -> None:
    weight = nn.Parameter(torch.randn(64, 32).bfloat16())
    optimizer = AdaLomo([weight], lr=0.01, rounding="stochastic", seed=3)
    (weight.float() ** 2).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == (64 + 32) * 4
    copy = nn.Parameter(weight.detach().clone())
    other = AdaLomo([copy], lr=0.5, rounding="stochastic")
    other.load_state_dict(optimizer.state_dict())
    assert all(moment.dtype == torch.float32 for moment in other.state[copy].values())
    for w, opt in ((weight, optimizer), (copy, other)):
        (w.float() ** 2).sum().backward()
        opt.step()
    assert torch.equal(weight, copy)
    assert other.num_steps == 2


def test_state_of_another_model_is_refused() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="parameter groups"):
        Lomo([a, b]).load_state_dict(Lomo([a]).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", [Lomo, AdaLomo])
def test_an_update_needs_little_beside_weight_and_gradient(cls: type[FusedOptimizer], dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.full((4096, 4096), 0.5, dtype=dtype))
    grad = torch.full_like(weight, 0.25)
    optimizer = cls([weight], lr=1.0, rounding="stochastic")
    if not reset_resident_peak():
        pytest.skip("needs a kernel that resets the peak")
    start = resident_peak_bytes()
    with torch.no_grad():
        update = optimizer._update_of(optimizer._slots[0])
        optimizer._apply(weight, grad, update, clipping=NO_CLIPPING, start=0)
    # fp32 copies of weight and gradient would be 128 MiB; 64 MiB is the bound that blocks are for.
    assert resident_peak_bytes() - start < 64 * 2**20
    assert float(weight.detach()[0, 0]) < 0.5


def rounded(value: float, *, step: int, numel: int = 1 << 20) -> Tensor:
    weight = nn.Parameter(torch.full((numel,), 1.0, dtype=torch.bfloat16))
    optimizer = Lomo([weight], lr=1.0, rounding="stochastic")
    optimizer._steps = step
    (weight.float() * -value).sum().backward()
    return weight.detach().float()


def test_stochastic_rounding_keeps_the_mean() -> None:
    # One unit in the last place at 1.0 is 2^-7. The update 0.0015 (exact in bf16: 0.00150299) is a fifth of it.
    update = float(torch.tensor(0.0015).bfloat16())
    weight = rounded(update, step=0)
    assert sorted(weight.unique().tolist()) == [1.0, 1.0 + 2**-7]
    # Balanced noise: the error of the mean is below that of independent noise, 2^-7 * 0.4 / sqrt(2^20) = 3e-6.
    assert float(weight.double().mean()) == pytest.approx(1.0 + update, abs=6e-6)
    nearest = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    Lomo([nearest], lr=1.0)
    (nearest.float() * -update).sum().backward()
    assert nearest.tolist() == [1.0] * 4


def test_noise_depends_on_seed_step_parameter_and_place_alone() -> None:
    assert torch.equal(rounded(0.0015, step=4), rounded(0.0015, step=4))
    assert not torch.equal(rounded(0.0015, step=4), rounded(0.0015, step=5))
    pool = NoisePool(7, CPU)
    whole = torch.zeros(2 * BLOCK).add_(1.001)
    for start in range(0, 2 * BLOCK, BLOCK):
        pool.round_(whole[start : start + BLOCK], torch.bfloat16, step=1, parameter=2, start=start)
    shard = torch.zeros(1000).add_(1.001)
    pool.round_(shard, torch.bfloat16, step=1, parameter=2, start=BLOCK + 17)
    assert torch.equal(shard, whole[BLOCK + 17 : BLOCK + 1017])


def test_the_pool_is_balanced() -> None:
    pool = NoisePool(0, CPU)
    counts = torch.bincount(pool._pool[: pool._size], minlength=1 << 16)
    assert counts.min() == counts.max() == 16
    # Neighbours and distant places are uncorrelated: 5 standard errors of 2^20 pairs.
    noise = pool._pool[: pool._size].double() / (1 << 16) - 0.5
    for lag in (1, 2, 64, 1 << 15, 1 << 16):
        assert abs(float((noise * noise.roll(lag)).mean()) * 12) < 5 / 1024, lag


def test_rounding_of_special_values() -> None:
    pool = NoisePool(0, CPU)
    value = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.5])
    value.view(torch.int32)[4] = 0x7FFFFFFF
    pool.round_(value, torch.bfloat16, step=1, parameter=0, start=0)
    assert value[:4].tolist() == [0.0, -0.0, math.inf, -math.inf]
    assert math.isnan(value[4]) and value[5] == 1.5


def test_bf16_blocks_equal_the_whole_tensor() -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 200_000).bfloat16()
    grad = torch.randn(3, 200_000).bfloat16()
    weight = nn.Parameter(start.clone())
    Lomo([weight], lr=0.01, weight_decay=0.1)
    (weight * grad).sum().backward()
    expected = (start.float() * (1 - 0.001)).add(grad.float(), alpha=-0.01).bfloat16()
    assert torch.equal(weight, expected)


def test_the_norm_of_a_large_tensor_is_exact() -> None:
    grad = torch.randn(2000, 1000)
    assert float(tensor_norm(grad)) == pytest.approx(float(grad.double().norm()), rel=1e-6)
