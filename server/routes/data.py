"""What is known of a job's data before it runs: the report on its files, and single rows as the run will see them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from jobs import catalog, checking, files, reads, row_preview
from jobs.errors import InvalidRequestError, NotFoundError
from server import schemas
from server.deps import Caller, ServicesDep, authenticated

router = APIRouter(prefix="/v1", dependencies=[Depends(authenticated)])


@router.get("/fine_tuning/jobs/{job_id}/data_report")
def get_data_report(job_id: str, caller: Caller, services: ServicesDep) -> schemas.DataReport:
    """What the check of a job's files has found."""
    report = checking.find_job_report(services.db, owner=caller.view, job_id=job_id)
    if report is None:
        raise NotFoundError(
            f"There is no report on the files of {job_id}: they are still being checked, or were not.",
            code="report_not_found",
        )
    return schemas.DataReport(job_id=job_id, **report)


@router.get("/files/{file_id}/report")
def get_file_report(file_id: str, caller: Caller, services: ServicesDep) -> schemas.FileReport:
    """The newest report on a file, by a job that was to use it."""
    file = reads.get_file(services.db, owner=caller.view, file_id=file_id)
    found = checking.find_file_report(services.db, file, owner=caller.view)
    if found is None:
        raise NotFoundError(
            f"There is no report on {file_id}: it is made when a job with this file is created.",
            code="report_not_found",
        )
    check, report = found
    assert check.checked_at is not None  # noqa: S101 - a report is stored with its time
    return schemas.FileReport(
        file_id=file_id, job_id=check.job_id, checked_at=int(check.checked_at.timestamp()), report=report
    )


@router.get("/files/{file_id}/preview")
def preview_row(
    file_id: str, caller: Caller, services: ServicesDep, query: Annotated[schemas.PreviewQuery, Query()]
) -> schemas.RowPreview:
    """One row of a file as text and tokens, by a model's chat template and tokenizer."""
    file = reads.get_file(services.db, owner=caller.view, file_id=file_id)
    if file.purpose != "fine-tune":
        raise InvalidRequestError(f"The file {file_id} is not one to train on.", code="invalid_file_purpose")
    source = catalog.resolve_model(services.db, services.settings, owner=caller.view, name=query.model)
    if source.path is None:
        raise InvalidRequestError(
            f"The model {query.model!r} has not been downloaded yet.", code="model_not_found", param="model"
        )
    copy = files.local_rows(file, data_dir=services.settings.data_dir, num_rows=query.row)
    with services.previews.take(), copy as path:
        config = row_preview.limited(
            {
                "train_path": str(path.absolute()),
                "model_path": str(source.path.absolute()),
                "format": "plain" if file.num_lines is None else "auto",
                **query.model_dump(include={"row", "max_seq_length", "train_on"}),
            }
        )
        return schemas.RowPreview(file_id=file_id, model=query.model, **row_preview.preview_row(config))
