"""`/v1/queue`: where the caller's jobs stand, and when they may start."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from jobs import queue_order, reads
from jobs.job_details import read_details
from server import schemas
from server.deps import Caller, ServicesDep, authenticated
from server.describe import describe_queued, eta_s

router = APIRouter(prefix="/v1/queue", dependencies=[Depends(authenticated)])


@router.get("")
def get_queue(caller: Caller, services: ServicesDep, query: Annotated[schemas.QueueQuery, Query()]) -> schemas.Queue:
    """The caller's queued jobs, first to last; of other jobs it tells the number alone."""
    db = services.db
    places = queue_order.read_places(db)
    running = queue_order.list_running(db)
    details = read_details(db, job_ids=[job.id for job in running])
    now = datetime.now(UTC)
    left_s = {job.id: eta_s(job, step_s=details[job.id].step_s, now=now) for job in running}
    hosts = reads.list_hosts(db)
    starts = queue_order.foretell(places, hosts, left_s=left_s, now=now)
    own = [(n, place.job_id) for n, place in enumerate(places, 1) if caller.view.has(place)]
    shown = {job_id: position for position, job_id in own[: query.limit]}
    jobs = reads.find_jobs(db, owner=caller.view, job_ids=list(shown))
    return schemas.Queue(
        num_queued=len(places),
        num_running=len(running),
        has_more=len(own) > len(shown),
        data=[
            describe_queued(job, position=shown[job.id], start_s=starts.get(job.id), hosts=hosts, now=now)
            for job in sorted(jobs, key=lambda job: shown[job.id])
        ],
    )
