"""Rows of the database (SQLAlchemy). The migrations build them; `alembic check` keeps the two equal.

Times are the database's clock (`now()`), so that no host's clock can end a lease. Sizes are bytes in `bigint`.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Identity,
    Index,
    Integer,
    SmallInteger,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from jobs.orm import Base
from jobs.status import TERMINAL, JobStatus, UploadStatus

NOTIFY_CHANNEL = "lomo_jobs"
"""Postgres channel on which a commit that appended events announces the job's id."""


def _in(values: frozenset[JobStatus] | type[JobStatus]) -> str:
    return ", ".join(f"'{status.value}'" for status in JobStatus if status in values)


class Organization(Base):
    """A tenant, and what it may use at most (`jobs/quotas.py`); None: as much as there is."""

    __tablename__ = "organizations"
    __table_args__ = (
        CheckConstraint("max_queued_jobs >= 0", name="max_queued_jobs"),
        CheckConstraint("max_running_jobs >= 0", name="max_running_jobs"),
        CheckConstraint("max_gpu_seconds >= 0", name="max_gpu_seconds"),
        CheckConstraint("max_stored_bytes >= 0", name="max_stored_bytes"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    max_queued_jobs: Mapped[int | None] = mapped_column(Integer)
    max_running_jobs: Mapped[int | None] = mapped_column(Integer)
    max_gpu_seconds: Mapped[int | None] = mapped_column(BigInteger)
    """In the last 30 days."""
    max_stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    max_priority: Mapped[int | None] = mapped_column(SmallInteger)


class Project(Base):
    """A part of an organization: keys belong to one, and so does what they make; others do not see it."""

    __tablename__ = "projects"
    __table_args__ = (
        Index("uq_projects_default", "organization_id", unique=True, postgresql_where=text("is_default")),
        CheckConstraint("NOT (is_default AND archived_at IS NOT NULL)", name="default_stays"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    is_default: Mapped[bool] = mapped_column(server_default=text("false"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    archived_at: Mapped[datetime | None]


class ApiKey(Base):
    """A caller. The secret itself is not kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    """The public part of the token."""
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id", ondelete="CASCADE"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    scopes: Mapped[list[str]]
    """What it may do (`jobs/scopes.py`)."""
    secret_sha256: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    previous_sha256: Mapped[str | None]
    """Of the secret before the last rotation."""
    previous_expires_at: Mapped[datetime | None]
    """Until when that one is taken as well."""


class BrowserSession(Base):
    """A dashboard session: the cookie's hash and the key it stands for."""

    __tablename__ = "browser_sessions"

    token_sha256: Mapped[str] = mapped_column(primary_key=True)
    api_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime] = mapped_column(index=True)


class File(Base):
    """An uploaded file, or one that a job made."""

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_expires_at", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),)

    id: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str] = mapped_column(index=True)
    filename: Mapped[str]
    """The uploader's name for it: shown, never used as a path."""
    purpose: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    num_lines: Mapped[int | None] = mapped_column(BigInteger)
    """Rows of a file to train on; None for plain text, and for another purpose."""
    sha256: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"), index=True)
    """The job that made it; None for an upload."""
    path: Mapped[str | None]
    """Where its bytes lie, relative to `data_dir`, or the URL of an object; None: in `files_dir` under its id."""
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    expires_at: Mapped[datetime | None]
    """From when on it is there for nobody (`jobs/file_expiry.py`); None: it stays until it is deleted."""


class Submission(Base):
    """A request for a job that may come twice, and the one job that came of it (`jobs/idempotency.py`)."""

    __tablename__ = "submissions"
    __table_args__ = (
        UniqueConstraint("project_id", "idempotency_key"),
        Index("ix_submissions_api_key_id_body_sha256", "api_key_id", "body_sha256"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    organization_id: Mapped[str]
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    api_key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id", ondelete="CASCADE"))
    idempotency_key: Mapped[str | None]
    """None: the client sent none, and says which try this is."""
    body_sha256: Mapped[str]
    num_retries: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """The highest number of a retry that has come."""
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    """None while no try has made the job."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)


class Upload(Base):
    """A file that arrives in parts; they lie in a folder of `uploads_dir` under its id until it has ended."""

    __tablename__ = "uploads"
    __table_args__ = (
        CheckConstraint(f"status IN ({', '.join(repr(status.value) for status in UploadStatus)})", name="status"),
        CheckConstraint("(status = 'completed') = (part_ids IS NOT NULL)", name="parts_when_completed"),
        Index("ix_uploads_pending", "expires_at", postgresql_where=text("status = 'pending'")),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str]
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    filename: Mapped[str]
    """The uploader's name for the file: shown, never used as a path."""
    purpose: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    """Size of the whole file, as announced: what its parts must come to."""
    status: Mapped[str] = mapped_column(server_default=UploadStatus.PENDING)
    """`pending` until an ended upload has been swept: whether it has expired is for the database's clock to say."""
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id", ondelete="SET NULL"), index=True)
    """The file that a completed upload became, until that is deleted."""
    part_ids: Mapped[list[str] | None]
    """What it was completed from, in order; with `md5` this tells a repeated request from another one."""
    md5: Mapped[str | None]
    """The digest that the completion named, if it named one."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]
    file_expires_after_s: Mapped[int | None] = mapped_column(Integer)
    """How long the file is to be there once it is made; None: until it is deleted."""


class UploadPart(Base):
    """A part of a pending upload; its bytes lie in the upload's folder under its id."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Job(Base):
    """A fine-tuning job: the request, its state, its lease, and the latest figures of its run."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"status IN ({_in(JobStatus)})", name="status"),
        # A lease exists exactly while the job runs; a zombie can therefore never own a job that does not.
        CheckConstraint("(status = 'running') = (lease_token IS NOT NULL)", name="lease_while_running"),
        CheckConstraint("(lease_token IS NULL) = (lease_expires_at IS NULL)", name="lease_whole"),
        CheckConstraint("(lease_token IS NULL) = (lease_owner IS NULL)", name="lease_owned"),
        CheckConstraint(f"(status IN ({_in(TERMINAL)})) = (finished_at IS NOT NULL)", name="finished_when_terminal"),
        CheckConstraint("(status = 'failed') = (error IS NOT NULL)", name="error_when_failed"),
        CheckConstraint("status <> 'succeeded' OR fine_tuned_model IS NOT NULL", name="model_when_succeeded"),
        CheckConstraint("planned_bytes >= 0", name="planned_bytes"),
        Index("ix_jobs_claim", text("priority DESC"), "created_at", postgresql_where=text("status = 'queued'")),
        Index(
            "ix_jobs_validating",
            text("priority DESC"),
            "created_at",
            postgresql_where=text("status = 'validating_files'"),
        ),
        Index("ix_jobs_lease", "lease_expires_at", postgresql_where=text("status = 'running'")),
        # Pages of jobs, an administrator's and others': a project's may lie far behind its organization's newest.
        Index("ix_jobs_organization_id_created_at_id", "organization_id", "created_at", "id"),
        Index("ix_jobs_project_page", "organization_id", "project_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str]
    api_key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id", ondelete="SET NULL"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    status: Mapped[str]
    spec: Mapped[dict[str, Any]]
    """`JobSpec` as JSON."""
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", server_default=text("'{}'::jsonb"))
    priority: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    plan: Mapped[dict[str, Any] | None]
    """The memory plan as it was made at the submission; nothing here looks into it."""
    planned_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """The peak on the device by plan. None: not known, and any host may take the job (`jobs/placement.py`)."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    error: Mapped[dict[str, Any] | None]
    """`code`, `message`, `param`."""

    attempt: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """Number of claims so far."""
    failures: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """Lost workers and killed engines; preemptions do not count."""
    run_after: Mapped[datetime] = mapped_column(server_default=func.now())
    lease_token: Mapped[uuid.UUID | None]
    lease_expires_at: Mapped[datetime | None]
    lease_owner: Mapped[str | None]
    """`<host>/<incarnation>` of the worker that holds the lease."""
    cancel_requested_at: Mapped[datetime | None]
    pause_requested_at: Mapped[datetime | None]
    last_seq: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """The highest sequence number of an event."""
    last_log_seq: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """The highest number of a line of its log."""

    run: Mapped[dict[str, Any] | None]
    """What the engine said when it started: parameters, rows, device (`lomo_core.events.Started`)."""
    step: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    total_steps: Mapped[int | None] = mapped_column(BigInteger)
    loss: Mapped[float | None]
    tokens_per_s: Mapped[float | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    memory: Mapped[dict[str, Any] | None]
    """Bytes by category of the step with the highest peak so far (`lomo_core.events.MemoryBytes`)."""
    step_at: Mapped[datetime | None]
    """When the last shipped step ended."""
    fine_tuned_model: Mapped[str | None]
    weights_sha256: Mapped[str | None]


class DataCheck(Base):
    """The check of a job's files before it is queued, and what it found (`jobs/checking.py`)."""

    __tablename__ = "data_checks"
    __table_args__ = (
        CheckConstraint("(token IS NULL) = (expires_at IS NULL)", name="claim_whole"),
        Index("ix_data_checks_training_file", "training_file", "checked_at"),
        Index("ix_data_checks_validation_file", "validation_file", "checked_at"),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    number: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """How often it was begun."""
    token: Mapped[uuid.UUID | None]
    """The right to write its end; None: nobody is at it."""
    owner: Mapped[str | None]
    """`<host>/<incarnation>` of the worker that began it last."""
    expires_at: Mapped[datetime | None]
    checked_at: Mapped[datetime | None]
    report: Mapped[dict[str, Any] | None]
    """What `lomo_core.data.check` wrote."""
    summary: Mapped[dict[str, Any] | None]
    """Its figures alone, for a list of jobs."""


class Attempt(Base):
    """One claim of a job by a worker."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    owner: Mapped[str]
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None]
    """`succeeded`, `failed`, `cancelled`, `requeued`, `paused`; None while it runs."""
    detail: Mapped[str | None]
    shipped_lines: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """Lines of this attempt's journal that are in the database: the next one's number."""
    shipped_log_bytes: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """How much of its `engine.log` is in the database."""


class Event(Base):
    """One event of a job: gap-free by `seq`, which is also the id of a server-sent event.

    Neither this table nor `metrics` has a foreign key: to look each row's job up takes Postgres a quarter of the time
    of shipping it (31 us of CPU a line with, 23 without), and whoever writes them holds the lock of the job's row
    (`jobs/repository.py`). Who deletes a job deletes them (`jobs/deletion.py`).
    """

    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("job_id", "attempt", "line"),)

    job_id: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer)
    line: Mapped[int | None] = mapped_column(BigInteger)
    """Line of the attempt's journal; None for what the service itself says."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    level: Mapped[str]
    type: Mapped[str]
    """OpenAI's: `message` or `metrics`."""
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]
    status: Mapped[str | None]
    """The job's new status where this event changed it."""


class LogLine(Base):
    """A line that an engine of a job wrote to its standard output or error; the newest are kept (`jobs/runlog.py`)."""

    __tablename__ = "log_lines"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    """Counts a job's lines from 1 without a gap, over all of its attempts."""
    attempt: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    """When the worker had read it."""
    text: Mapped[str]


class StepFigures:
    """What is measured at a step: the columns of a step's row, and of a row for several."""

    attempt: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime]
    epoch: Mapped[float]
    loss: Mapped[float | None]
    mean_token_accuracy: Mapped[float | None]
    learning_rate: Mapped[float]
    grad_norm: Mapped[float | None]
    tokens_per_s: Mapped[float]
    step_s: Mapped[float]
    parameters_bytes: Mapped[int] = mapped_column(BigInteger)
    gradients_bytes: Mapped[int] = mapped_column(BigInteger)
    optimizer_bytes: Mapped[int] = mapped_column(BigInteger)
    activations_bytes: Mapped[int] = mapped_column(BigInteger)
    other_bytes: Mapped[int] = mapped_column(BigInteger)
    peak_bytes: Mapped[int] = mapped_column(BigInteger)


class Metric(StepFigures, Base):
    """The figures of one step, typed; a repeated step (after a resume) replaces the earlier one. Of the job: see
    `Event`."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)


class MetricSpan(StepFigures, Base):
    """The figures of `span` consecutive steps in one row, for charts: the last one's, and extremes."""

    __tablename__ = "metric_spans"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    span: Mapped[int] = mapped_column(Integer, primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    """0 for steps 1 to `span`."""
    step: Mapped[int] = mapped_column(BigInteger)
    loss_min: Mapped[float | None]
    loss_max: Mapped[float | None]


class Evaluation(Base):
    """One pass over the validation file."""

    __tablename__ = "evaluations"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    created_at: Mapped[datetime]
    num_rows: Mapped[int] = mapped_column(BigInteger)
    valid_loss: Mapped[float | None]
    valid_mean_token_accuracy: Mapped[float | None]
    choice_accuracy: Mapped[float | None]


class Checkpoint(Base):
    """A published checkpoint: the row, written under the lease, is what makes it one."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int] = mapped_column(Integer)
    step: Mapped[int] = mapped_column(BigInteger)
    path: Mapped[str]
    """Folder relative to `data_dir`."""
    manifest_sha256: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    train_loss: Mapped[float | None]
    valid_loss: Mapped[float | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class TunedModel(Base):
    """A tuned model by name; the folder is a plain Hugging Face one."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str] = mapped_column(index=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    """Its job's."""
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    path: Mapped[str]
    """Folder relative to `data_dir`."""
    weights_sha256: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    num_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Of its folder; None until somebody has asked (`jobs/quotas.py`)."""


class Host(Base):
    """A worker host as it last reported itself."""

    __tablename__ = "hosts"
    __table_args__ = (CheckConstraint("device_kind IN ('cuda', 'cpu')", name="device_kind"),)

    name: Mapped[str] = mapped_column(primary_key=True)
    incarnation: Mapped[str]
    """New at each start of the worker: leases of an earlier one are dead."""
    memory_bytes: Mapped[int] = mapped_column(BigInteger)
    """Of the host itself, cards not counted."""
    available_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """What was free on the device when the worker started: all that its jobs may need together. None: not measured."""
    run_overhead_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """What each run takes of them beside its plan: on a CPU host the process around it. None: nothing known."""
    device_kind: Mapped[str | None]
    """`cuda` or `cpu`: where its engines compute, and which memory `available_bytes` is of."""
    devices: Mapped[dict[str, Any]]
    slots: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    last_seen_at: Mapped[datetime] = mapped_column(server_default=func.now())


class ReaperState(Base):
    """When the reaper last ran: after a gap it must hold its fire, or an outage would kill live jobs."""

    __tablename__ = "reaper_state"
    __table_args__ = (CheckConstraint("id = 1", name="single_row"),)

    id: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    last_tick_at: Mapped[datetime]
    hold_until: Mapped[datetime]
