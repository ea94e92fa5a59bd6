"""What the API and the dashboard read: every query is bounded and filtered by its owner (`owner.py`).

Lists are newest first with a cursor (`after`), as the official clients page them. A chart of a million steps is read
as a fixed number of buckets, each with its last, smallest and largest value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sqlalchemy import ColumnElement, Select, bindparam, func, select, text, tuple_
from sqlalchemy.orm import Session

from jobs.db import Database
from jobs.errors import NotFoundError
from jobs.file_expiry import is_current
from jobs.ids import parse_event_id
from jobs.models import Attempt, Checkpoint, Evaluation, Event, File, Host, Job, Metric, ReaperState, TunedModel
from jobs.owner import Owner
from jobs.planning import Room
from jobs.status import JobStatus

ALIVE_WITHIN_S = 60.0
"""A worker host is seen, and the reaper ticks, every 2 to 10 s; a minute of silence is several misses and not one."""

T = TypeVar("T")

# What every submission asks is built once: SQLAlchemy takes longer to put a statement together than to send it.
_IS_ALIVE: ColumnElement[bool] = Host.last_seen_at >= func.now() - func.make_interval(
    0, 0, 0, 0, 0, 0, bindparam("alive_within_s", ALIVE_WITHIN_S)
)
_HOSTS = (
    select(Host, _IS_ALIVE, Job.id, Job.organization_id, Job.project_id, Job.planned_bytes)
    .outerjoin(Job, (Job.status == JobStatus.RUNNING) & (func.split_part(Job.lease_owner, "/", 1) == Host.name))
    .order_by(Host.name, Job.started_at, Job.id)
)
_OVERHEAD_BYTES = func.coalesce(Host.run_overhead_bytes, 0)
LARGEST_ROOM = (
    select(Host.name, Host.available_bytes, _OVERHEAD_BYTES)
    .where(_IS_ALIVE, Host.available_bytes.is_not(None))
    .order_by((Host.available_bytes - _OVERHEAD_BYTES).desc(), Host.name)
    .limit(1)
)
"""Name, available bytes and a run's overhead of the live host with the most memory for one run."""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list, and whether another follows."""

    items: Sequence[T]
    has_more: bool


def get_job(db: Database, *, owner: Owner, job_id: str) -> Job:
    """One job.

    Raises:
        NotFoundError: no such job of this owner.
    """
    with db.read() as session:
        return _owned_job(session, job_id, owner, param="fine_tuning_job_id")


def find_jobs(db: Database, *, owner: Owner, job_ids: Sequence[str]) -> Sequence[Job]:
    """Those of the given jobs that are this owner's."""
    with db.read() as session:
        return session.scalars(select(Job).where(owner.owns(Job), Job.id.in_(job_ids))).all()


def list_jobs(
    db: Database,
    *,
    owner: Owner,
    limit: int,
    after: str | None = None,
    metadata: dict[str, str] | None = None,
    project_id: str | None = None,
) -> Page[Job]:
    """Jobs, newest first; only one project's if it is named. `metadata`: only jobs that have all these pairs; an empty
    dict: only jobs with none.

    Raises:
        NotFoundError: `after` is not a job of this owner.
    """
    query = select(Job).where(owner.owns(Job)).order_by(Job.created_at.desc(), Job.id.desc())
    if project_id is not None:
        query = query.where(Job.project_id == project_id)
    if metadata is not None:
        query = query.where(Job.metadata_.contains(metadata) if metadata else Job.metadata_ == {})
    with db.read() as session:
        if after is not None:
            last = _owned_job(session, after, owner, param="after")
            query = query.where(tuple_(Job.created_at, Job.id) < tuple_(last.created_at, last.id))
        return _page(session, query, limit)


def list_events(db: Database, *, owner: Owner, job_id: str, limit: int, after: str | None = None) -> Page[Event]:
    """Events of a job, newest first.

    Raises:
        NotFoundError: no such job, or `after` is not an event of it.
    """
    query = select(Event).where(Event.job_id == job_id).order_by(Event.seq.desc())
    with db.read() as session:
        _owned_job(session, job_id, owner, param="fine_tuning_job_id")
        if after is not None:
            seq = parse_event_id(job_id, after)
            if seq is None:
                raise NotFoundError(f"No such event of {job_id}: {after}", param="after")
            query = query.where(Event.seq < seq)
        return _page(session, query, limit)


def events_since(db: Database, *, job_id: str, seq: int, limit: int) -> Sequence[Event]:
    """Events after sequence number `seq`, oldest first: what a stream replays and follows."""
    with db.read() as session:
        return session.scalars(
            select(Event).where(Event.job_id == job_id, Event.seq > seq).order_by(Event.seq).limit(limit)
        ).all()


