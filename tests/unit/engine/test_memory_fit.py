"""What is chosen for "auto", and what is proposed where a setting does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lomo_core.memory.fit import largest_that_fits, nearest_that_fits
from lomo_core.memory.paper import llama
from lomo_core.memory.plan import Setting, plan

LLAMA = llama("7B")
SETTING = Setting(batch_size=8, seq_length=512, activation_checkpointing=False, attention="sdpa")


def _peak(**changes: object) -> int:
    return plan(LLAMA, replace(SETTING, **changes)).peak_bytes  # type: ignore[arg-type]


def test_a_setting_that_fits_is_its_own_nearest() -> None:
    found = nearest_that_fits(LLAMA, SETTING, _peak())
    assert found is not None
    assert found.setting == SETTING
    assert found.plan.peak_bytes == _peak()


def test_checkpointing_comes_before_a_smaller_batch() -> None:
    found = nearest_that_fits(LLAMA, SETTING, _peak() - 1)
    assert found is not None
    assert found.setting == replace(SETTING, activation_checkpointing=True)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_largest_batch_that_fits_is_proposed(batch: int) -> None:
    given = replace(SETTING, activation_checkpointing=True)
    capacity = plan(LLAMA, replace(given, batch_size=batch)).peak_bytes
    assert plan(LLAMA, replace(given, batch_size=batch + 1)).peak_bytes > capacity
    found = nearest_that_fits(LLAMA, given, capacity)
    assert found is not None
    assert found.setting == replace(given, batch_size=batch)


def test_rows_are_shortened_last() -> None:
    given = replace(SETTING, activation_checkpointing=True, seq_length=2048)
    one_row = replace(given, batch_size=1)
    capacity = plan(LLAMA, replace(one_row, seq_length=1000)).peak_bytes
    found = nearest_that_fits(LLAMA, given, capacity)
    assert found is not None
    assert found.setting == replace(one_row, seq_length=960)


def test_where_moments_do_not_fit_lomo_is_proposed() -> None:
    found = nearest_that_fits(LLAMA, replace(SETTING, optimizer="adamw"), _peak())
    assert found is not None
    assert found.setting == SETTING


def test_weights_alone_too_large() -> None:
    assert nearest_that_fits(LLAMA, SETTING, 2 * LLAMA.num_parameters) is None


def test_auto_takes_the_batch_first_and_then_the_faster_way() -> None:
    def chosen(capacity: int) -> tuple[int, bool]:
        found = largest_that_fits(LLAMA, SETTING, capacity, auto_batch=True, auto_checkpointing=True)
        assert found is not None
        assert found.plan.peak_bytes <= capacity
        return found.setting.batch_size, found.setting.activation_checkpointing

    assert chosen(_peak()) == (8, False)
    assert chosen(_peak() - 1) == (8, True)
    below = _peak(activation_checkpointing=True) - 1
    assert chosen(below) == (4, _peak(batch_size=4) > below)


def test_auto_changes_nothing_that_was_given() -> None:
    capacity = _peak() - 1
    assert largest_that_fits(LLAMA, SETTING, capacity, auto_batch=False, auto_checkpointing=False) is None
    found = largest_that_fits(LLAMA, SETTING, capacity, auto_batch=True, auto_checkpointing=False)
    assert found is not None
    assert found.setting == replace(SETTING, batch_size=4)
