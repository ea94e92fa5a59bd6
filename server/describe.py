"""From rows to the objects of the API: the one place where a column gets its public name.

The time that a running job still needs is `seconds per step x steps left`, less the time since its last step but by no
more than one step: seconds per step is wall-clock time over the last 50 steps of the present attempt
(`jobs/job_details.py`), so that evaluations and checkpoints count, and the estimate stands still when the run does.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.concurrency import run_in_threadpool

from jobs import queue_order, reads
from jobs.async_reads import AsyncReads
from jobs.checkpoint_names import checkpoint_name
from jobs.db import Database
from jobs.ids import event_id, log_line_id
from jobs.job_details import JobDetails, get_detailed_job, read_details
from jobs.models import (
    Attempt,
    Checkpoint,
    Evaluation,
    Event,
    File,
    Job,
    LogLine,
    TunedModel,
    Upload,
    UploadPart,
)
from jobs.owner import Owner
from jobs.planning import gib
from jobs.quotas import running_limits
from jobs.reads import HostState
from jobs.series import loss_curves
from jobs.settings import JobsSettings
from jobs.spec import ForeignSpec, JobSpec, read_stored
from jobs.status import JobStatus, UploadStatus
from jobs.webhook_models import WebhookEndpoint
from server import schemas

# Points of a picture as wide as a finger; the dashboard draws one per 2 pixels.
NUM_CURVE_POINTS = 48


def describe_jobs(
    db: Database, settings: JobsSettings, jobs: Sequence[Job], *, with_curve: bool = False
) -> list[schemas.FineTuningJob]:
    """Jobs as the API shows them, in the given order."""
    # One that is deleted at this moment has none.
    details = {job.id: JobDetails() for job in jobs} | read_details(db, job_ids=[job.id for job in jobs])
    if with_curve:
        curves = loss_curves(db, job_ids=list(details), num_points=NUM_CURVE_POINTS)
        for job_id, curve in curves.items():
            details[job_id].loss_curve = curve
    return _describe(db, settings, [(job, details[job.id]) for job in jobs])


async def describe_job(
    db: Database, fast: AsyncReads, settings: JobsSettings, *, owner: Owner, job_id: str
) -> schemas.FineTuningJob:
    """One job as the API shows it.

    Raises:
        NotFoundError: no such job of this owner.
    """
    job, details = await get_detailed_job(fast, owner=owner, job_id=job_id)
    if job.status == JobStatus.QUEUED:
        await run_in_threadpool(_add_queue, db, [(job, details)])
    return _job(job, details, settings)


def describe_new_job(db: Database, settings: JobsSettings, job: Job) -> schemas.FineTuningJob:
    """A job that has just been made, so that nothing belongs to it yet."""
    return _describe(db, settings, [(job, JobDetails())])[0]


def _describe(
    db: Database, settings: JobsSettings, found: Sequence[tuple[Job, JobDetails]]
) -> list[schemas.FineTuningJob]:
    _add_queue(db, found)
    return [_job(job, details, settings) for job, details in found]


def _add_queue(db: Database, found: Sequence[tuple[Job, JobDetails]]) -> None:
    """Add to the details of queued jobs what they wait for."""
    queued = [(job, details) for job, details in found if job.status == JobStatus.QUEUED]
    if not queued:
        return
    positions = queue_order.read_positions(db, job_ids=[job.id for job, _ in queued])
    limits = running_limits(db, {job.organization_id for job, _ in queued})
    hosts = reads.list_hosts(db)
    for job, details in queued:
        details.queue_position = positions.get(job.id)
        details.max_running_jobs = limits.get(job.organization_id)
        details.hosts = hosts


def describe_webhook(endpoint: WebhookEndpoint) -> schemas.WebhookEndpoint:
    """A webhook endpoint, without its secret."""
    return schemas.WebhookEndpoint(**_webhook(endpoint))


def describe_webhook_with_secret(endpoint: WebhookEndpoint) -> schemas.WebhookEndpointWithSecret:
    """A webhook endpoint whose secret is new."""
    return schemas.WebhookEndpointWithSecret(**_webhook(endpoint), signing_secret=endpoint.secret)


def _webhook(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "created_at": _unix(endpoint.created_at),
        "updated_at": _unix(endpoint.updated_at),
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "signing_secret_hint": f"whsec_...{endpoint.secret[-4:]}",
    }


def describe_event(event: Event) -> schemas.JobEvent:
    """An event; the status that it changed the job to is merged into its data."""
    data = event.data
    if event.status is not None:
        data = {**(data or {}), "status": event.status}
    return schemas.JobEvent(
        id=event_id(event.job_id, event.seq),
        created_at=_unix(event.created_at),
        level=event.level,
        message=event.message,
        type=event.type,
        data=data,
        seq=event.seq,
        attempt=event.attempt,
    )


def describe_point(event: Event) -> schemas.MetricPoint | schemas.EvaluationPoint | None:
    """The figures that an event brings; None where it brings none."""
    data = event.data or {}
    common = {"step": data.get("step"), "attempt": event.attempt, "time": event.created_at.timestamp()}
    if event.type != "metrics":
        return None
    if "num_rows" in data:
        names = schemas.EvaluationPoint.model_fields
        return schemas.EvaluationPoint(**{**{name: data.get(name) for name in names if name != "object"}, **common})
    flat = {**data, **(data.get("memory") or {})}
    names = schemas.MetricPoint.model_fields
    return schemas.MetricPoint(**{**{name: flat.get(name) for name in names if name != "object"}, **common})


def describe_log_line(line: LogLine) -> schemas.JobLogLine:
    """A line of a log."""
    return schemas.JobLogLine(
        id=log_line_id(line.job_id, line.seq),
        created_at=_unix(line.created_at),
        text=line.text,
        seq=line.seq,
        attempt=line.attempt,
    )


def describe_checkpoint(
    checkpoint: Checkpoint, spec: JobSpec | ForeignSpec, accuracies: tuple[float | None, float | None]
) -> schemas.JobCheckpoint:
    """A checkpoint, named after the model that its job makes; with its accuracies in training and on the validation
    file, of which every evaluation takes all rows."""
    train_accuracy, valid_accuracy = accuracies
    return schemas.JobCheckpoint(
        id=checkpoint.id,
        created_at=_unix(checkpoint.created_at),
        fine_tuned_model_checkpoint=checkpoint_name(spec, job_id=checkpoint.job_id, step=checkpoint.step),
        fine_tuning_job_id=checkpoint.job_id,
        metrics=schemas.CheckpointMetrics(
            step=checkpoint.step,
            train_loss=checkpoint.train_loss,
            train_mean_token_accuracy=train_accuracy,
            valid_loss=checkpoint.valid_loss,
            valid_mean_token_accuracy=valid_accuracy,
            full_valid_loss=checkpoint.valid_loss,
            full_valid_mean_token_accuracy=valid_accuracy,
        ),
        step_number=checkpoint.step,
        bytes=checkpoint.num_bytes,
        manifest_sha256=checkpoint.manifest_sha256,
        attempt=checkpoint.attempt,
    )


def describe_evaluation(evaluation: Evaluation) -> schemas.Evaluation:
    """One evaluation."""
    return schemas.Evaluation(
        step=evaluation.step,
        created_at=_unix(evaluation.created_at),
        num_rows=evaluation.num_rows,
        valid_loss=evaluation.valid_loss,
        valid_mean_token_accuracy=evaluation.valid_mean_token_accuracy,
        choice_accuracy=evaluation.choice_accuracy,
    )


def describe_attempt(attempt: Attempt) -> schemas.Attempt:
    """One attempt."""
    return schemas.Attempt(
        number=attempt.number,
        host=_host(attempt.owner),
        started_at=_unix(attempt.started_at),
        ended_at=_unix(attempt.ended_at) if attempt.ended_at else None,
        outcome=attempt.outcome,
        detail=attempt.detail,
    )


def describe_file(file: File) -> schemas.FileObject:
    """A file."""
    return schemas.FileObject(
        id=file.id,
        bytes=file.num_bytes,
        created_at=_unix(file.created_at),
        expires_at=None if file.expires_at is None else _unix(file.expires_at),
        filename=file.filename,
        purpose=schemas.shown_purpose(file.purpose),
        num_lines=file.num_lines,
        sha256=file.sha256,
        project_id=file.project_id,
    )


def describe_upload(upload: Upload, file: File | None = None) -> schemas.Upload:
    """An upload in parts, and the file that it has become."""
    return schemas.Upload(
        id=upload.id,
        bytes=upload.num_bytes,
        created_at=_unix(upload.created_at),
        expires_at=_unix(upload.expires_at),
        filename=upload.filename,
        purpose=schemas.shown_purpose(upload.purpose),
        status=UploadStatus(upload.status),
        file=describe_file(file) if file is not None else None,
    )


def describe_part(part: UploadPart) -> schemas.UploadPart:
    """A part of an upload."""
    return schemas.UploadPart(id=part.id, created_at=_unix(part.created_at), upload_id=part.upload_id)


def describe_model(model: TunedModel) -> schemas.Model:
    """A tuned model."""
    return schemas.Model(id=model.id, created=_unix(model.created_at), owned_by=model.organization_id)


def describe_host(state: HostState, *, owner: Owner) -> schemas.Host:
    """A host; of jobs that are not this owner's it tells the number alone."""
    host = state.host
    return schemas.Host(
        name=host.name,
        device_kind=host.device_kind,
        devices=host.devices,
        memory_bytes=host.memory_bytes,
        available_bytes=host.available_bytes,
        run_overhead_bytes=host.run_overhead_bytes,
        free_bytes=state.free_bytes,
        slots=host.slots,
        running_jobs=[job.id for job in state.running if owner.has(job)],
        num_running=len(state.running),
        last_seen_at=_unix(host.last_seen_at),
        is_alive=state.is_alive,
    )


