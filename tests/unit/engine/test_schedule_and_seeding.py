"""Learning-rate schedules and seeded choices: pure functions."""

from __future__ import annotations

import itertools

import pytest

from lomo_core.config import ScheduleName
from lomo_core.schedule import scale_at, warmup_steps
from lomo_core.seeding import mix, shuffled


def curve(name: ScheduleName, *, total: int = 10, warmup: int = 2) -> list[float]:
    return [scale_at(name, step=step, total_steps=total, warmup=warmup) for step in range(total)]


def test_linear_falls_by_equal_steps_and_never_to_zero() -> None:
    assert curve("linear") == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_cosine_is_half_way_in_the_middle() -> None:
    values = curve("cosine")
    assert values[2] == 1.0
    assert values[6] == pytest.approx(0.5)
    assert all(a >= b > 0 for a, b in itertools.pairwise(values[2:]))


def test_constant_stays() -> None:
    assert curve("constant") == [0.5, 1.0, *[1.0] * 8]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_a_single_step_and_warmup_over_everything(name: ScheduleName) -> None:
    assert scale_at(name, step=0, total_steps=1, warmup=0) == 1.0
    assert curve(name, total=3, warmup=3) == pytest.approx([1 / 3, 2 / 3, 1.0])


@pytest.mark.parametrize("step", [-1, 10])
def test_steps_outside_of_the_run_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        scale_at("linear", step=step, total_steps=10, warmup=0)


def test_warmup_is_rounded_up() -> None:
    assert [warmup_steps(100, ratio) for ratio in (0.0, 0.031, 0.5)] == [0, 4, 50]


def test_mix_is_splitmix64() -> None:
    # The first output of splitmix64 seeded with 0, from its reference implementation.
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1, 2) != mix(2, 1)


def test_shuffled_is_a_permutation_of_the_words_alone() -> None:
    items = list(range(100))
    assert sorted(shuffled(items, 1, 2)) == items
    assert shuffled(items, 1, 2) == shuffled(items, 1, 2) != shuffled(items, 1, 3)
