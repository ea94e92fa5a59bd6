"""What of a job's options its plan is made of."""

from __future__ import annotations

import pytest

from jobs.planning import to_setting
from jobs.spec import ClipOptions, LomoOptions


@pytest.mark.parametrize(
    ("clip", "precision", "norm"),
    [
        (ClipOptions(mode="norm"), "bf16", "second_backward"),
        (ClipOptions(mode="norm", exact="spill_file"), "bf16", "spill_file"),
        # Its first step has no norm of a step before it.
        (ClipOptions(mode="delayed"), "bf16", "second_backward"),
        (ClipOptions(mode="group"), "bf16", "one_pass"),
        (ClipOptions(mode="none"), "fp32", "one_pass"),
        (ClipOptions(mode="none"), "fp16", "second_backward"),
    ],
)
def test_the_norm_is_had_in_the_way_that_takes_the_most(clip: ClipOptions, precision: str, norm: str) -> None:
    options = LomoOptions.model_validate({"clip": clip, "precision": precision})
    assert to_setting(options, batch_size=1).norm == norm


def test_rows_are_no_longer_than_the_model_takes() -> None:
    options = LomoOptions(max_seq_length=512)
    assert to_setting(options, batch_size=1, model_length=128).seq_length == 128
    assert to_setting(options, batch_size=1, model_length=1024).seq_length == 512
    assert to_setting(options, batch_size=1).seq_length == 512