def describe_queued(
    job: Job, *, position: int, start_s: float | None, hosts: Sequence[HostState], now: datetime
) -> schemas.QueuedJob:
    """A queued job at its place, which starts `start_s` seconds from now if all goes on as it does."""
    return schemas.QueuedJob(
        job_id=job.id,
        position=position,
        jobs_ahead=position - 1,
        priority=job.priority,
        created_at=_unix(job.created_at),
        predicted_start=None if start_s is None else _unix(now) + round(start_s),
        waiting_for=waiting_for(job, hosts),
    )


def waiting_for(job: Job, hosts: Sequence[HostState]) -> str | None:
    """Why a queued job waits; None where one of the hosts has room for it now, or the job is not queued."""
    if job.status != JobStatus.QUEUED:
        return None
    alive = [state for state in hosts if state.is_alive]
    if not alive:
        return "worker: no worker host is alive; start one."
    large = [state for state in alive if state.needed_bytes(job.planned_bytes) <= (state.host.available_bytes or 0)]
    if not large:
        state = max(alive, key=lambda state: (state.host.available_bytes or 0) - state.needed_bytes(job.planned_bytes))
        needed, largest = state.needed_bytes(job.planned_bytes), state.host.available_bytes or 0
        return f"memory: needs {gib(needed)}, and no host is large enough: the largest has {gib(largest, up=False)}."
    free = [state for state in large if state.needed_bytes(job.planned_bytes) <= (state.free_bytes or 0)]
    if not free:
        state = max(large, key=lambda state: (state.free_bytes or 0) - state.needed_bytes(job.planned_bytes))
        needed = state.needed_bytes(job.planned_bytes)
        return f"memory: needs {gib(needed)}, the largest free host has {gib(state.free_bytes or 0, up=False)}."
    if not any(state.has_free_slot for state in free):
        return "slot: every host with room for it runs as many jobs as it may."
    return None


