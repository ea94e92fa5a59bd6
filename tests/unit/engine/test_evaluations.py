"""What follows from evaluations: samples, the best model, an early end; all of it the same in a resumed run."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_core.config import ClipConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from lomo_core.errors import InterruptedRunError
from lomo_core.events import Checkpoint, Evaluation, Finished, Message, Sample, Started, Step
from lomo_core.model import load_model, weights_sha256
from lomo_core.progress import Progress
from lomo_core.tokenizer import load_tokenizer
from tests.support.engine_runs import MakeConfig, StopWhen, events_of, run_here

CPU = torch.device("cpu")
# A rate at which the validation loss of the tiny model goes up and down.
OVERSHOOTING: dict[str, Any] = {
    "optimizer": OptimizerConfig(learning_rate=3.0, clip=ClipConfig(mode="group")),
    "schedule": ScheduleConfig(name="constant", warmup_ratio=0.0),
    "validation": "valid.jsonl",
    "eval_every_steps": 1,
    "n_epochs": 3,
}


def finished(config: TrainConfig) -> Finished:
    (event,) = events_of(config.run_dir, Finished)
    return event


def evaluated(config: TrainConfig) -> dict[int, float]:
    found = {event.step: event.valid_loss for event in events_of(config.run_dir, Evaluation)}
    return {step: loss for step, loss in found.items() if loss is not None}


def sha256_of(folder: str | Path) -> str:
    return weights_sha256(load_model(folder, precision="fp32", device=CPU))


def newest(config: TrainConfig) -> tuple[str, ...]:
    folders = (Path(config.run_dir) / "checkpoints").iterdir()
    return tuple(str(path) for path in sorted(folders, key=lambda path: -int(path.name.removeprefix("step-"))))


def evaluation(step: int, **fields: Any) -> Evaluation:
    return Evaluation(step=step, num_rows=1, **fields)


def test_lower_loss_and_higher_accuracy_are_better() -> None:
    progress = Progress()
    for step, loss in ((0, 0.1), (1, 2.0), (2, 1.5), (3, math.nan), (4, 1.6)):
        progress = progress.after(evaluation(step, valid_loss=loss))
    assert (progress.best_step, progress.best_score, progress.num_since_best) == (2, -1.5, 2)
    assert progress.has_stalled(2) and not progress.has_stalled(3) and not progress.has_stalled(None)
    accurate = Progress().after(evaluation(1, choice_accuracy=0.5)).after(evaluation(2, choice_accuracy=0.6))
    assert (accurate.best_step, accurate.num_since_best) == (2, 0)
    assert accurate.after(evaluation(3, choice_accuracy=0.6)).best_step == 2


def test_the_best_model_is_kept_and_may_be_the_final_one(make_config: MakeConfig) -> None:
    config = make_config(**OVERSHOOTING, keep_best=True, final_model="best")
    run_here(config)
    losses = evaluated(config)
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert 0 < best < max(losses), losses
    end = finished(config)
    assert (end.step, end.model_step, end.best_step) == (12, best, best)
    assert end.best_model_path == str(Path(config.run_dir) / "best" / f"step-{best}")
    assert end.weights_sha256 == sha256_of(end.model_path) == sha256_of(end.best_model_path)
    assert events_of(config.run_dir, Checkpoint)[-1].best_step == best
    kept = {path.name for path in (Path(config.run_dir) / "best").iterdir()}
    named = {f"step-{event.best_step}" for event in events_of(config.run_dir, Checkpoint)[-2:]}
    assert kept == named | {f"step-{best}"}


def test_the_last_model_is_the_final_one_by_default(make_config: MakeConfig) -> None:
    config = make_config(**OVERSHOOTING, keep_best=True)
    run_here(config)
    end = finished(config)
    assert end.model_step == 12 and end.best_step != 12
    assert end.weights_sha256 == sha256_of(end.model_path) != sha256_of(str(end.best_model_path))


def test_a_run_that_gets_no_better_ends_early(make_config: MakeConfig) -> None:
    config = make_config(**OVERSHOOTING, early_stopping_patience=2)
    run_here(config)
    losses = evaluated(config)
    last = finished(config).step
    assert last == max(losses) < 12
    so_far = [losses[step] for step in range(1, last + 1)]
    assert min(so_far[:-2]) <= min(so_far[-2:])
    assert all(min(so_far[: end - 2]) > min(so_far[end - 2 : end]) for end in range(3, last))
    assert any("stopped early at step" in event.message for event in events_of(config.run_dir, Message))


@pytest.mark.parametrize("validation", ["valid.jsonl", "choices.jsonl"])
@pytest.mark.parametrize("num_steps", [3, 5])
def test_resuming_goes_on_with_the_best_and_stops_at_the_same_step(
    make_config: MakeConfig, validation: str, num_steps: int
) -> None:
    fields = {
        **OVERSHOOTING,
        "validation": validation,
        "keep_best": True,
        "final_model": "best",
        "early_stopping_patience": 4,
        "sample_prompts": ("what goes with sun?",),
        "sample_max_new_tokens": 4,
    }
    straight, stopped = make_config(run="straight", **fields), make_config(run="stopped", **fields)
    run_here(straight)
    with pytest.raises(InterruptedRunError):
        run_here(stopped, stop=StopWhen(lambda: len(events_of(stopped.run_dir, Step)) == num_steps))
    resumed = make_config(run="resumed", **fields, resume_from=newest(stopped))
    run_here(resumed)
    assert events_of(resumed.run_dir, Started)[0].step == num_steps
    ends = [
        dataclasses.replace(finished(config), model_path="", best_model_path="", seconds=0, peak_bytes=0)
        for config in (straight, resumed)
    ]
    assert ends[0] == ends[1]
    assert sha256_of(finished(resumed).model_path) == finished(straight).weights_sha256
    assert ends[0].step < 12
    assert evaluated(resumed) == {step: loss for step, loss in evaluated(straight).items() if step >= num_steps}
    expected = [event for event in events_of(straight.run_dir, Sample) if event.step >= num_steps]
    assert events_of(resumed.run_dir, Sample) == expected and expected


def test_an_evaluation_that_was_cut_short_is_made_anew(make_config: MakeConfig) -> None:
    fields: dict[str, Any] = {"validation": "valid.jsonl", "eval_every_steps": 3}
    straight, stopped = make_config(run="straight", **fields), make_config(run="stopped", **fields)
    run_here(straight)
    looks = iter(range(3))

    def is_in_evaluation() -> bool:
        """At the first look after step 3: in front of its evaluation's first batch."""
        return len(events_of(stopped.run_dir, Step)) == 3 and next(looks) == 0

    with pytest.raises(InterruptedRunError, match="step 3"):
        run_here(stopped, stop=StopWhen(is_in_evaluation))
    assert 3 not in evaluated(stopped)
    resumed = make_config(run="resumed", **fields, resume_from=newest(stopped))
    run_here(resumed)
    assert evaluated(resumed) == {step: loss for step, loss in evaluated(straight).items() if step >= 3}


