"""`/v1/plan`: the memory that a run will take, before it is a job."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import get_args

from fastapi import APIRouter, Depends

from jobs import catalog, reads
from jobs.errors import InvalidRequestError
from jobs.owner import Owner
from jobs.planning import choose, to_setting
from jobs.spec import DEFAULT_BATCH_SIZE, Choosable, RequestedOptions
from lomo_core.config import OptimizerName
from lomo_core.memory.lora import lora_peak_bytes
from lomo_core.memory.model_shapes import ModelShapes
from lomo_core.memory.plan import Plan, Setting, plan
from server import schemas
from server.deps import Caller, PlanBody, ServicesDep, authenticated
from server.services import Services

router = APIRouter(prefix="/v1/plan", dependencies=[Depends(authenticated)])


@router.post("")
def plan_run(body: PlanBody, caller: Caller, services: ServicesDep) -> schemas.Plan:
    """Plan a run. The first plan of a model takes some seconds, further ones none."""
    shapes = services.shapes.read(_config(body, services, owner=caller.view))
    options, auto = (body.lomo or RequestedOptions()).resolve()
    given = body.hyperparameters.batch_size if body.hyperparameters is not None else None
    if given is None:
        auto.insert(0, "batch_size")
    setting = to_setting(options, batch_size=given or DEFAULT_BATCH_SIZE)
    if shapes.max_seq_length is not None and setting.seq_length > shapes.max_seq_length:
        raise InvalidRequestError(
            f"The model takes {shapes.max_seq_length} tokens a row, not {setting.seq_length}: set max_seq_length to "
            f"{shapes.max_seq_length} or less.",
            param="lomo.max_seq_length",
        )
    setting = choose(shapes, setting, auto, reads.largest_room(services.db)) or setting
    return _describe(body.model, shapes, setting, auto, services)


def _config(body: schemas.PlanRequest, services: Services, *, owner: Owner) -> bytes:
    """The model's configuration as JSON.

    Raises:
        InvalidRequestError: there is no such model here, or its configuration is too large.
    """
    if body.model is None:
        raw = json.dumps(body.config, sort_keys=True).encode()
        if len(raw) > catalog.MAX_CONFIG_BYTES:
            raise InvalidRequestError(
                f"A model's configuration has at most {catalog.MAX_CONFIG_BYTES} bytes.", param="config"
            )
        return raw
    source = catalog.resolve_model(services.db, services.settings, owner=owner, name=body.model)
    if source.path is None:
        raise InvalidRequestError(
            f"{body.model} has not been downloaded yet: plan with its config.json in 'config'.", param="model"
        )
    return catalog.read_config(source.path, name=body.model)


def _describe(
    name: str | None, shapes: ModelShapes, setting: Setting, auto: list[Choosable], services: Services
) -> schemas.Plan:
    found = plan(shapes, setting)
    beside: dict[str, int] = {
        optimizer: plan(shapes, replace(setting, optimizer=optimizer)).peak_bytes
        for optimizer in get_args(OptimizerName)
    }
    beside["lora"] = lora_peak_bytes(shapes, setting)
    figures = {key: value for key, value in dataclasses.asdict(found).items() if key not in ("phases", "host_bytes")}
    return schemas.Plan(
        model=name,
        architecture=shapes.architecture,
        num_parameters=shapes.num_parameters,
        batch_size=setting.batch_size,
        max_seq_length=setting.seq_length,
        activation_checkpointing=setting.activation_checkpointing,
        auto=auto,
        phases=[schemas.PlanPhase(**dataclasses.asdict(phase)) for phase in found.phases],
        beside=beside,
        fits=_fits(found, services),
        **figures,
    )


def _fits(found: Plan, services: Services) -> list[schemas.Fit]:
    """Each live host that has measured its memory."""
    fits = []
    for state in reads.list_hosts(services.db):
        host = state.host
        if not state.is_alive or host.available_bytes is None:
            continue
        needed = state.needed_bytes(found.peak_bytes)
        fits.append(
            schemas.Fit(
                host=host.name,
                device_bytes=host.available_bytes,
                needed_bytes=needed,
                ok=needed <= host.available_bytes,
            )
        )
    return fits
