"""A run as somebody sees it who starts it by hand in a terminal: a bar with the time left, and a line for each event
that is worth one. Elsewhere the journal is the output. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lomo_core.events import (
    Checkpoint,
    Evaluation,
    Event,
    Finished,
    MemoryVerdict,
    Message,
    RolledBack,
    Sample,
    Skipped,
    Started,
    Step,
)


class RunView:
    """Shows a run's events as they are written."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)

    def show(self, event: Event) -> None:
        """Move the bar, and print what a reader would want to keep."""
        if isinstance(event, Started):
            self._progress.update(self._task, total=event.total_steps, completed=event.step, description="training")
        elif isinstance(event, Step):
            norm = "" if event.grad_norm is None else f", norm {event.grad_norm:.3g}"
            text = f"loss {event.loss:.4f}{norm}, {event.tokens_per_s:.0f} tokens/s"
            peak = f"peak {event.memory.peak_bytes / 2**20:.0f} MiB"
            self._progress.update(self._task, completed=event.step, description=f"{text}, {peak}")
        elif line := _line(event):
            self._progress.console.print(escape(line), highlight=False)


@contextmanager
def shown_in_terminal(console: Console) -> Iterator[RunView]:
    """A view for the time of a run."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield RunView(progress)


def _line(event: Event) -> str | None:
    """One line for an event of which there are few; None for the others."""
    line: str | None = None
    match event:
        case Message():
            line = event.message if event.level == "info" else f"{event.level}: {event.message}"
        case Evaluation():
            line = _evaluation(event)
        case Checkpoint():
            line = f"step {event.step}: checkpoint {event.path}"
        case Skipped():
            line = f"step {event.step} was skipped ({event.what})"
        case RolledBack():
            line = f"went back to step {event.step}; steps {event.first_skipped} to {event.last_skipped} are left out"
        case Sample():
            line = f"step {event.step}, sample: {event.prompt!r} -> {event.text!r}"
        case MemoryVerdict():
            planned, measured = event.planned.peak_bytes / 2**20, event.measured.peak_bytes / 2**20
            line = f"memory: {planned:.0f} MiB were planned, {measured:.0f} measured (step {event.step})"
        case Finished():
            line = f"step {event.step}: the model is in {event.model_path} ({event.seconds:.0f} s)"
    return line


def _evaluation(event: Evaluation) -> str:
    found = []
    if event.valid_loss is not None:
        found.append(f"validation loss {event.valid_loss:.4f}")
    if event.valid_mean_token_accuracy is not None:
        found.append(f"token accuracy {event.valid_mean_token_accuracy:.3f}")
    if event.choice_accuracy is not None:
        found.append(f"accuracy {event.choice_accuracy:.3f}")
    return f"step {event.step}: {', '.join(found)} ({event.num_rows} rows, {event.seconds:.0f} s)"
