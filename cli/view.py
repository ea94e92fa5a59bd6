"""How a followed job looks: lines for a log, or in a terminal messages above a panel that is redrawn in place.

Names, order and colours of the memory categories are those of the dashboard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.output import format_bytes, format_seconds, printable

Json = dict[str, Any]

_PROGRESS_EVERY_S = 2.0  # a log of an hour then has 1800 lines at most
_REDRAWS_PER_S = 4
_LEVEL_STYLES = {"warn": "yellow", "error": "bold red"}
# Weight of the newest step in the mean duration of a step: half of it comes from the last 7 steps.
_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class Category:
    """A kind of memory."""

    key: str
    name: str
    colour: str
    glyph: str
    """Tells it apart where there is no colour."""


CATEGORIES = (
    Category("parameters_bytes", "Parameters", "#3d97d3", "█"),
    Category("gradients_bytes", "Gradients", "#f0b429", "▓"),
    Category("optimizer_bytes", "Optimizer state", "#b5649a", "#"),
    Category("activations_bytes", "Activations", "#2fb88d", "▒"),
    Category("other_bytes", "Other", "#7a838f", "░"),
)
_ASCII_GLYPHS = "PGOAx"


class View(Protocol):
    """Where the events of a job are shown; a context manager from the first to the last."""

    def __enter__(self) -> View:
        """Begin."""
        ...

    def __exit__(self, *exception: object) -> None:
        """Leave the screen in order."""
        ...

    def show(self, event: Json) -> None:
        """Take an event of the job."""
        ...

    def note(self, text: str) -> None:
        """Say something that is not an event of the job."""
        ...


class Progress:
    """The latest figures of a job, as its events come in."""

    def __init__(self) -> None:
        self.status = "queued"
        self.step = 0
        self.total_steps = 0
        self.loss: float | None = None
        self.tokens_per_s: float | None = None
        self.memory: Json = {}
        self.device_bytes: int | None = None
        self._step_s: float | None = None

    def take(self, event: Json) -> bool:
        """Learn from an event. Returns whether it was a step, which is shown as progress and not as a message."""
        data = event.get("data") or {}
        if status := data.get("status"):
            self.status = str(status)
        if data.get("total_steps") is not None:
            self.step, self.total_steps = data["step"], data["total_steps"]
        if data.get("device_bytes") is not None:
            self.device_bytes = data["device_bytes"]
        if not is_step(event):
            return False
        self.loss, self.tokens_per_s = data.get("loss"), data.get("tokens_per_s")
        self.memory = data.get("memory") or {}
        if (step_s := data.get("step_s")) is not None:
            self._step_s = step_s if self._step_s is None else self._step_s + _SMOOTHING * (step_s - self._step_s)
        return True

    @property
    def eta_s(self) -> float | None:
        """Seconds left, at the speed of the last steps."""
        return None if self._step_s is None else self._step_s * (self.total_steps - self.step)

    @property
    def figures(self) -> str:
        """Loss, speed and memory in one line."""
        parts = ["loss -" if self.loss is None else f"loss {self.loss:.3f}"]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if peak := self.memory.get("peak_bytes"):
            of = f" of {format_bytes(self.device_bytes)}" if self.device_bytes else ""
            parts.append(f"peak {format_bytes(peak)}{of}")
        return "  ".join(parts)


class PlainView:
    """A line per message, and one per step or two seconds, whichever is rarer: for logs and pipes."""

    def __init__(self, write: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._progress = Progress()
        self._written_at = -_PROGRESS_EVERY_S
        self._pending = False

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *exception: object) -> None:
        self._flush()

    def show(self, event: Json) -> None:
        """Write a message at once, progress if it is time."""
        if not self._progress.take(event):
            self._flush()  # what a message is about lies before it
            self._write(event_line(event))
            return
        self._pending = True
        if self._clock() - self._written_at >= _PROGRESS_EVERY_S:
            self._flush()

    def note(self, text: str) -> None:
        """Write a line."""
        self._write(printable(text))

    def _flush(self) -> None:
        if not self._pending:
            return
        self._pending, self._written_at = False, self._clock()
        now = self._progress
        left = f"  {format_seconds(now.eta_s)} left" if now.step < now.total_steps else ""
        self._write(f"step {now.step}/{now.total_steps}  {now.figures}{left}")


class LiveView:
    """A panel at the bottom of the terminal: bar, figures and memory by category; messages scroll above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress()
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=_REDRAWS_PER_S, redirect_stdout=False
        )

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def show(self, event: Json) -> None:
        """Print a message, or let the panel show the step at its next redraw."""
        if not self._progress.take(event):
            self._console.print(Text(event_line(event), style=_LEVEL_STYLES.get(event["level"], "")))

    def note(self, text: str) -> None:
        """Print a line above the panel."""
        self._console.print(Text(printable(text), style="yellow"))

    def _render(self) -> RenderableType:
        now = self._progress
        if not now.total_steps:
            return Text(f"{now.status} ...", style="cyan")
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        left = f"{format_seconds(now.eta_s)} left" if now.step < now.total_steps else "done"
        bar.add_row(
            f"step {now.step}/{now.total_steps}",
            ProgressBar(total=now.total_steps, completed=now.step),
            f"{100 * now.step // now.total_steps:3d}%  {left}",
        )
        lines: list[RenderableType] = [bar]
        if now.memory:
            lines += [Text(now.figures), MemoryBar(now.memory)]
        return Group(*lines)


class MemoryBar:
    """The categories of memory side by side, as wide as the terminal, and a legend below that wraps between names."""

    def __init__(self, memory: Json) -> None:
        self._memory = memory

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        sizes = [max(0, self._memory.get(category.key) or 0) for category in CATEGORIES]
        styles = [category.colour for category in CATEGORIES]
        if options.ascii_only:
            glyphs = list(_ASCII_GLYPHS)
        elif console.no_color or console.color_system is None:
            glyphs = [category.glyph for category in CATEGORIES]
        else:
            glyphs = ["█"] * len(CATEGORIES)
        bar = Text(no_wrap=True)
        for glyph, style, width in zip(glyphs, styles, share_out(sizes, options.max_width), strict=True):
            bar.append(glyph * width, style=style)
        yield bar
        entries = [
            Text.assemble((glyph, style), f" {category.name} {format_bytes(size)}")
            for category, glyph, style, size in zip(CATEGORIES, glyphs, styles, sizes, strict=True)
        ]
        yield from _wrap(entries, options.max_width)


def share_out(sizes: list[int], width: int) -> list[int]:
    """Divide `width` characters in proportion to `sizes`, exactly: the largest remainders get what is left over."""
    total = sum(sizes)
    if not total:
        return [0] * len(sizes)
    exact = [size * width / total for size in sizes]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: width - sum(shares)]:
        shares[index] += 1
    return shares


def is_step(event: Json) -> bool:
    """Whether an event is one update of the weights (an evaluation is of the same type)."""
    return event.get("type") == "metrics" and "step_s" in (event.get("data") or {})


def event_line(event: Json) -> str:
    """An event as one line of a log."""
    when = datetime.fromtimestamp(event["created_at"]).astimezone()
    level = {"warn": "warning: ", "error": "error: "}.get(event["level"], "")
    return f"{when:%H:%M:%S}  {level}{printable(event['message'])}"


def _wrap(entries: list[Text], width: int) -> Iterator[Text]:
    """Join entries by two spaces into lines of at most `width`."""
    line = Text()
    for entry in entries:
        if line and len(line) + 2 + len(entry) > width:
            yield line
            line = Text()
        line.append("  " if line else "").append_text(entry)
    yield line
