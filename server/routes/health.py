"""`/healthz`: the process lives. `/readyz`: a job that is submitted now would be run. Both need no key."""

from __future__ import annotations

from fastapi import APIRouter, Response

from jobs import reads
from jobs.db import UNREACHABLE
from jobs.reads import Readiness
from server import schemas
from server.deps import ServicesDep

router = APIRouter()

_OK = "ok"


@router.get("/healthz")
async def get_health() -> dict[str, str]:
    """Always well while the process answers; without a thread, so that it answers when all of them are busy."""
    return {"status": _OK}


@router.get("/readyz")
def get_readiness(services: ServicesDep, response: Response) -> schemas.Readiness:
    """200 where the database, a worker and the reaper are there, else 503 and which of them is not."""
    try:
        checks = _check(reads.read_readiness(services.db), services.schema_revision)
    except UNREACHABLE:
        checks = {"database": "does not answer"}
    is_ready = all(state == _OK for state in checks.values())
    if not is_ready:
        response.status_code = 503
    return schemas.Readiness(status="ready" if is_ready else "not_ready", checks=checks)


def _check(found: Readiness, head: str) -> dict[str, str]:
    schema = f"at {found.schema_revision or 'nothing'}, needs {head}: run `python -m jobs migrate`"
    return {
        "database": _OK,
        "schema": _OK if found.schema_revision == head else schema,
        "worker": _state(found.worker_seen_s, "no worker has been seen"),
        "reaper": _state(found.reaper_ticked_s, "Celery beat has not ticked"),
    }


def _state(silent_s: float | None, what: str) -> str:
    if silent_s is None:
        return f"{what} yet"
    return _OK if silent_s <= reads.ALIVE_WITHIN_S else f"{what} for {silent_s:.0f} s"
