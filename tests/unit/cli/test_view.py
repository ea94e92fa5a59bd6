"""What a followed job looks like: figures, the memory bar, lines of a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cli.output import format_age, format_bytes, format_number, format_seconds, printable
from cli.view import CATEGORIES, MemoryBar, PlainView, Progress, event_line, share_out
from tests.support.scripted_server import make_event, make_step


@pytest.mark.parametrize("width", [1, 7, 80, 120])
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [256, 54, 1, 300, 700], [0, 0, 0, 0, 9], [1, 0, 0, 0, 10**9]])
def test_shares_fill_the_width_exactly(sizes: list[int], width: int) -> None:
    shares = share_out(sizes, width)
    assert sum(shares) == width
    for size, share in zip(sizes, shares, strict=True):
        assert abs(share - size * width / sum(sizes)) < 1


def test_nothing_has_no_bar() -> None:
    assert share_out([0, 0, 0, 0, 0], 80) == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(("width", "legend_lines"), [(80, 2), (120, 1), (40, 5)])
def test_the_memory_bar_fits_and_names_its_categories_in_order(width: int, legend_lines: int) -> None:
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(MemoryBar(make_step(1, 1)["data"]["memory"]))
    bar, *legend = capture.get().splitlines()
    assert len(bar) == width
    assert [bar.count(category.glyph) for category in CATEGORIES] == share_out([256, 54, 1, 300, 700], width)
    assert len(legend) == legend_lines
    text = "  ".join(legend)
    assert [text.index(category.name) for category in CATEGORIES] == sorted(
        text.index(category.name) for category in CATEGORIES
    )
    assert "Optimizer state 1.0 MiB" in text


def test_a_terminal_without_unicode_gets_ascii() -> None:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80, legacy_windows=False)
    with console.capture() as capture:
        console.print(MemoryBar(make_step(1, 1)["data"]["memory"]))
    assert capture.get().isascii()


def test_progress_lines_come_every_two_seconds_and_before_messages() -> None:
    now, lines = 0.0, []
    with PlainView(lines.append, clock=lambda: now) as view:
        for step in range(1, 51):
            view.show(make_step(step, step, 100))
            now += 0.5
        view.show(make_event(60, "Checkpoint created at step 50"))
        view.show(make_step(61, 51, 100))
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines if line.startswith("step")]
    assert steps == [1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 50, 51]
    assert lines[-2].endswith("Checkpoint created at step 50")


def test_an_evaluation_is_a_message_and_not_a_step() -> None:
    progress = Progress()
    evaluation = make_event(1, "Evaluation at step 0", data={"step": 0, "num_rows": 9, "choice_accuracy": 0.3})
    assert not progress.take({**evaluation, "type": "metrics"})
    assert progress.take(make_step(2, 1))


def test_time_left_follows_the_duration_of_steps() -> None:
    progress = Progress()
    assert progress.eta_s is None
    progress.take(make_step(1, 1, 11, step_s=2.0))
    assert progress.eta_s == pytest.approx(20.0)
    for step in range(2, 60):
        progress.take(make_step(step, step, 100, step_s=1.0))
    assert progress.eta_s == pytest.approx(41, rel=0.05)


def test_a_step_without_figures_is_shown_all_the_same() -> None:
    progress = Progress()
    progress.take(make_step(1, 1, loss=None, tokens_per_s=None, memory=None))
    assert progress.figures == "loss -"


def test_text_of_others_cannot_drive_the_terminal() -> None:
    line = event_line(make_event(1, "\x1b[2Jgone\r\x07 [bold]kept[/bold]", level="error"))
    assert "\x1b" not in line
    assert "\x07" not in line
    assert line.endswith("[bold]kept[/bold]")
    assert printable("a\nb\u00e4\u4e2d") == "a\nb\u00e4\u4e2d"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0, "0s"),
        (-3, "0s"),
        (59.4, "59s"),
        (60, "1m00s"),
        (73, "1m13s"),
        (3600, "1h00m"),
        (90000, "1d01h"),
    ],
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (3 << 40, "3072.0 GiB")],
)
def test_bytes(num_bytes: int | None, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_numbers_and_ages() -> None:
    assert (format_number(None), format_number(0.0123456), format_number(3)) == ("-", "0.01235", "3")
    assert format_age(0).endswith("d ago")
    assert format_age(4_000_000_000) == "0s ago"
