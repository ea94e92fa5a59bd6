"""`/v1/fine_tuning/jobs/{id}/...`: what a job's run has said, measured and saved."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from jobs import reads, series
from jobs.errors import InvalidRequestError
from jobs.ids import parse_event_id
from jobs.spec import read_stored
from server import schemas
from server.deps import Caller, ServicesDep, authenticated, get_watcher
from server.describe import describe_attempt, describe_checkpoint, describe_evaluation, describe_event
from server.sse import EventStreamResponse, stream_events

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", dependencies=[Depends(authenticated)])

_MAX_SEQ_DIGITS = 18  # of 19 in a bigint


@router.get("/events", response_model=None)
def list_events(
    request: Request,
    job_id: str,
    caller: Caller,
    services: ServicesDep,
    query: Annotated[schemas.EventsQuery, Query()],
) -> schemas.EventList | Response:
    """A job's events, newest first; as a stream: oldest first from `after`, live until the job has ended."""
    accepts_stream = "text/event-stream" in request.headers.get("accept", "")
    if not (accepts_stream if query.stream is None else query.stream):
        page = reads.list_events(
            services.db, organization_id=caller.organization_id, job_id=job_id, limit=query.limit, after=query.after
        )
        return schemas.EventList(data=[describe_event(event) for event in page.items], has_more=page.has_more)
    job = reads.get_job(services.db, organization_id=caller.organization_id, job_id=job_id)
    # A browser that connects again sends the header with the first connection's address, so the header wins.
    seq = _read_position(job_id, request.headers.get("last-event-id") or query.after)
    watcher = get_watcher(request, services, caller)
    return EventStreamResponse(stream_events(services.hub, job, watcher=watcher, after=seq, event_pings=query.pings))


@router.get("/checkpoints")
def list_checkpoints(
    job_id: str,
    caller: Caller,
    services: ServicesDep,
    query: Annotated[schemas.CheckpointsQuery, Query()],
) -> schemas.CheckpointList:
    """A job's checkpoints, newest first."""
    job = reads.get_job(services.db, organization_id=caller.organization_id, job_id=job_id)
    page = reads.list_checkpoints(
        services.db, organization_id=caller.organization_id, job_id=job_id, limit=query.limit, after=query.after
    )
    spec = read_stored(job.spec)
    data = [describe_checkpoint(checkpoint, spec) for checkpoint in page.items]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return schemas.CheckpointList(data=data, first_id=first, last_id=last, has_more=page.has_more)


@router.get("/metrics")
def get_metrics(
    job_id: str,
    caller: Caller,
    services: ServicesDep,
    query: Annotated[schemas.MetricsQuery, Query()],
) -> schemas.JobMetrics:
    """A run's series over all steps or a window of them, thinned to `max_points`."""
    job = reads.get_job(services.db, organization_id=caller.organization_id, job_id=job_id)
    columns = series.read_metrics(
        services.db,
        job,
        max_points=query.max_points,
        first_step=query.first_step,
        last_step=query.last_step,
    )
    evaluations = reads.list_evaluations(services.db, job_ids=[job_id])
    attempts = reads.list_attempts(services.db, job_id=job_id)
    return schemas.JobMetrics(
        job_id=job_id,
        columns=columns,
        evaluations=[describe_evaluation(evaluation) for evaluation in evaluations],
        attempts=[describe_attempt(attempt) for attempt in attempts],
    )


def _read_position(job_id: str, text: str | None) -> int:
    """The sequence number in a stream's starting point: a number or an event's id; 0 where there is none.

    Raises:
        InvalidRequestError: it is neither.
    """
    if not text:
        return 0
    if text.isascii() and text.isdecimal() and len(text) <= _MAX_SEQ_DIGITS:
        return int(text)
    seq = parse_event_id(job_id, text)
    if seq is None:
        message = f"A stream of {job_id} starts after the number or the id of one of its events."
        raise InvalidRequestError(message, param="after")
    return seq
