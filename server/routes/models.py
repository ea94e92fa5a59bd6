"""`/v1/models`: the base models of this server and the caller's tuned ones, to be listed, taken away and deleted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Protocol

from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jobs import catalog, checkpoint_names, reads, tuned_models
from jobs.errors import InvalidRequestError, NotFoundError
from lomo_core.errors import ModelError
from lomo_core.gguf.export import GgufModel
from server import schemas
from server.deps import Caller, ServicesDep, authenticated
from server.describe import describe_model
from server.errors import forbidden
from server.services import Services

router = APIRouter(prefix="/v1/models", dependencies=[Depends(authenticated)])


@router.get("")
def list_models(caller: Caller, services: ServicesDep) -> schemas.ModelList:
    """Every model that a job can start from: base models, then tuned ones, newest first."""
    base = list(_base_models(services))
    tuned = reads.list_models(services.db, owner=caller.view)
    return schemas.ModelList(data=[*base, *(describe_model(model) for model in tuned)])


# A name may hold a slash, and clients send it raw. Before the route of one model, which would take it for a name.
@router.get("/{model:path}/export")
def export_model(
    model: str, caller: Caller, services: ServicesDep, query: Annotated[schemas.ExportQuery, Query()]
) -> StreamingResponse:
    """A tuned model, or a checkpoint, to be used elsewhere: with `format=tar` a tar of its Hugging Face folder, for
    vLLM and transformers; with `format=gguf` one GGUF file with the weights as they are stored, for llama.cpp (models
    of the types llama, qwen2 and qwen3).
    """
    if _is_base(services, model):
        raise forbidden(
            f"{model} is a base model of this server: only tuned models and checkpoints are exported.",
            code="base_model",
        )
    folder = catalog.resolve_served_model(services.db, services.settings, owner=caller.view, name=model)
    archive = tuned_models.ModelArchive(folder, name=model)
    if query.format == "tar":
        return _Download(archive, media_type="application/x-tar", file_name="model.tar")
    archive.close()  # it was opened to see whether all of the model is here
    return _Download(_open_gguf(folder, model), media_type="application/octet-stream", file_name="model.gguf")


# A name may hold a slash, and clients send it raw.
@router.delete("/{model:path}")
def delete_model(model: str, caller: Caller, services: ServicesDep) -> schemas.DeletedModel:
    """Remove a tuned model and its files for good."""
    if _is_base(services, model):
        raise forbidden(f"{model} is a base model: whoever runs the server takes it away.", code="base_model")
    tuned_models.delete_model(services.db, services.settings, owner=caller.view, model_id=model)
    return schemas.DeletedModel(id=model)


@router.get("/{model:path}")
def get_model(model: str, caller: Caller, services: ServicesDep) -> schemas.Model:
    """One model by name; a checkpoint, too, as long as its job keeps it."""
    tuned = reads.find_model(services.db, owner=caller.view, model_id=model)
    if tuned is not None:
        return describe_model(tuned)
    for base in _base_models(services):
        if base.id == model:
            return base
    checkpoint = checkpoint_names.find(services.db, owner=caller.view, name=model)
    if checkpoint is not None and checkpoint.created_at is not None:
        created = int(checkpoint.created_at.timestamp())
        return schemas.Model(id=model, created=created, owned_by=caller.organization_id)
    message = f"The model {model!r} does not exist. GET /v1/models lists the models of this server."
    raise NotFoundError(message, code="model_not_found", param="model")


class _Archive(Protocol):
    """A file that is made while it is sent."""

    @property
    def num_bytes(self) -> int: ...

    def chunks(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


class _Download(StreamingResponse):
    """An archive of known length, whose files are closed with the response."""

    def __init__(self, archive: _Archive, *, media_type: str, file_name: str) -> None:
        headers = {
            "Content-Length": str(archive.num_bytes),
            "Content-Disposition": f'attachment; filename="{file_name}"',
        }
        super().__init__(archive.chunks(), media_type=media_type, headers=headers)
        self._archive = archive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the archive until its end, or until the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._archive.close()


def _open_gguf(folder: Path, model: str) -> GgufModel:
    try:
        return GgufModel(folder, name=model)
    except ModelError as error:
        raise InvalidRequestError(
            f"{model} cannot be exported as GGUF: {error.message}. format=tar takes it away as it is.",
            code="unsupported_model",
            param="format",
        ) from error
    except OSError as error:
        raise NotFoundError(
            f"The model {model!r} has just been deleted.", code="model_not_found", param="model"
        ) from error


def _is_base(services: Services, model: str) -> bool:
    return any(base.id == model for base in _base_models(services))


def _base_models(services: Services) -> Iterator[schemas.Model]:
    """Those of the folders, and those of the hub that are allowed by name and that no folder has."""
    local = dict(catalog.base_models(services.settings))
    yield from (_describe_base(name, folder) for name, folder in local.items())
    for name in services.settings.named_hub_models:
        if name not in local:
            # Of when it was made only the hub could tell.
            yield schemas.Model(id=name, created=0, owned_by="huggingface")


def _describe_base(name: str, folder: Path) -> schemas.Model:
    created = int((folder / "config.json").stat().st_mtime)
    return schemas.Model(id=name, created=created, owned_by="base")
