"""`/v1/files`: uploads that jobs train on."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Annotated, get_args
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.datastructures import FormData, UploadFile

from jobs import files, quotas, reads
from jobs.errors import InvalidRequestError
from jobs.file_expiry import MAX_SECONDS, MIN_SECONDS
from jobs.models import File
from server import schemas
from server.deps import Caller, ServicesDep, UploadForm, authenticated
from server.describe import describe_file
from server.errors import ApiError
from server.schemas import Purpose

router = APIRouter(prefix="/v1/files", dependencies=[Depends(authenticated)])

# The longest file name of common file systems.
_MAX_FILENAME_CHARS = 255
# Of a byte, no number has more digits.
_RANGE = re.compile(r"(\d{0,18})-(\d{0,18})", re.ASCII)
_RANGES = re.compile(r"bytes=\s*\d{0,18}-\d{0,18}(\s*,\s*\d{0,18}-\d{0,18})*\s*", re.ASCII)
# What the clients make of `expires_after` in a form.
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"


@router.post("")
def create_file(form: UploadForm, caller: Caller, services: ServicesDep) -> schemas.FileObject:
    """Store an upload. Its lines are checked on the way to disk if it is to train on."""
    upload, purpose, expires_after_s = _read_form(form)
    quotas.measure_models(services.db, organization_id=caller.organization_id, data_dir=services.settings.data_dir)
    file = files.store_file(
        services.db,
        upload.file,
        files_dir=services.settings.files_dir,
        storage_url=services.settings.storage_url,
        owner=caller.home,
        filename=display_name(upload.filename or ""),
        purpose=schemas.shown_purpose(purpose),
        expires_after_s=expires_after_s,
    )
    return describe_file(file)


@router.get("")
def list_files(
    caller: Caller,
    services: ServicesDep,
    query: Annotated[schemas.FilesQuery, Query()],
) -> schemas.FileList:
    """The caller's files."""
    page = reads.list_files(
        services.db,
        owner=caller.view,
        limit=query.limit,
        after=query.after,
        purpose=None if query.purpose is None else schemas.shown_purpose(query.purpose),
        project_id=query.project_id,
        ascending=query.order == "asc",
    )
    data = [describe_file(file) for file in page.items]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return schemas.FileList(data=data, first_id=first, last_id=last, has_more=page.has_more)


@router.get("/{file_id}")
def get_file(file_id: str, caller: Caller, services: ServicesDep) -> schemas.FileObject:
    """One file's description."""
    return describe_file(reads.get_file(services.db, owner=caller.view, file_id=file_id))


@router.get("/{file_id}/content", response_class=FileResponse)
def get_content(request: Request, file_id: str, caller: Caller, services: ServicesDep) -> Response:
    """One file's bytes, always as a download: a page in it must not run on our origin."""
    file = reads.get_file(services.db, owner=caller.view, file_id=file_id)
    content = files.read_content(file, data_dir=services.settings.data_dir)
    media_type = "application/octet-stream"
    if isinstance(content, Path):
        _check_range(request, num_bytes=file.num_bytes)
        return FileResponse(content, media_type=media_type, filename=file.filename)
    return StreamingResponse(content, media_type=media_type, headers=_headers_of_object(file))


@router.head("/{file_id}/content", response_class=Response)
def get_content_head(request: Request, file_id: str, caller: Caller, services: ServicesDep) -> Response:
    """How long one file's bytes are, and whether ranges are given, which downloads ask before they begin or go on."""
    file = reads.get_file(services.db, owner=caller.view, file_id=file_id)
    if files.stored_path(file, data_dir=services.settings.data_dir) is not None:
        return get_content(request, file_id, caller, services)
    return Response(media_type="application/octet-stream", headers=_headers_of_object(file))


@router.delete("/{file_id}")
def delete_file(file_id: str, caller: Caller, services: ServicesDep) -> schemas.DeletedFile:
    """Remove a file that no unfinished job needs."""
    file = reads.get_file(services.db, owner=caller.view, file_id=file_id)
    files.delete_file(services.db, file, data_dir=services.settings.data_dir)
    return schemas.DeletedFile(id=file.id)


