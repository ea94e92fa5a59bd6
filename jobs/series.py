"""A run's figures as series that can be drawn: written as spans while the run goes on, read in any window.

A chart shows some hundred points, of a run of any length, and must not read a million rows for it. So each 16 steps,
once complete, are also kept as one row of `metric_spans`, 16 of those as another, and so on; a chart reads the longest
spans that are no longer than a point of it, and single steps where a span would reach over an end of the window. A
span keeps what its last step said, and extremes, so that a spike survives. A step that is repeated after a resume goes
through its span's end again, which makes the span again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from jobs.db import Database
from jobs.models import Job

SPANS = (16, 256, 4096)
"""Steps of a span by level. A window of n points reads at most 16 n rows, and single steps at its ends."""

_COLUMNS = """
    step, attempt, created_at, epoch, loss, loss_min, loss_max, mean_token_accuracy, learning_rate, grad_norm,
    tokens_per_s, step_s, parameters_bytes, gradients_bytes, optimizer_bytes, activations_bytes, other_bytes, peak_bytes
"""
# A single step as a span of one.
_STEPS = """
    SELECT step, attempt, created_at, epoch, loss, loss AS loss_min, loss AS loss_max, mean_token_accuracy,
        learning_rate, grad_norm, tokens_per_s, step_s, parameters_bytes, gradients_bytes, optimizer_bytes,
        activations_bytes, other_bytes, peak_bytes
    FROM metrics
"""
# Of rows in groups: the last one's values, the extremes of the loss, the maximum of memory and of the gradient's norm.
_LAST_OF_EACH = """
    SELECT DISTINCT ON (bucket)
        bucket, step, attempt, created_at, epoch, loss,
        min(loss_min) OVER w AS loss_min, max(loss_max) OVER w AS loss_max,
        mean_token_accuracy, learning_rate, max(grad_norm) OVER w AS grad_norm,
        avg(tokens_per_s) OVER w AS tokens_per_s, step_s,
        parameters_bytes, max(gradients_bytes) OVER w AS gradients_bytes, optimizer_bytes,
        max(activations_bytes) OVER w AS activations_bytes, other_bytes, max(peak_bytes) OVER w AS peak_bytes
    FROM numbered WINDOW w AS (PARTITION BY bucket) ORDER BY bucket, step DESC
"""


def _roll_up(source: str) -> str:
    return f"""
        WITH numbered AS (
            SELECT *, (step - 1) / :span AS bucket FROM ({source}) AS finer
        ), spans AS ({_LAST_OF_EACH})
        INSERT INTO metric_spans (job_id, span, number, {_COLUMNS})
        SELECT :job_id, :span, bucket, {_COLUMNS} FROM spans
        ON CONFLICT (job_id, span, number) DO UPDATE SET
            (step, attempt, created_at, epoch, loss, loss_min, loss_max, mean_token_accuracy, learning_rate, grad_norm,
            tokens_per_s, step_s, parameters_bytes, gradients_bytes, optimizer_bytes, activations_bytes, other_bytes,
            peak_bytes) = ROW (excluded.step, excluded.attempt, excluded.created_at, excluded.epoch, excluded.loss,
            excluded.loss_min, excluded.loss_max, excluded.mean_token_accuracy, excluded.learning_rate,
            excluded.grad_norm, excluded.tokens_per_s, excluded.step_s, excluded.parameters_bytes,
            excluded.gradients_bytes, excluded.optimizer_bytes, excluded.activations_bytes, excluded.other_bytes,
            excluded.peak_bytes)
    """  # noqa: S608  # made of the constants above


_SPANS_OF = f"SELECT {_COLUMNS} FROM metric_spans WHERE job_id = :job_id AND span = "  # noqa: S608
_ROLL_UP_STEPS = text(_roll_up(f"{_STEPS} WHERE job_id = :job_id AND step > :first AND step <= :last"))
_ROLL_UP_SPANS = text(_roll_up(f"{_SPANS_OF} :finer AND number >= :first / :finer AND number < :last / :finer"))


def roll_up(session: Session, job_id: str, *, before: int, after: int) -> None:
    """Make the spans that a run has completed by going on from step `before` (or going back to it) to step `after`."""
    finer = 1
    for span in SPANS:
        first, last = before // span * span, after // span * span
        if first >= last:
            return
        values = {"job_id": job_id, "span": span, "first": first, "last": last}
        if finer == 1:
            session.execute(_ROLL_UP_STEPS, values)
        else:
            session.execute(_ROLL_UP_SPANS, {**values, "finer": finer})
        finer = span


def read_metrics(
    db: Database, job: Job, *, max_points: int, first_step: int | None = None, last_step: int | None = None
) -> dict[str, list[Any]]:
    """A job's series as columns of at most `max_points` values, over all steps or the given window of them."""
    first = first_step if first_step is not None else 0
    last = last_step if last_step is not None else max(job.step, 1)
    with db.read() as session:
        result = session.execute(*_window(job, first=first, last=last, max_points=max_points))
        rows = result.all()
        return {name: [row[index] for row in rows] for index, name in enumerate(result.keys())}


