"""`/v1/fine_tuning/jobs`: create, clone, list, watch, get, pause, resume, cancel and delete."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from jobs import catalog, deletion, idempotency, lifecycle, reads, submission
from jobs.catalog import ModelSource
from jobs.errors import InvalidRequestError
from jobs.idempotency import Arrival
from jobs.keys import Principal
from jobs.models import Job
from jobs.planning import PlannedJob, Room, plan_job
from jobs.references import References, ReferredFile, read_references
from jobs.spec import JobSpec
from lomo_core.errors import UnforeseenModelError
from server import schemas
from server.deps import Caller, CloneDep, Creation, CreationDep, ServicesDep, authenticated, get_watcher
from server.describe import describe_job, describe_jobs, describe_new_job
from server.services import Services
from server.sse import EventStreamResponse, stream_jobs

router = APIRouter(prefix="/v1/fine_tuning/jobs", dependencies=[Depends(authenticated)])

_METADATA_PARAMETER = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_MAX_PARAM_CHARS = 74  # metadata[], and 64 of a key


@router.post("", response_model=schemas.FineTuningJob)
async def create_job(creation: CreationDep, caller: Caller, services: ServicesDep) -> Response:
    """Queue a job, once for one request (`jobs/idempotency.py`)."""
    body = creation.body
    file_ids = [file_id for file_id in (body.training_file, body.validation_file) if file_id is not None]
    references = await read_references(services.reads, owner=caller.view, file_ids=file_ids)
    job, is_new = await run_in_threadpool(_submit_once, services, caller, creation, references)
    if is_new:
        services.doorbell.ask()
    headers = {} if is_new else {"Idempotent-Replayed": "true"}
    return Response(job.model_dump_json(), media_type="application/json", headers=headers)


@router.get("", response_model=None, responses={200: {"model": schemas.JobList}})
def list_jobs(
    request: Request,
    caller: Caller,
    services: ServicesDep,
    query: Annotated[schemas.JobsQuery, Query()],
) -> schemas.JobList | Response:
    """The caller's jobs, newest first; as a stream: a page of them, then each that changes."""
    with_curve = "loss_curve" in query.include
    metadata = _read_metadata_filter(request)
    if query.stream:
        if query.after is not None or metadata is not None or query.project_id is not None:
            message = "A stream of jobs takes neither 'after' nor 'metadata' nor 'project_id'."
            raise InvalidRequestError(message, param="stream")
        watcher = get_watcher(request, services, caller)
        return EventStreamResponse(stream_jobs(services.hub, watcher=watcher, limit=query.limit, with_curve=with_curve))
    page = reads.list_jobs(
        services.db,
        owner=caller.view,
        limit=query.limit,
        after=query.after,
        metadata=metadata,
        project_id=query.project_id,
    )
    data = describe_jobs(services.db, services.settings, page.items, with_curve=with_curve)
    return schemas.JobList(data=data, has_more=page.has_more)


@router.get("/{job_id}", response_model=schemas.FineTuningJob)
async def get_job(job_id: str, caller: Caller, services: ServicesDep) -> Response:
    """One job. It is what clients ask for most often, and so is written out here: FastAPI would check it once more."""
    job = await describe_job(services.db, services.reads, services.settings, owner=caller.view, job_id=job_id)
    return Response(job.model_dump_json(), media_type="application/json")


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, caller: Caller, services: ServicesDep) -> schemas.FineTuningJob:
    """Cancel a job: at once where it waits, by its worker where it runs (`lomo.cancel_requested` until then)."""
    job = lifecycle.request_cancel(services.db, owner=caller.view, job_id=job_id)
    return describe_jobs(services.db, services.settings, [job])[0]


@router.post("/{job_id}/pause")
def pause_job(job_id: str, caller: Caller, services: ServicesDep) -> schemas.FineTuningJob:
    """Pause a job: at once where it is queued, by its worker where it runs (`lomo.pause_requested` until then)."""
    job = lifecycle.request_pause(services.db, owner=caller.view, job_id=job_id)
    return describe_jobs(services.db, services.settings, [job])[0]


@router.post("/{job_id}/resume")
def resume_job(job_id: str, caller: Caller, services: ServicesDep) -> schemas.FineTuningJob:
    """Queue a paused job again; it goes on from its last checkpoint."""
    job = lifecycle.resume(services.db, owner=caller.view, job_id=job_id)
    services.doorbell.ask()
    return describe_jobs(services.db, services.settings, [job])[0]


@router.post("/{job_id}/clone", response_model=schemas.FineTuningJob)
async def clone_job(clone: CloneDep, caller: Caller, services: ServicesDep) -> Response:
    """Queue a job like another one, with other options where the body names some; once for one request."""
    return await create_job(clone, caller, services)


@router.delete("/{job_id}")
def delete_job(job_id: str, caller: Caller, services: ServicesDep) -> schemas.DeletedJob:
    """Remove a job that has ended: what is known of it, its models, and its folder."""
    bytes_freed = deletion.delete_job(
        services.db, owner=caller.view, job_id=job_id, runs_dir=services.settings.runs_dir
    )
    return schemas.DeletedJob(id=job_id, bytes_freed=bytes_freed)


