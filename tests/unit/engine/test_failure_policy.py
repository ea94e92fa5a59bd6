"""Losses and gradients that are not finite: skipped, then rolled back once, then the end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_core.config import ClipConfig, OptimizerConfig, TrainConfig
from lomo_core.data.order import BatchPlan
from lomo_core.errors import DivergedError, InterruptedRunError
from lomo_core.events import Checkpoint, Finished, Message, RolledBack, Skipped, Started, Step
from lomo_core.failure_policy import MAX_IN_A_ROW, FailureState, Outcome, Verdict, after_rollback, first_suspect, judge
from lomo_core.model import load_model, weights_are_finite
from lomo_core.tokenizer import load_tokenizer
from tests.support.engine_runs import MakeConfig, StopWhen, events_of, run_here
from tests.support.faults import spoilt_token
from tests.support.tiny_model import chat, write_jsonl

NUM_STEPS = 24
# Six in a row; with as many steps before them, the batches of the steps 4 to 15 are passed over.
BAD_STEPS = set(range(10, 16))
BAD = Outcome(is_applied=False)
GOOD = Outcome(is_applied=True)

MakeRun = Callable[..., TrainConfig]


@pytest.fixture
def make_run(make_config: MakeConfig, tmp_path: Path) -> MakeRun:
    """`make_run(bad_steps, run="name", **fields)`: 24 steps of one row; the rows of the (0-based) bad steps end in "~".

    All rows have the same length, so that the order of the rows does not depend on which ones are bad.
    """
    plan = BatchPlan([10] * NUM_STEPS, batch_size=1, seed=0)

    def make(bad_steps: set[int], *, run: str = "run", **fields: Any) -> TrainConfig:
        bad_rows = {plan.rows_of(step)[0] for step in bad_steps}
        write_jsonl(
            tmp_path / "train.jsonl", [chat(f"a{'~' if row in bad_rows else '?'}", "b") for row in range(NUM_STEPS)]
        )
        return make_config(run=run, **{"n_epochs": 1, "batch_size": 1, "checkpoint_every_steps": 4, **fields})

    return make


@pytest.fixture
def bad_token(tiny_model: Path) -> int:
    """The id of "~"."""
    (token,) = load_tokenizer(tiny_model)("~", add_special_tokens=False).input_ids
    return int(token)


def finished(config: TrainConfig) -> Finished:
    (event,) = events_of(config.run_dir, Finished)
    return event


def skipped(config: TrainConfig) -> list[tuple[int, str]]:
    return [(event.step, event.what) for event in events_of(config.run_dir, Skipped)]


def last_losses(config: TrainConfig) -> dict[int, float]:
    """The loss of each step as last reported; steps without an update have none."""
    return {event.step: event.loss for event in events_of(config.run_dir, Step) if math.isfinite(event.loss)}


def test_bad_steps_are_counted_until_the_run_goes_back_and_then_gives_up() -> None:
    state = FailureState()
    for step in range(3, 3 + MAX_IN_A_ROW):
        state, verdict = judge(state, BAD, step=step)
        assert verdict is Verdict.GO_ON and state.is_in_doubt
    state, verdict = judge(state, BAD, step=8)
    assert (verdict, state.first_in_row) == (Verdict.ROLL_BACK, 3)
    state = after_rollback(first=3, last=8)
    assert [step for step in range(12) if state.passes_over(step)] == [3, 4, 5, 6, 7, 8]
    for step in range(9, 9 + MAX_IN_A_ROW):
        state, verdict = judge(state, BAD, step=step)
    assert verdict is Verdict.GO_ON
    assert judge(state, BAD, step=20)[1] is Verdict.GIVE_UP


def test_a_good_step_forgets_the_bad_ones_before_it() -> None:
    state, _ = judge(FailureState(), BAD, step=0)
    state, verdict = judge(state, GOOD, step=1)
    assert verdict is Verdict.GO_ON and not state.is_in_doubt
    state, _ = judge(state, BAD, step=2)
    assert (state.num_in_row, state.first_in_row) == (1, 2)


def test_an_overflow_of_fp16_is_no_sign_of_divergence() -> None:
    state = FailureState()
    for step in range(20):
        state, verdict = judge(state, Outcome(is_applied=False, is_overflow=True), step=step)
        assert verdict is Verdict.GO_ON
    assert state == FailureState()


def test_spoilt_weights_are_not_trained_on() -> None:
    spoilt = Outcome(is_applied=True, is_spoilt=True)
    state, verdict = judge(FailureState(), spoilt, step=4)
    assert (verdict, state.first_in_row) == (Verdict.ROLL_BACK, 4)
    assert judge(after_rollback(first=4, last=4), spoilt, step=9)[1] is Verdict.GIVE_UP


@pytest.mark.parametrize("name", ["lomo", "adamw"])
def test_a_step_whose_loss_is_not_finite_is_skipped(make_run: MakeRun, bad_token: int, name: Any) -> None:
    config = make_run({2}, optimizer=OptimizerConfig(name=name, learning_rate=0.001), precision="bf16")
    with spoilt_token(bad_token):
        run_here(config)
    assert skipped(config) == [(3, "loss")]
    assert sorted(last_losses(config)) == [step for step in range(1, 25) if step != 3]
    assert all(message.level == "info" for message in events_of(config.run_dir, Message))
    assert weights_are_finite(load_model(finished(config).model_path, precision="fp32", device=torch.device("cpu")))


@pytest.mark.parametrize("name", ["lomo", "adalomo", "sgd", "adamw"])
def test_a_gradient_that_is_not_finite_is_skipped_with_the_global_norm(
    make_run: MakeRun, bad_token: int, name: Any
) -> None:
    config = make_run({2}, optimizer=OptimizerConfig(name=name, learning_rate=0.001), max_steps=4)
    with spoilt_token(bad_token, gradient_only=True):
        run_here(config)
    assert skipped(config) == [(3, "gradient")]
    assert weights_are_finite(load_model(finished(config).model_path, precision="fp32", device=torch.device("cpu")))


@pytest.mark.parametrize("mode", ["norm", "group"])
def test_an_overflow_in_fp16_halves_the_loss_scale(make_run: MakeRun, bad_token: int, mode: Any) -> None:
    rule = OptimizerConfig(learning_rate=0.01, clip=ClipConfig(mode=mode))
    config = make_run(set(range(2, 12)), optimizer=rule, precision="fp16")
    with spoilt_token(bad_token, gradient_only=True):
        run_here(config)
    found = events_of(config.run_dir, Skipped)
    # The first scale, 65536, is too large for these gradients as well.
    assert [(event.step, event.what) for event in found] == [(step, "overflow") for step in (1, *range(3, 13))]
    assert [event.loss_scale for event in found] == [2.0**power for power in range(15, 4, -1)]
    assert not events_of(config.run_dir, RolledBack)
    assert finished(config).step == NUM_STEPS


def test_the_first_suspect() -> None:
    state = FailureState(num_in_row=6, first_in_row=10)
    found = [
        first_suspect(state, last=15, is_culprit_known=known, weights_are_finite=finite)
        for known, finite in ((False, True), (False, False), (True, False))
    ]
    assert found == [4, 9, 15]
    early = FailureState(num_in_row=6, first_in_row=0)
    assert first_suspect(early, last=5, is_culprit_known=False, weights_are_finite=False) == 0


def test_the_run_goes_back_once_and_past_the_data_that_broke_it(make_run: MakeRun, bad_token: int) -> None:
    config = make_run(BAD_STEPS)
    with spoilt_token(bad_token):
        run_here(config)
    assert events_of(config.run_dir, RolledBack) == [
        RolledBack(step=4, first_skipped=5, last_skipped=16, checkpoint="step-4")
    ]
    window = [(step, "window") for step in range(5, 17)]
    assert skipped(config) == [*((step, "loss") for step in range(11, 17)), *window]
    # None was written while the weights were in doubt.
    assert [event.step for event in events_of(config.run_dir, Checkpoint)] == [4, 8, 8, 12, 16, 20, 24]
    assert finished(config).step == NUM_STEPS
    # The run is the one over the other batches: nothing of the bad ones, or of what led to them, is left in it.
    losses = [event.loss for event in events_of(config.run_dir, Step) if event.step > 16]
    assert losses == [last_losses(config)[step] for step in range(17, 25)]


@pytest.mark.parametrize("keep", ["no checkpoint", "step-2", "step-4"])
def test_from_where_the_run_comes_back_does_not_matter(make_run: MakeRun, bad_token: int, keep: str) -> None:
    usual = make_run(BAD_STEPS, run="usual")
    every = {"no checkpoint": 0, "step-2": 2, "step-4": 4}[keep]
    other = make_run(BAD_STEPS, run="other", checkpoint_every_steps=every, keep_checkpoints=9)
    weights = Path(other.run_dir) / "checkpoints" / "step-4" / "model.safetensors"

    def damage() -> None:
        """Change the checkpoint of step 4 once it stands and the run is past it."""
        if keep == "step-2" and len(events_of(other.run_dir, Step)) == 6:
            weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))

    with spoilt_token(bad_token):
        run_here(usual)
        run_here(other, stop=StopWhen(damage))
    (back,) = events_of(other.run_dir, RolledBack)
    assert (back.checkpoint or "no checkpoint") == keep
    assert last_losses(other) == last_losses(usual)
    assert finished(other).weights_sha256 == finished(usual).weights_sha256
    warned = [event.message for event in events_of(other.run_dir, Message) if event.level == "warn"]
    assert ["step-4 is not used" in text for text in warned] == ([True] if keep == "step-2" else [])


def test_what_comes_after_the_rollback_ends_the_run(make_run: MakeRun, bad_token: int) -> None:
    config = make_run(set(range(10, 24)))
    with spoilt_token(bad_token), pytest.raises(DivergedError, match="not finite at step 22"):
        run_here(config)
    assert len(events_of(config.run_dir, RolledBack)) == 1
    assert not events_of(config.run_dir, Finished)


def test_a_rate_far_too_high_ends_as_diverged(make_run: MakeRun) -> None:
    config = make_run(set(), optimizer=OptimizerConfig(learning_rate=1e25))
    with pytest.raises(DivergedError, match="a lower learning_rate"):
        run_here(config)


@pytest.mark.parametrize("mode", ["group", "value", "none"])
def test_weights_that_took_a_bad_gradient_are_given_up(make_run: MakeRun, bad_token: int, mode: Any) -> None:
    """With `group` the norms say so at once; without a norm the next losses do, and the step before them is the one."""
    config = make_run({6}, optimizer=OptimizerConfig(learning_rate=0.01, clip=ClipConfig(mode=mode)))
    with spoilt_token(bad_token, gradient_only=True):
        run_here(config)
    (back,) = events_of(config.run_dir, RolledBack)
    assert (back.step, back.first_skipped, back.checkpoint) == (4, 7, "step-4")
    assert back.last_skipped == (7 if mode == "group" else 13)
    assert sorted(last_losses(config))[-1] == NUM_STEPS
    assert weights_are_finite(load_model(finished(config).model_path, precision="fp32", device=torch.device("cpu")))


@pytest.mark.parametrize("num_lines", [3, 13, 20, 30], ids=lambda n: f"after {n} steps and skips")
def test_an_interruption_changes_nothing_of_it(make_run: MakeRun, bad_token: int, num_lines: int) -> None:
    """In front of the bad window, in it, after the rollback while it is passed over, and behind it."""
    straight, stopped = make_run(BAD_STEPS, run="straight"), make_run(BAD_STEPS, run="stopped")

    def num_written() -> int:
        rows = {event.step for event in events_of(stopped.run_dir, Step)}
        return len(rows) + sum(what == "window" for _, what in skipped(stopped))

    with spoilt_token(bad_token):
        run_here(straight)
        with pytest.raises(InterruptedRunError):
            run_here(stopped, stop=StopWhen(lambda: num_written() >= num_lines))
        newest = sorted((Path(stopped.run_dir) / "checkpoints").iterdir(), key=lambda path: -int(path.name[5:]))
        resumed = dataclasses.replace(
            stopped, run_dir=str(tmp_run(stopped, "resumed")), resume_from=tuple(map(str, newest))
        )
        run_here(resumed)
    assert events_of(resumed.run_dir, Started)[0].step > 0
    assert finished(resumed).weights_sha256 == finished(straight).weights_sha256
    expected = last_losses(straight)
    assert all(expected[step] == loss for step, loss in last_losses(resumed).items())


def tmp_run(config: TrainConfig, name: str) -> Path:
    return Path(config.run_dir).with_name(name)
