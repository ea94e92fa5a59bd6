"""`/v1/uploads`: files that arrive in parts, as large ones do."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from jobs import quotas, uploads
from jobs.errors import InvalidRequestError
from server import schemas
from server.deps import Caller, CompleteBody, ReceivedPart, ServicesDep, UploadBody, authenticated
from server.describe import describe_part, describe_upload
from server.routes.files import display_name

router = APIRouter(prefix="/v1/uploads", dependencies=[Depends(authenticated)])


@router.post("")
def create_upload(body: UploadBody, caller: Caller, services: ServicesDep) -> schemas.Upload:
    """Begin an upload. What earlier ones left behind goes first, so that it does not take the room of this one."""
    limit = services.settings.max_upload_bytes
    if body.bytes > limit:
        raise InvalidRequestError(
            f"A file of {body.bytes} bytes is too large: this server takes at most {limit} (LOMO_MAX_UPLOAD_BYTES).",
            param="bytes",
        )
    uploads.sweep(services.db, services.settings)
    quotas.measure_models(services.db, organization_id=caller.organization_id, data_dir=services.settings.data_dir)
    upload = uploads.create(
        services.db,
        owner=caller.home,
        filename=display_name(body.filename),
        purpose=schemas.shown_purpose(body.purpose),
        num_bytes=body.bytes,
        file_expires_after_s=None if body.expires_after is None else body.expires_after.seconds,
    )
    return describe_upload(upload)


@router.post("/{upload_id}/parts")
def create_part(incoming: ReceivedPart, services: ServicesDep) -> schemas.UploadPart:
    """Keep a part, which is on disk by now."""
    return describe_part(uploads.add_part(services.db, incoming))


@router.post("/{upload_id}/complete")
def complete_upload(upload_id: str, body: CompleteBody, caller: Caller, services: ServicesDep) -> schemas.Upload:
    """Join the parts into a file, which is checked as one that came in one piece."""
    completion = uploads.Completion(body.part_ids, body.md5.lower() if body.md5 is not None else None)
    upload, file = uploads.complete(
        services.db,
        services.settings,
        owner=caller.view,
        upload_id=upload_id,
        completion=completion,
    )
    return describe_upload(upload, file)


@router.post("/{upload_id}/cancel")
def cancel_upload(upload_id: str, caller: Caller, services: ServicesDep) -> schemas.Upload:
    """End an upload and remove its parts."""
    return describe_upload(uploads.cancel(services.db, services.settings, owner=caller.view, upload_id=upload_id))