def test_a_best_model_that_is_damaged_is_chosen_anew(make_config: MakeConfig) -> None:
    fields = {**OVERSHOOTING, "keep_best": True, "final_model": "best"}
    stopped = make_config(run="stopped", **fields)
    with pytest.raises(InterruptedRunError):
        run_here(stopped, stop=StopWhen(lambda: len(events_of(stopped.run_dir, Step)) == 6))
    shutil.rmtree(Path(stopped.run_dir) / "best")
    resumed = make_config(run="resumed", **fields, resume_from=newest(stopped))
    run_here(resumed)
    assert any("the best model so far" in event.message for event in events_of(resumed.run_dir, Message))
    losses = evaluated(resumed)
    assert finished(resumed).best_step == min(losses, key=losses.__getitem__)
    assert sha256_of(finished(resumed).model_path) == finished(resumed).weights_sha256


def test_samples_are_the_models_own_greedy_answers(make_config: MakeConfig) -> None:
    prompts = ("what goes with sun?", "what goes with moon?")
    config = make_config(sample_prompts=prompts, sample_max_new_tokens=5, eval_every_steps=4)
    run_here(config)
    samples = events_of(config.run_dir, Sample)
    assert [(event.step, event.prompt) for event in samples] == [(step, text) for step in (0, 4, 8) for text in prompts]
    model: Any = load_model(finished(config).model_path, precision="fp32", device=CPU)
    tokenizer = load_tokenizer(finished(config).model_path)
    for sample in samples[-2:]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": sample.prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False).input_ids
        answer: list[int] = []
        with torch.no_grad():
            while len(answer) < 5 and (not answer or answer[-1] != tokenizer.eos_token_id):
                answer.append(int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
        assert sample.text == tokenizer.decode(answer, skip_special_tokens=True)
        assert sample.num_tokens == len(answer)


def test_sampling_changes_nothing_of_the_run(make_config: MakeConfig) -> None:
    plain, sampled = make_config(run="a"), make_config(run="b", sample_prompts=("hello",), eval_every_steps=2)
    run_here(plain)
    run_here(sampled)
    assert finished(plain).weights_sha256 == finished(sampled).weights_sha256
