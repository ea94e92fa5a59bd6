"""`/v1/fine_tuning/jobs/{id}/...`: what a job's run has said, measured and saved."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from jobs import reads, runlog, series
from jobs.errors import InvalidRequestError
from jobs.ids import parse_event_id, parse_log_line_id
from jobs.keys import Principal
from jobs.spec import read_stored
from server import schemas
from server.deps import Caller, ServicesDep, authenticated, get_watcher
from server.describe import (
    describe_attempt,
    describe_checkpoint,
    describe_evaluation,
    describe_event,
    describe_log_line,
)
from server.feeds import EVENTS, LOG, POINTS, Feed
from server.services import Services
from server.sse import EventStreamResponse, stream_feed

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", dependencies=[Depends(authenticated)])

_MAX_SEQ_DIGITS = 18  # of 19 in a bigint
_QUALITY = re.compile(r"(0(\.[0-9]{0,3})?|1(\.0{0,3})?)")


@router.get("/events", response_model=None, responses={200: {"model": schemas.EventList}})
def list_events(
    request: Request,
    job_id: str,
    caller: Caller,
    services: ServicesDep,
    query: Annotated[schemas.EventsQuery, Query()],
) -> schemas.EventList | Response:
    """A job's events, newest first; as a stream: oldest first from `after`, live until the job has ended."""
    if not _asks_for_stream(request, query.stream):
        page = reads.list_events(services.db, owner=caller.view, job_id=job_id, limit=query.limit, after=query.after)
        return schemas.EventList(data=[describe_event(event) for event in page.items], has_more=page.has_more)
    return _stream(EVENTS, request, job_id, caller, services, query=query)


@router.get("/logs", response_model=None, responses={200: {"model": schemas.LogList}})
def list_logs(
    request: Request,
    job_id: str,
    caller: Caller,
    services: ServicesDep,
    query: Annotated[schemas.LogsQuery, Query()],
) -> schemas.LogList | Response:
    """The lines that a job's engines printed, newest first; as a stream: oldest first, live until the job has ended."""
    if _asks_for_stream(request, query.stream):
        return _stream(LOG, request, job_id, caller, services, query=query)
    before = _read_position(LOG, job_id, query.after) if query.after else None
    page = runlog.list_lines(services.db, owner=caller.view, job_id=job_id, limit=query.limit, before=before)
    return schemas.LogList(data=[describe_log_line(line) for line in page.items], has_more=page.has_more)


@router.get("/checkpoints")
def list_checkpoints(
    job_id: str,
    caller: Caller,
    services: ServicesDep,
    query: Annotated[schemas.CheckpointsQuery, Query()],
) -> schemas.CheckpointList:
    """A job's checkpoints, newest first."""
    job = reads.get_job(services.db, owner=caller.view, job_id=job_id)
    page = reads.list_checkpoints(services.db, owner=caller.view, job_id=job_id, limit=query.limit, after=query.after)
    spec = read_stored(job.spec)
    accuracies = reads.accuracies_at(services.db, job_id=job_id, steps=[item.step for item in page.items])
    data = [describe_checkpoint(item, spec, accuracies.get(item.step, (None, None))) for item in page.items]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return schemas.CheckpointList(data=data, first_id=first, last_id=last, has_more=page.has_more)


@router.get("/metrics", response_model=None, responses={200: {"model": schemas.JobMetrics}})
def get_metrics(
    request: Request,
    job_id: str,
    caller: Caller,
    services: ServicesDep,
    query: Annotated[schemas.MetricsQuery, Query()],
) -> schemas.JobMetrics | Response:
    """A run's series over all steps or a window of them, thinned to `max_points`; as a stream: each point, live."""
    if _asks_for_stream(request, query.stream):
        return _stream(POINTS, request, job_id, caller, services, query=query)
    job = reads.get_job(services.db, owner=caller.view, job_id=job_id)
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


def _asks_for_stream(request: Request, stream: bool | None) -> bool:
    """Whether the answer is to be a stream: as the query says, else where the Accept header prefers one to JSON."""
    if stream is not None:
        return stream
    accepted = dict(map(_read_media_range, request.headers.get("accept", "").split(",")))
    return accepted.get("text/event-stream", 0.0) > accepted.get("application/json", 0.0)


def _read_media_range(text: str) -> tuple[str, float]:
    """A media type and how much it is wanted, 0 to 1 (RFC 9110, 12.5.1). What is no number counts as not given."""
    name, *parameters = (part.strip().lower() for part in text.split(";"))
    quality = next((part.removeprefix("q=") for part in parameters if part.startswith("q=")), "1")
    return name, float(quality) if _QUALITY.fullmatch(quality) else 1.0


def _stream(
    feed: Feed,
    request: Request,
    job_id: str,
    caller: Principal,
    services: Services,
    *,
    query: schemas.EventsQuery | schemas.LogsQuery | schemas.MetricsQuery,
) -> EventStreamResponse:
    """Follow a job from where the client was, or from the beginning.

    Raises:
        NotFoundError: no such job that the caller sees.
        InvalidRequestError: where the client was is not a place of this feed.
        ApiError: there is no room for another stream.
    """
    job = reads.get_job(services.db, owner=caller.view, job_id=job_id)
    # A browser that connects again sends the header with the first connection's address, so the header wins.
    seq = _read_position(feed, job_id, request.headers.get("last-event-id") or query.after)
    watcher = get_watcher(request, services, caller)
    return EventStreamResponse(
        stream_feed(services.hub, feed, job, watcher=watcher, after=seq, event_pings=query.pings)
    )


def _read_position(feed: Feed, job_id: str, text: str | None) -> int:
    """The number in a starting point, which is a number or the id of an event (or of a log's line); 0 where there is
    none.

    Raises:
        InvalidRequestError: it is neither.
    """
    if not text:
        return 0
    if text.isascii() and text.isdecimal() and len(text) <= _MAX_SEQ_DIGITS:
        return int(text)
    seq = parse_log_line_id(job_id, text) if feed is LOG else parse_event_id(job_id, text)
    if seq is None:
        what = "a line of its log" if feed is LOG else "one of its events"
        raise InvalidRequestError(f"{job_id} is read after the number or the id of {what}.", param="after")
    return seq