def _window(job: Job, *, first: int, last: int, max_points: int) -> tuple[Any, dict[str, Any]]:
    """The query of a window, and its values."""
    width = (last - first + 1) / max_points
    span = max((span for span in SPANS if span <= width), default=None)
    values = {"job_id": job.id, "first": first, "last": last, "buckets": max_points}
    if span is None:
        return _READ_STEPS, values
    # Spans wholly in the window, as far as the run has completed them; steps 1 to `span` are number 0.
    begin = max(0, -(-(first - 1) // span))
    end = max(begin, min(last, job.step) // span)
    edges = {"before": min(last, begin * span), "behind": end * span}
    return _READ_SPANS, {**values, **edges, "span": span, "begin": begin, "end": end}


def _read(source: str) -> str:
    return f"""
        WITH numbered AS (
            SELECT *, width_bucket(step, :first, :last + 1, :buckets) AS bucket FROM ({source}) AS given
        )
        SELECT step, attempt, extract(epoch FROM created_at)::double precision AS time, epoch, loss, loss_min, loss_max,
            mean_token_accuracy, learning_rate, grad_norm, tokens_per_s, step_s, parameters_bytes, gradients_bytes,
            optimizer_bytes, activations_bytes, other_bytes, peak_bytes
        FROM ({_LAST_OF_EACH}) AS thinned ORDER BY step
    """  # noqa: S608  # made of the constants above


_READ_STEPS = text(_read(f"{_STEPS} WHERE job_id = :job_id AND step BETWEEN :first AND :last"))
_READ_SPANS = text(
    _read(f"""
        {_STEPS} WHERE job_id = :job_id AND step BETWEEN :first AND :before
        UNION ALL {_SPANS_OF} :span AND number >= :begin AND number < :end
        UNION ALL {_STEPS} WHERE job_id = :job_id AND step > :behind AND step BETWEEN :first AND :last
    """)
)

# One look into the index per point: the last loss of each of equal parts of the run.
_CURVES = text("""
    SELECT j.id, point.step, point.loss
    FROM jobs j
    CROSS JOIN generate_series(1, :num_points) AS part
    CROSS JOIN LATERAL (
        SELECT (greatest(j.total_steps, 1) + 1) * (part - 1) / :num_points AS low,
            (greatest(j.total_steps, 1) + 1) * part / :num_points AS high
    ) AS ends
    CROSS JOIN LATERAL (
        SELECT m.step, m.loss FROM metrics m
        WHERE m.job_id = j.id AND m.step >= ends.low AND m.step < ends.high AND m.step <= j.step AND m.loss IS NOT NULL
        ORDER BY m.step DESC LIMIT 1
    ) AS point
    WHERE j.id = ANY(:job_ids) ORDER BY j.id, part
""")


def loss_curves(db: Database, *, job_ids: Sequence[str], num_points: int) -> dict[str, list[tuple[int, float]]]:
    """A thinned loss curve per job, `(step, loss)`, for small pictures in a list."""
    curves: dict[str, list[tuple[int, float]]] = {job_id: [] for job_id in job_ids}
    with db.read() as session:
        for job_id, step, loss in session.execute(_CURVES, {"job_ids": list(job_ids), "num_points": num_points}):
            curves[job_id].append((step, loss))
    return curves