def _headers_of_object(file: File) -> dict[str, str]:
    """Of the bytes of a file that lies in an object store."""
    return {
        "Content-Disposition": f"attachment; filename*=utf-8''{quote(file.filename, safe='')}",
        "Content-Length": str(file.num_bytes),
    }


def display_name(filename: str) -> str:
    """The uploader's name for a file, fit to be shown: the last part of a path, without control characters."""
    name = filename.replace("\\", "/").rpartition("/")[2]
    # Cc: control, Cf: such as marks that turn the direction of writing, Cs: halves of characters.
    printable = "".join("_" if unicodedata.category(char) in {"Cc", "Cf", "Cs"} else char for char in name)
    return printable[:_MAX_FILENAME_CHARS] or "upload"


def _check_range(request: Request, *, num_bytes: int) -> None:
    """Leave out a Range header that is none, as RFC 9110 (14.2) wants it, or that is partly beyond the file.

    Raises:
        ApiError: 416, none of the file's bytes are in it.
    """
    header = request.headers.get("range")
    if header is None:
        return
    ranges = [(first, last) for first, last in _RANGE.findall(header) if first or last]
    is_one = _RANGES.fullmatch(header) and all(not (a and b) or int(a) <= int(b) for a, b in ranges)
    is_beyond = [int(first) >= num_bytes if first else int(last) == 0 for first, last in ranges]
    if not is_one or not ranges or (any(is_beyond) and not all(is_beyond)):
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    elif all(is_beyond):
        headers = {"Content-Range": f"bytes */{num_bytes}"}
        raise ApiError(416, f"The file has {num_bytes} bytes.", code="range_not_satisfiable", headers=headers)


def _read_form(form: FormData) -> tuple[UploadFile, Purpose, int | None]:
    """The fields of an upload; the last says after how many seconds it expires.

    Raises:
        InvalidRequestError: one is missing or wrong, or there is another.
    """
    unknown = sorted(set(form.keys()) - {"file", "purpose", _ANCHOR, _SECONDS})
    if unknown:
        raise InvalidRequestError(
            f"The field {unknown[0][:64]!r} is not supported.", code="unknown_parameter", param=unknown[0][:64]
        )
    upload, purpose = form.get("file"), form.get("purpose")
    if not isinstance(upload, UploadFile):
        raise InvalidRequestError(
            "Send the file as multipart form data in the field 'file'.", code="missing_required_parameter", param="file"
        )
    for known in get_args(Purpose):
        if purpose == known:
            return upload, known, _read_expiry(form)
    purposes = ", ".join(get_args(Purpose))
    raise InvalidRequestError(f"The field 'purpose' must be one of: {purposes}.", param="purpose")


def _read_expiry(form: FormData) -> int | None:
    """The seconds of `expires_after`, which a form has as two fields; None: it has neither.

    Raises:
        InvalidRequestError: one of them is missing, or wrong.
    """
    if _ANCHOR not in form and _SECONDS not in form:
        return None
    for field, param in ((_ANCHOR, "expires_after.anchor"), (_SECONDS, "expires_after.seconds")):
        if field not in form:
            raise InvalidRequestError(
                f"Send the field {field!r} as well: a file expires so many seconds after an anchor.",
                code="missing_required_parameter",
                param=param,
            )
    if form[_ANCHOR] != "created_at":
        raise InvalidRequestError(f"The field {_ANCHOR!r} must be 'created_at'.", param="expires_after.anchor")
    text = form[_SECONDS]
    # Seven digits, as the highest number has.
    if isinstance(text, str) and re.fullmatch("[0-9]{1,7}", text) and MIN_SECONDS <= int(text) <= MAX_SECONDS:
        return int(text)
    raise InvalidRequestError(
        f"The field {_SECONDS!r} must be a number from {MIN_SECONDS} to {MAX_SECONDS}.", param="expires_after.seconds"
    )