def eta_s(job: Job, *, step_s: float | None, now: datetime) -> float | None:
    """Seconds until a running job's last step, or None where nothing can be said yet. The formula is at the top."""
    if job.status != JobStatus.RUNNING or job.total_steps is None or job.step_at is None or step_s is None:
        return None
    since_last_step = max(0.0, (now - job.step_at).total_seconds())
    return max(0.0, step_s * (job.total_steps - job.step) - min(since_last_step, step_s))


def _job(job: Job, details: JobDetails, settings: JobsSettings) -> schemas.FineTuningJob:
    spec = read_stored(job.spec)
    used = schemas.UsedHyperparameters(
        n_epochs=spec.n_epochs, batch_size=spec.batch_size, learning_rate_multiplier=spec.learning_rate_multiplier
    )
    now = datetime.now(UTC)
    left_s = eta_s(job, step_s=details.step_s, now=now)
    return schemas.FineTuningJob(
        id=job.id,
        model=spec.model,
        created_at=_unix(job.created_at),
        finished_at=_unix(job.finished_at) if job.finished_at else None,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=job.organization_id,
        result_files=details.result_files,
        status=job.status,
        validation_file=spec.validation_file,
        training_file=spec.training_file,
        hyperparameters=used,
        # OpenAI tells it at the end only.
        trained_tokens=job.trained_tokens if job.finished_at else None,
        error=schemas.JobError.model_validate(job.error) if job.error else None,
        integrations=spec.integrations if isinstance(spec, JobSpec) else [],
        seed=spec.seed,
        estimated_finish=None if left_s is None else _unix(now) + round(left_s),
        user_provided_suffix=spec.suffix,
        method=schemas.UsedMethod(supervised=schemas.UsedSupervised(hyperparameters=used)),
        metadata=job.metadata_,
        lomo=_lomo(job, details, spec=spec, left_s=left_s, settings=settings),
    )


