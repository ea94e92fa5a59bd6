"""`/metrics`: the service in numbers, for Prometheus (server/prometheus.py). A key is needed, as everywhere."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.deps import ServicesDep, authenticated

router = APIRouter(dependencies=[Depends(authenticated)])


@router.get("/metrics")
def get_metrics(services: ServicesDep) -> Response:
    """Requests, jobs, hosts and memory, of all organizations together."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)
