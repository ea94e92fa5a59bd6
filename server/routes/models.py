"""`/v1/models`: the base models of this server and the caller's tuned ones, to be listed, taken away and deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jobs import catalog, reads, tuned_models
from jobs.errors import NotFoundError
from server import schemas
from server.deps import Caller, ServicesDep, authenticated
from server.describe import describe_model
from server.errors import forbidden
from server.services import Services

router = APIRouter(prefix="/v1/models", dependencies=[Depends(authenticated)])


@router.get("")
def list_models(caller: Caller, services: ServicesDep) -> schemas.ModelList:
    """Every model that a job can start from: base models, then tuned ones, newest first."""
    base = [_describe_base(name, folder) for name, folder in catalog.base_models(services.settings)]
    tuned = reads.list_models(services.db, organization_id=caller.organization_id)
    return schemas.ModelList(data=[*base, *(describe_model(model) for model in tuned)])


# A name may hold a slash, and clients send it raw. Before the route of one model, which would take it for a name.
@router.get("/{model:path}/export")
def export_model(
    model: str, caller: Caller, services: ServicesDep, query: Annotated[schemas.ExportQuery, Query()]
) -> StreamingResponse:
    """A tuned model, or a checkpoint, as a tar of a Hugging Face folder."""
    del query  # one form so far
    if _is_base(services, model):
        raise forbidden(
            f"{model} is a base model of this server: only tuned models and checkpoints are exported.",
            code="base_model",
        )
    folder = catalog.resolve_served_model(
        services.db, services.settings, organization_id=caller.organization_id, name=model
    )
    return _Download(tuned_models.ModelArchive(folder, name=model))


# A name may hold a slash, and clients send it raw.
@router.delete("/{model:path}")
def delete_model(model: str, caller: Caller, services: ServicesDep) -> schemas.DeletedModel:
    """Remove a tuned model and its files for good."""
    if _is_base(services, model):
        raise forbidden(
            f"{model} is a base model: whoever runs the server removes it, by removing its folder.", code="base_model"
        )
    tuned_models.delete_model(services.db, services.settings, organization_id=caller.organization_id, model_id=model)
    return schemas.DeletedModel(id=model)


@router.get("/{model:path}")
def get_model(model: str, caller: Caller, services: ServicesDep) -> schemas.Model:
    """One model by name."""
    tuned = reads.find_model(services.db, organization_id=caller.organization_id, model_id=model)
    if tuned is not None:
        return describe_model(tuned)
    for name, folder in catalog.base_models(services.settings):
        if name == model:
            return _describe_base(name, folder)
    message = f"The model {model!r} does not exist. GET /v1/models lists the models of this server."
    raise NotFoundError(message, code="model_not_found", param="model")


class _Download(StreamingResponse):
    """An archive of known length, whose files are closed with the response."""

    def __init__(self, archive: tuned_models.ModelArchive) -> None:
        headers = {"Content-Length": str(archive.num_bytes), "Content-Disposition": 'attachment; filename="model.tar"'}
        super().__init__(archive.chunks(), media_type="application/x-tar", headers=headers)
        self._archive = archive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the archive until its end, or until the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._archive.close()


def _is_base(services: Services, model: str) -> bool:
    return any(name == model for name, _ in catalog.base_models(services.settings))


def _describe_base(name: str, folder: Path) -> schemas.Model:
    created = int((folder / "config.json").stat().st_mtime)
    return schemas.Model(id=name, created=created, owned_by="base")
