"""What a run looks like in a terminal."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from lomo_core.events import (
    Checkpoint,
    Evaluation,
    Event,
    Failed,
    Finished,
    MemoryBytes,
    MemoryVerdict,
    Message,
    RolledBack,
    Sample,
    Skipped,
    Started,
    Step,
)
from lomo_core.terminal import shown_in_terminal

MEMORY = MemoryBytes(
    parameters_bytes=1, gradients_bytes=1, optimizer_bytes=0, activations_bytes=1, other_bytes=1, peak_bytes=3 * 2**20
)


def step(number: int, loss: float) -> Step:
    return Step(
        step=number,
        total_steps=20,
        epoch=0.5,
        loss=loss,
        mean_token_accuracy=None,
        learning_rate=0.01,
        grad_norm=None if math.isnan(loss) else 1.25,
        num_tokens=10,
        num_trained_tokens=10,
        step_s=0.5,
        tokens_per_s=20.0,
        memory=MEMORY,
    )


def shown(*events: Event) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None)
    with shown_in_terminal(console) as view:
        for event in events:
            view.show(event)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_bar_follows_the_steps() -> None:
    started = Started(
        step=4,
        total_steps=20,
        num_parameters=1,
        num_train_rows=1,
        num_truncated_rows=0,
        num_trainable_tokens=1,
        device="cpu",
        device_bytes=None,
    )
    text = shown(started, step(5, 2.5), step(6, math.nan))
    assert "6/20" in text
    assert "loss nan, 20 tokens/s, peak 3 MiB" in text


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Message(level="info", message="loading [red]x[/red]"), "loading [red]x[/red]"),
        (Message(level="warn", message="slow"), "warn: slow"),
        (Evaluation(step=3, num_rows=7, valid_loss=1.5, seconds=2.0), "step 3: validation loss 1.5000 (7 rows, 2 s)"),
        (Evaluation(step=3, num_rows=7, choice_accuracy=0.25), "step 3: accuracy 0.250 (7 rows, 0 s)"),
        (Skipped(step=4, what="gradient", loss_scale=None), "step 4 was skipped (gradient)"),
        (
            RolledBack(step=2, first_skipped=4, last_skipped=6, checkpoint=None),
            "went back to step 2; steps 4 to 6 are left out",
        ),
        (Sample(step=3, prompt="a", text="b\x1b[31m", num_tokens=1), "step 3, sample: 'a' -> 'b\\x1b[31m'"),
        (
            Checkpoint(step=3, path="/r/step-3", manifest_sha256="", num_bytes=1, train_loss=None),
            "step 3: checkpoint /r/step-3",
        ),
        (
            MemoryVerdict(step=7, planned=replace(MEMORY, peak_bytes=2 << 20), measured=MEMORY, ratio=2 / 3),
            "memory: 2 MiB were planned, 3 measured (step 7)",
        ),
    ],
)
def test_events_that_are_worth_a_line_get_one_as_plain_text(event: Event, line: str) -> None:
    assert line in [found.removeprefix("\x1b[2K").strip() for found in shown(event).splitlines()]


def test_the_end_is_said_and_a_failure_is_left_to_the_error_itself() -> None:
    end = Finished(
        step=9, model_path="/m", weights_sha256="", num_trained_tokens=1, peak_bytes=1, seconds=61.4, model_step=9
    )
    assert "step 9: the model is in /m (61 s)" in shown(end)
    assert "broken" not in shown(Failed(code="diverged", message="broken"))
