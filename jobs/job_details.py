"""Jobs with what belongs to them and lies in other tables, in one statement.

A statement costs some 0.4 ms, most of it on the way there and back: asked one after the other, the small questions
about a job took six times as long as together. Only its evaluations are a statement of their own, where it has any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Double, bindparam, exists, func, inspect, literal_column, select
from sqlalchemy.dialects.postgresql import aggregate_order_by

from jobs.async_reads import AsyncReads, CompiledQuery
from jobs.db import Database
from jobs.errors import NotFoundError
from jobs.models import Attempt, DataCheck, Evaluation, File, Job, TunedModel
from jobs.owner import Owner, is_owned
from jobs.reads import HostState


@dataclass(slots=True, kw_only=True)
class JobDetails:
    """What belongs to a job and lies in other tables."""

    owner: str | None = None
    """`<host>/<incarnation>` of the last attempt's worker."""
    step_s: float | None = None
    """Seconds per step lately, checkpoints and evaluations included; None where the attempt has made no step."""
    model_path: str | None = None
    """The tuned model's folder relative to the data folder."""
    result_files: list[str] = field(default_factory=list)
    """Ids of the files that the job made, of those that still exist."""
    checked: dict[str, Any] | None = None
    """What the check of its files has found, in figures (`checking.py`)."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """By step: the first and the latest ones."""
    loss_curve: list[tuple[int, float]] | None = None
    queue_position: int | None = None
    """Filled in by whoever asks `queue_order.py`."""
    hosts: Sequence[HostState] = ()
    """Every worker host, where they were asked for: the same for all jobs."""
    max_running_jobs: int | None = None
    """How many jobs its organization may run at once."""


# Wall-clock time over the last 50 steps, so that checkpoints and evaluations count and an old speed is forgotten.
_RECENT_SPEED: ColumnElement[float | None] = literal_column(
    """CASE WHEN jobs.status = 'running' THEN (
        SELECT coalesce(nullif(extract(epoch FROM max(created_at) - min(created_at)), 0)::double precision
            / nullif(max(recent.step) - min(recent.step), 0), avg(step_s))
        FROM (
            SELECT * FROM metrics m WHERE m.job_id = jobs.id AND m.step <= jobs.step ORDER BY m.step DESC LIMIT 50
        ) recent
        WHERE recent.attempt = jobs.attempt
    ) END""",
    Double,
)
# In the order of the first fields of JobDetails; the last tells whether there are evaluations to ask for.
_DETAILS = (
    select(Attempt.owner)
    .where(Attempt.job_id == Job.id)
    .order_by(Attempt.number.desc())
    .limit(1)
    .correlate(Job)
    .scalar_subquery(),
    _RECENT_SPEED,
    select(TunedModel.path).where(TunedModel.job_id == Job.id).limit(1).correlate(Job).scalar_subquery(),
    select(func.array_agg(aggregate_order_by(File.id, File.created_at, File.id)))
    .where(File.job_id == Job.id)
    .correlate(Job)
    .scalar_subquery(),
    select(DataCheck.summary).where(DataCheck.job_id == Job.id).correlate(Job).scalar_subquery(),
    exists().where(Evaluation.job_id == Job.id).correlate(Job),
)
_COLUMNS = [(attribute.key, attribute.columns[0]) for attribute in inspect(Job).column_attrs]
_ONE = CompiledQuery.of(
    select(*(column for _, column in _COLUMNS), *_DETAILS).where(Job.id == bindparam("job_id"), is_owned(Job))
)
# Built once: SQLAlchemy takes longer to put such a statement together than Postgres to answer it.
_SEVERAL = select(Job.id, *_DETAILS).where(Job.id == func.any(bindparam("job_ids")))
# The first evaluation of each job and the latest 99: a job that evaluates at every step must not swell a list.
_NUMBERED = (
    select(
        Evaluation.__table__,
        func.row_number().over(partition_by=Evaluation.job_id, order_by=Evaluation.step).label("from_start"),
        func.row_number().over(partition_by=Evaluation.job_id, order_by=Evaluation.step.desc()).label("from_end"),
    )
    .where(Evaluation.job_id == func.any(bindparam("job_ids")))
    .subquery()
)
_EVALUATION_NAMES = [column.name for column in Evaluation.__table__.columns]
_EVALUATIONS = (
    select(*(_NUMBERED.c[name] for name in _EVALUATION_NAMES))
    .where((_NUMBERED.c.from_start == 1) | (_NUMBERED.c.from_end < 100))
    .order_by(_NUMBERED.c.job_id, _NUMBERED.c.step)
)
_EVALUATIONS_OF_ONE = CompiledQuery.of(_EVALUATIONS)


async def get_detailed_job(db: AsyncReads, *, owner: Owner, job_id: str) -> tuple[Job, JobDetails]:
    """One job and its details. The job is of no session.

    Raises:
        NotFoundError: no such job of this owner.
    """
    rows = await db.fetch(_ONE, job_id=job_id, **owner.parameters)
    if not rows:
        raise NotFoundError(f"No such fine-tuning job: {job_id}", param="fine_tuning_job_id")
    (row,) = rows
    job = Job(**{name: value for (name, _), value in zip(_COLUMNS, row, strict=False)})
    *_, is_evaluated = row
    details = _details(*row[len(_COLUMNS) : -1])
    if is_evaluated:
        evaluations = await db.fetch(_EVALUATIONS_OF_ONE, job_ids=[job_id])
        details.evaluations = [Evaluation(**dict(zip(_EVALUATION_NAMES, row, strict=True))) for row in evaluations]
    return job, details


def read_details(db: Database, *, job_ids: Sequence[str]) -> dict[str, JobDetails]:
    """The details of the given jobs."""
    with db.read() as session:
        rows = session.execute(_SEVERAL, {"job_ids": list(job_ids)}).all()
        details = {job_id: _details(*found) for job_id, *found, _ in rows}
        evaluated = [job_id for job_id, *_, is_evaluated in rows if is_evaluated]
        if evaluated:
            for evaluation in session.execute(_EVALUATIONS, {"job_ids": evaluated}).mappings():
                details[evaluation["job_id"]].evaluations.append(Evaluation(**evaluation))
    return details


def _details(
    owner: str | None, step_s: float | None, path: str | None, files: list[str] | None, checked: dict[str, Any] | None
) -> JobDetails:
    return JobDetails(owner=owner, step_s=step_s, model_path=path, result_files=files or [], checked=checked)
