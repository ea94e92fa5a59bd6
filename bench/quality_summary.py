"""What the runs of `bench_quality.py` show. Pure; torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from bench.harness import table

Row = dict[str, Any]

STOCHASTIC, NEAREST, ADAMW = "lomo bf16 stochastic", "lomo bf16 nearest", "adamw fp32"
# How far LOMO in bf16 may be behind AdamW in fp32, as a share of the rows.
MARGIN = 0.02
_STEPS_PER_POINT = 10


def summary(rows: list[Row]) -> str:
    """Tables for people: every run, the loss on the way, then the claims with their figures."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    parts = [table([_HEAD, *(_line(row) for row in rows)]), table(curves(rows))] if rows else []
    return "\n\n".join([*parts, *(claim for task in tasks for claim in claims(rows, task))]) + "\n"


def best(rows: list[Row], task: str, arm: str) -> Row | None:
    """The run of the rate that is best on the half for choosing; of equals the one with the lower last loss."""
    found = [row for row in rows if row["task"] == task and row["arm"] == arm]
    return max(found, key=lambda row: (row["choosing_accuracy"], -_curve(row)[-1]), default=None)


def overall(row: Row) -> tuple[float, int]:
    """Accuracy on all held-back rows, and their number."""
    sizes = row["num_choosing"], row["num_reporting"]
    right = row["choosing_accuracy"] * sizes[0] + row["reporting_accuracy"] * sizes[1]
    return right / sum(sizes), sum(sizes)


def standard_error(accuracy: float, num_rows: int) -> float:
    """Of a share of independent rows: sqrt(p (1 - p) / n)."""
    return math.sqrt(accuracy * (1 - accuracy) / num_rows)


def claims(rows: list[Row], task: str) -> list[str]:
    """The two claims, on the half for reporting and on all held-back rows."""
    chosen = {arm: best(rows, task, arm) for arm in (STOCHASTIC, NEAREST, ADAMW)}
    lines = []
    for other, margin, text in (
        (ADAMW, MARGIN, f"{STOCHASTIC} within {MARGIN * 100:.0f} points of {ADAMW}"),
        (NEAREST, 0.0, f"{STOCHASTIC} ahead of {NEAREST}"),
    ):
        ours, theirs = chosen[STOCHASTIC], chosen[other]
        if ours is None or theirs is None:
            continue
        for where, (mine, size), (its, _) in (
            ("other half", _reported(ours), _reported(theirs)),
            ("all held-back rows", overall(ours), overall(theirs)),
        ):
            is_met = mine >= its - margin if margin else mine > its
            # The rows are the same, but which of them each model got is not known here: an upper bound.
            error = math.hypot(standard_error(mine, size), standard_error(its, size))
            verdict = "met" if is_met else "MISSED"
            lines.append(
                f"{verdict}: {task}, {where}: {text}: {mine * 100:.1f} (rate {ours['learning_rate']:g}) against "
                f"{its * 100:.1f} (rate {theirs['learning_rate']:g}), {(mine - its) * 100:+.1f} points "
                f"(standard error at most {error * 100:.1f})"
            )
    return ["\n".join(lines)] if lines else []


def curves(rows: list[Row]) -> list[list[str]]:
    """Mean training loss of each 10 steps, a line per run."""
    length = max(len(_curve(row)) for row in rows)
    head = ["loss at step", *(str((place + 1) * _STEPS_PER_POINT) for place in range(length))]
    lines = [[_name(row), *(f"{loss:.3f}" for loss in _curve(row))] for row in rows]
    return [head, *(line + [""] * (length + 1 - len(line)) for line in lines)]


_HEAD = ["run", "choosing", "reporting", "all", "standard error", "seconds"]


def _line(row: Row) -> list[str]:
    accuracy, size = overall(row)
    shares = (row["choosing_accuracy"], row["reporting_accuracy"], accuracy, standard_error(accuracy, size))
    return [_name(row), *(f"{share * 100:.1f}" for share in shares), f"{row['train_s']:.0f}"]


def _name(row: Row) -> str:
    return f"{row['task']} {row['arm']} {row['learning_rate']:g}"


def _reported(row: Row) -> tuple[float, int]:
    return row["reporting_accuracy"], row["num_reporting"]


def _curve(row: Row) -> list[float]:
    losses = [math.nan if loss is None else float(loss) for loss in row["losses"]]
    return [_mean(losses[first : first + _STEPS_PER_POINT]) for first in range(0, len(losses), _STEPS_PER_POINT)]


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
