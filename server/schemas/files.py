"""OpenAI's `file`, and uploads in parts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from jobs.file_expiry import MAX_SECONDS, MIN_SECONDS
from jobs.status import UploadStatus
from jobs.uploads import MAX_PARTS
from server.schemas.base import Answer, EdgedPage, Request


class FileObject(Answer):
    """OpenAI's `file`; `num_lines`, `sha256` and `project_id` are ours."""

    object: Literal["file"] = "file"
    id: str
    bytes: int
    created_at: int
    expires_at: int | None
    """From when on it is not there any more; None: it stays until it is deleted."""
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    num_lines: int | None
    sha256: str
    project_id: str | None


class DeletedFile(Answer):
    """The answer to the deletion of a file."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileList(EdgedPage):
    """A page of files."""

    data: list[FileObject]


# OpenAI's purposes of an upload. Only fine-tune is used here; the others are kept as they are.
Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]


def shown_purpose(purpose: str) -> str:
    """The purpose that a file is kept and shown with. Clients may ask for `evals`, but OpenAI's type of a file does not
    know it, and a client that holds answers against its types could list no files any more."""
    return "user_data" if purpose == "evals" else purpose


class ExpiresAfter(Request):
    """How long the file is to be there."""

    anchor: Literal["created_at"]
    """Since when: of an upload, since its completion makes the file."""
    seconds: Annotated[int, Field(ge=MIN_SECONDS, le=MAX_SECONDS)]


class CreateUpload(Request):
    """The body of `POST /v1/uploads`."""

    filename: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    purpose: Purpose
    bytes: Annotated[int, Field(ge=1)]
    mime_type: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    """Nothing here depends on it: clients name any type for JSON lines."""
    expires_after: ExpiresAfter | None = None


class CompleteUpload(Request):
    """The body of `POST /v1/uploads/{id}/complete`."""

    part_ids: Annotated[list[Annotated[str, StringConstraints(max_length=64)]], Field(max_length=MAX_PARTS)]
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


class Upload(Answer):
    """OpenAI's `upload`."""

    object: Literal["upload"] = "upload"
    id: str
    bytes: int
    """Of the whole file, as announced."""
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: UploadStatus
    file: FileObject | None
    """Once it is completed, until the file is deleted."""


class UploadPart(Answer):
    """OpenAI's `upload.part`."""

    object: Literal["upload.part"] = "upload.part"
    id: str
    created_at: int
    upload_id: str