def _lomo(
    job: Job, details: JobDetails, *, spec: JobSpec | ForeignSpec, left_s: float | None, settings: JobsSettings
) -> schemas.JobLomo | schemas.ForeignLomo:
    state = _run_state(job, details, left_s=left_s, settings=settings)
    if isinstance(spec, JobSpec):
        # Not model_dump: the nested options stay objects.
        return schemas.JobLomo(**dict(spec.lomo), auto=spec.auto, **state)
    return schemas.ForeignLomo(**{**(spec.lomo or {}), **state, "unreadable": spec.unreadable})


def _run_state(job: Job, details: JobDetails, *, left_s: float | None, settings: JobsSettings) -> dict[str, Any]:
    """The fields of `schemas.RunState`."""
    run = job.run or {}
    # What the engine planned for the data is nearer to the truth than what was planned at the job's creation.
    planned = run.get("planned") or (job.plan or {}).get("memory")
    owner = job.lease_owner or details.owner
    return {
        "project_id": job.project_id,
        "attempt": job.attempt,
        "failures": job.failures,
        "host": _host(owner) if owner else None,
        "started_at": _unix(job.started_at) if job.started_at else None,
        "cancel_requested": job.cancel_requested_at is not None,
        "pause_requested": job.pause_requested_at is not None,
        "queue_position": details.queue_position,
        "waiting_for": _over_quota(job, details) or waiting_for(job, details.hosts),
        "step": job.step,
        "total_steps": job.total_steps,
        "loss": job.loss,
        "tokens_per_second": job.tokens_per_s,
        "eta_s": None if left_s is None else round(left_s, 1),
        "num_parameters": run.get("num_parameters"),
        "num_train_rows": run.get("num_train_rows"),
        "device": run.get("device"),
        "device_bytes": run.get("device_bytes"),
        "memory": schemas.Memory(
            planned=planned,
            measured=job.memory,
            measured_peak_bytes=(job.memory or {}).get("peak_bytes"),
            planned_peak_bytes=(planned or {}).get("peak_bytes"),
        ),
        "data": schemas.DataFigures.model_validate(details.checked) if details.checked else None,
        "evaluations": [describe_evaluation(evaluation) for evaluation in details.evaluations],
        "weights_sha256": job.weights_sha256,
        "model_path": str((settings.data_dir / details.model_path).absolute()) if details.model_path else None,
        "loss_curve": details.loss_curve,
    }


def _over_quota(job: Job, details: JobDetails) -> str | None:
    """Why a queued job waits where its organization runs as many as it may."""
    if job.status != JobStatus.QUEUED or details.max_running_jobs is None:
        return None
    num_running = sum(run.organization_id == job.organization_id for state in details.hosts for run in state.running)
    if num_running < details.max_running_jobs:
        return None
    return f"quota: your organization runs {num_running} jobs, as many as it may."


def _host(owner: str) -> str:
    return owner.partition("/")[0]


def _unix(moment: datetime) -> int:
    return int(moment.timestamp())