def _submit_once(
    services: Services, caller: Principal, creation: Creation, references: References
) -> tuple[schemas.FineTuningJob, bool]:
    """The job of a request, and whether it is new."""
    arrival = idempotency.arrive(services.db, creation.identity)
    if arrival is not None and arrival.job is not None:
        job, is_new = arrival.job, False
    else:
        job, is_new = _submit(services, caller, creation.body, references, arrival)
    if is_new:
        return describe_new_job(services.db, services.settings, job), True
    return describe_jobs(services.db, services.settings, [job])[0], False


def _submit(
    services: Services, caller: Principal, body: schemas.CreateJob, references: References, arrival: Arrival | None
) -> tuple[Job, bool]:
    """Check, plan and queue a job. Returns it, and False where another try of the same request was faster."""
    spec = body.to_spec()
    _check_integrations(spec, services.settings.integrations)
    source = catalog.resolve_model(services.db, services.settings, owner=caller.view, name=spec.model)
    spec = _check_files(spec, references.files)
    planned = replace(
        _plan(services, spec, source, references.room),
        check_files=services.settings.data_checks,
        file_ids=tuple(references.files),
    )
    owner, key_id, metadata = caller.home, caller.api_key_id, body.metadata or {}
    if arrival is None:
        job = submission.submit(services.db, planned=planned, owner=owner, api_key_id=key_id, metadata=metadata)
        return job, True
    return submission.submit_once(
        services.db, arrival, planned=planned, owner=owner, api_key_id=key_id, metadata=metadata
    )


def _plan(services: Services, spec: JobSpec, source: ModelSource, room: Room | None) -> PlannedJob:
    """The job with its memory planned; without a plan where the model has to be downloaded first, or where its memory
    cannot be foreseen.

    Raises:
        WontFitError: no host can hold it.
        InvalidRequestError: the model's configuration cannot be used.
        BusyError: several other models are being read.
    """
    if source.path is None:
        return PlannedJob(spec=spec, why_unplanned="its model has not been downloaded yet")
    config = catalog.read_config(source.path, name=spec.model)
    try:
        shapes = services.shapes.read(config)
    except InvalidRequestError as error:
        if error.code != UnforeseenModelError.code:
            raise
        return PlannedJob(spec=spec, why_unplanned=error.message)
    return plan_job(shapes, spec, room)


def _check_integrations(spec: JobSpec, allowed: Sequence[str]) -> None:
    """See that whoever runs the server lets its jobs be told of where this one asks for.

    Raises:
        InvalidRequestError: not there.
    """
    for place, integration in enumerate(spec.integrations):
        if integration.type not in allowed:
            raise InvalidRequestError(
                f"This server allows no integration of type {integration.type!r}: leave it out, or ask whoever runs "
                "the server to name it in LOMO_INTEGRATIONS.",
                code="integration_not_allowed",
                param=f"integrations.{place}.type",
            )


def _check_files(spec: JobSpec, files: Mapping[str, ReferredFile]) -> JobSpec:
    """See that the files exist and may be trained on. Returns the job with its files' formats.

    Raises:
        InvalidRequestError: one does not or may not; `param` says which.
    """
    formats = {}
    for param, file_id in (("training_file", spec.training_file), ("validation_file", spec.validation_file)):
        if file_id is None:
            continue
        file = files.get(file_id)
        if file is None:
            raise InvalidRequestError(
                f"There is no file {file_id!r}: upload it with POST /v1/files first.",
                code="file_not_found",
                param=param,
            )
        if file.purpose != "fine-tune":
            raise InvalidRequestError(
                f"The file {file_id} was uploaded for {file.purpose!r}: upload it with purpose fine-tune.",
                code="invalid_file_purpose",
                param=param,
            )
        # A file to train on without rows is plain text (jobs/file_check.py); of rows the first says what they are.
        formats[param.replace("_file", "_format")] = "plain" if file.num_lines is None else "auto"
    return spec.model_copy(update=formats)


def _read_metadata_filter(request: Request) -> dict[str, str] | None:
    """`metadata[key]=value` pairs of the query; `metadata=null` asks for jobs without any.

    Raises:
        InvalidRequestError: it is neither; left out, every job would come for those that were asked for.
    """
    pairs: dict[str, str] = {}
    asks_for_none = False
    for name, value in request.query_params.multi_items():
        if match := _METADATA_PARAMETER.fullmatch(name):
            if pairs.setdefault(match[1], value) != value:
                raise InvalidRequestError("No job has two values of one key.", param=name[:_MAX_PARAM_CHARS])
        elif (name, value) == ("metadata", "null"):
            asks_for_none = True
        elif name == "metadata" or name.startswith("metadata["):
            raise InvalidRequestError("Filter by metadata[key]=value or metadata=null.", param="metadata")
    if asks_for_none and pairs:
        raise InvalidRequestError("Filter by metadata[key]=value or by metadata=null, not by both.", param="metadata")
    return {} if asks_for_none else pairs or None
