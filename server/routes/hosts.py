"""`/v1/hosts`: the worker hosts, their memory, and what the caller runs there."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from jobs import reads
from server import schemas
from server.deps import Caller, ServicesDep, authenticated
from server.describe import describe_host

router = APIRouter(prefix="/v1/hosts", dependencies=[Depends(authenticated)])


@router.get("")
def list_hosts(caller: Caller, services: ServicesDep) -> schemas.HostList:
    """Every worker host that was ever seen, by name."""
    states = reads.list_hosts(services.db)
    return schemas.HostList(data=[describe_host(state, owner=caller.view) for state in states])
