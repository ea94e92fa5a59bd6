"""Which rows make up a step: the same as the plain definition says, for any size of data."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lomo_core.data.order import BatchPlan, batch_width, shuffled_range
from lomo_core.seeding import shuffled


def plain_batches(lengths: list[int], *, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The definition: shuffled, sorted by length within windows of 8 batches, batches shuffled."""
    rows = shuffled(list(range(len(lengths))), seed, epoch, 1)
    batches = []
    for first in range(0, len(rows), 8 * batch_size):
        part = sorted(rows[first : first + 8 * batch_size], key=lengths.__getitem__)
        batches += [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
    return [batches[place] for place in shuffled(list(range(len(batches))), seed, epoch, 2)]


@pytest.mark.parametrize("num_items", [0, 1, 2, 1000, 70_000])
@pytest.mark.parametrize("words", [(0,), (7, 3, 1), (2**64 - 1, 2**63)])
def test_shuffled_range_is_shuffled(num_items: int, words: tuple[int, ...]) -> None:
    assert shuffled_range(num_items, *words).tolist() == shuffled(list(range(num_items)), *words)


@pytest.mark.parametrize("num_rows", [1, 5, 64, 101, 257])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("seed", [0, 3, 2**63 + 11])
def test_the_order_is_the_definitions(num_rows: int, batch_size: int, seed: int) -> None:
    lengths = [1 + place * 7 % 40 for place in range(num_rows)]
    plan = BatchPlan(lengths, batch_size=batch_size, seed=seed)
    for epoch in range(3):
        expected = plain_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
        first = epoch * plan.batches_per_epoch
        assert [plan.rows_of(step) for step in range(first, first + plan.batches_per_epoch)] == expected


def test_millions_of_rows_are_ordered_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(2, 512, 1_000_000, dtype=np.int32)
    plan = BatchPlan(lengths, batch_size=8, seed=1)
    start = time.process_time()
    plan.rows_of(plan.batches_per_epoch * 3 + 5)
    # Measured 0.2 s; the shuffle alone takes 2.3 s by the plain definition.
    assert time.process_time() - start < 3


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_longest_step(batch_size: int) -> None:
    lengths = np.random.default_rng(3).integers(2, 90, 50).tolist()
    plan = BatchPlan(lengths, batch_size=batch_size, seed=5)

    def cells(step: int) -> int:
        rows = plan.rows_of(step)
        return len(rows) * batch_width(max(lengths[row] for row in rows))

    for first, total in ((0, 3), (0, 120), (7, 60), (49, 50)):
        assert plan.longest_step(first=first, total_steps=total) == max(range(first, total), key=cells)


def test_every_row_is_used_once_per_epoch_in_another_order() -> None:
    lengths = [1 + place * 7 % 40 for place in range(101)]
    plan = BatchPlan(lengths, batch_size=4, seed=3)
    assert plan.batches_per_epoch == 26
    epochs = [[plan.rows_of(step) for step in range(first, first + 26)] for first in (0, 26)]
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch) == list(range(101))
        assert sorted(map(len, epoch)) == [1, *[4] * 25]
    assert epochs[0] != epochs[1]
    # Asking in any order gives the same: the position in the data is the step number.
    again = BatchPlan(lengths, batch_size=4, seed=3)
    assert again.rows_of(30) == epochs[1][4] and again.rows_of(2) == epochs[0][2]
    assert BatchPlan(lengths, batch_size=4, seed=4).rows_of(0) != epochs[0][0]


def test_batches_have_little_padding() -> None:
    lengths = [1 + place * 7 % 40 for place in range(256)]
    plan = BatchPlan(lengths, batch_size=4, seed=0)
    batches = [[lengths[row] for row in plan.rows_of(step)] for step in range(64)]
    cells = sum(max(batch) * len(batch) for batch in batches)
    assert cells < 1.15 * sum(lengths)