def list_checkpoints(
    db: Database, *, owner: Owner, job_id: str, limit: int, after: str | None = None
) -> Page[Checkpoint]:
    """Published checkpoints of a job, newest first.

    Raises:
        NotFoundError: no such job, or `after` is not a checkpoint of it.
    """
    query = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc())
    with db.read() as session:
        _owned_job(session, job_id, owner, param="fine_tuning_job_id")
        if after is not None:
            last = session.get(Checkpoint, after)
            if last is None or last.job_id != job_id:
                raise NotFoundError(f"No such checkpoint of {job_id}: {after}", param="after")
            query = query.where(Checkpoint.step < last.step)
        return _page(session, query, limit)


def accuracies_at(
    db: Database, *, job_id: str, steps: Sequence[int]
) -> Mapping[int, tuple[float | None, float | None]]:
    """Mean token accuracies by step: in training, and on the validation file where it was evaluated at that step."""
    evaluated = (Evaluation.job_id == Metric.job_id) & (Evaluation.step == Metric.step)
    query = (
        select(Metric.step, Metric.mean_token_accuracy, Evaluation.valid_mean_token_accuracy)
        .outerjoin(Evaluation, evaluated)
        .where(Metric.job_id == job_id, Metric.step.in_(steps))
    )
    with db.read() as session:
        return {step: (train, valid) for step, train, valid in session.execute(query)}


def resume_candidates(db: Database, *, job_id: str) -> Sequence[Checkpoint]:
    """A job's checkpoints, newest first: what a further attempt may go on from."""
    with db.read() as session:
        return session.scalars(
            select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc())
        ).all()


def list_attempts(db: Database, *, job_id: str) -> Sequence[Attempt]:
    """A job's attempts, oldest first."""
    with db.read() as session:
        return session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number)).all()


def list_evaluations(db: Database, *, job_ids: Sequence[str]) -> Sequence[Evaluation]:
    """Evaluations of the given jobs, by job and step."""
    with db.read() as session:
        return session.scalars(
            select(Evaluation).where(Evaluation.job_id.in_(job_ids)).order_by(Evaluation.job_id, Evaluation.step)
        ).all()


def get_file(db: Database, *, owner: Owner, file_id: str, param: str = "file_id") -> File:
    """One file; `param` names the request field that held the id, for the error.

    Raises:
        NotFoundError: no such file of this owner.
    """
    with db.read() as session:
        return _owned_file(session, file_id, owner, param=param)


def find_stored_file(db: Database, *, owner: Owner, file_id: str) -> File | None:
    """A file of a job, which may have expired since; None where this owner has no such file."""
    with db.read() as session:
        return session.scalar(select(File).where(File.id == file_id, owner.owns(File)))


def list_files(  # noqa: PLR0913 - the parts of a query
    db: Database,
    *,
    owner: Owner,
    limit: int,
    after: str | None = None,
    purpose: str | None = None,
    project_id: str | None = None,
    ascending: bool = False,
) -> Page[File]:
    """Files, newest first unless `ascending`.

    Raises:
        NotFoundError: `after` is not a file of this owner.
    """
    order = tuple_(File.created_at, File.id)
    query = select(File).where(owner.owns(File), is_current())
    query = (
        query.order_by(File.created_at, File.id)
        if ascending
        else query.order_by(File.created_at.desc(), File.id.desc())
    )
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    if project_id is not None:
        query = query.where(File.project_id == project_id)
    with db.read() as session:
        if after is not None:
            last = _owned_file(session, after, owner, param="after")
            key = tuple_(last.created_at, last.id)
            query = query.where(order > key if ascending else order < key)
        return _page(session, query, limit)


def list_models(db: Database, *, owner: Owner) -> Sequence[TunedModel]:
    """Every tuned model of an owner, newest first."""
    with db.read() as session:
        return session.scalars(
            select(TunedModel).where(owner.owns(TunedModel)).order_by(TunedModel.created_at.desc(), TunedModel.id)
        ).all()


def find_model(db: Database, *, owner: Owner, model_id: str) -> TunedModel | None:
    """A tuned model by name."""
    with db.read() as session:
        return session.scalar(select(TunedModel).where(TunedModel.id == model_id, owner.owns(TunedModel)))


def find_host(db: Database, *, name: str) -> Host | None:
    """A worker host by name."""
    with db.read() as session:
        return session.get(Host, name)


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that a host runs."""

    id: str
    organization_id: str
    project_id: str
    planned_bytes: int | None


@dataclass(frozen=True, slots=True)
class HostState:
    """A worker host, and what runs there."""

    host: Host
    is_alive: bool
    running: list[RunningJob] = field(default_factory=list)

    @property
    def free_bytes(self) -> int | None:
        """What its running jobs leave of its memory by plan; None where it has measured none."""
        if self.host.available_bytes is None:
            return None
        return max(0, self.host.available_bytes - sum(self.needed_bytes(job.planned_bytes) for job in self.running))

    def needed_bytes(self, planned_bytes: int | None) -> int:
        """What a run takes here; a job without a plan counts as 0."""
        return 0 if planned_bytes is None else planned_bytes + (self.host.run_overhead_bytes or 0)

    @property
    def has_free_slot(self) -> bool:
        """Whether it may run one more job at once."""
        return len(self.running) < self.host.slots


def list_hosts(db: Database, *, alive_within_s: float = ALIVE_WITHIN_S) -> list[HostState]:
    """Every worker host that was ever seen, by name, with what all organizations run there. One query."""
    states: dict[str, HostState] = {}
    with db.read() as session:
        for host, is_alive, job_id, organization_id, project_id, planned_bytes in session.execute(
            _HOSTS, {"alive_within_s": alive_within_s}
        ):
            state = states.setdefault(host.name, HostState(host, is_alive))
            if job_id is not None:
                state.running.append(RunningJob(job_id, organization_id, project_id, planned_bytes))
    return list(states.values())


def largest_room(db: Database, *, alive_within_s: float = ALIVE_WITHIN_S) -> Room | None:
    """What the live host with the most memory for one run has; None where there is none that has measured it.

    A job that needs more can be held by none of them, however long it waits.
    """
    with db.read() as session:
        row = session.execute(LARGEST_ROOM, {"alive_within_s": alive_within_s}).one_or_none()
    if row is None:
        return None
    name, available_bytes, overhead_bytes = row
    assert available_bytes is not None
    return Room(host=name, available_bytes=available_bytes, overhead_bytes=overhead_bytes)


def num_live_hosts(db: Database, *, alive_within_s: float = ALIVE_WITHIN_S) -> int:
    """How many worker hosts are alive."""
    with db.read() as session:
        query = select(func.count()).select_from(Host).where(_IS_ALIVE)
        return session.scalars(query, {"alive_within_s": alive_within_s}).one()


def due_jobs(db: Database) -> int:
    """How many queued jobs could start now: for these the reaper rings again, since their message may be lost."""
    with db.read() as session:
        return session.scalars(
            select(func.count()).where(Job.status == JobStatus.QUEUED, Job.run_after <= func.now())
        ).one()


@dataclass(frozen=True, slots=True)
class Readiness:
    """What the service needs besides the database itself."""

    schema_revision: str | None
    worker_seen_s: float | None
    """Seconds since any worker host was last seen."""
    reaper_ticked_s: float | None
    """Seconds since the reaper last ran, and with it Celery beat and the broker."""


def read_readiness(db: Database) -> Readiness:
    """The database's answer to "is the service up"."""
    with db.read() as session:
        if session.scalar(text("SELECT to_regclass('alembic_version')")) is None:
            return Readiness(schema_revision=None, worker_seen_s=None, reaper_ticked_s=None)
        revision = session.scalar(text("SELECT version_num FROM alembic_version"))
        seen = session.scalar(select(func.extract("epoch", func.now() - func.max(Host.last_seen_at))))
        ticked = session.scalar(select(func.extract("epoch", func.now() - ReaperState.last_tick_at)))
    return Readiness(
        schema_revision=revision,
        worker_seen_s=None if seen is None else float(seen),
        reaper_ticked_s=None if ticked is None else float(ticked),
    )


def _owned_job(session: Session, job_id: str, owner: Owner, *, param: str) -> Job:
    job = session.scalar(select(Job).where(Job.id == job_id, owner.owns(Job)))
    if job is None:
        raise NotFoundError(f"No such fine-tuning job: {job_id}", param=param)
    return job


def _owned_file(session: Session, file_id: str, owner: Owner, *, param: str) -> File:
    """A file; one that has expired is absent, too."""
    file = session.scalar(select(File).where(File.id == file_id, owner.owns(File), is_current()))
    if file is None:
        raise NotFoundError(f"No such file: {file_id}", param=param)
    return file


def _page(session: Session, query: Select[T], limit: int) -> Page[T]:
    rows = session.scalars(query.limit(limit + 1)).all()
    return Page(rows[:limit], has_more=len(rows) > limit)
