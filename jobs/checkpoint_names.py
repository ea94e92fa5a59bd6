"""The names of what jobs have made. A tuned model's ends with 8 digits of its job's id (`ids.tuned_model_id`). A
checkpoint is called after the model that its job makes and its step, `ft:...:ckpt-step-88`, so that it needs no column:
the digits lead to the job, whose row tells what the rest has to be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from jobs.db import Database
from jobs.errors import InvalidRequestError
from jobs.ids import tuned_model_id
from jobs.models import Checkpoint, Job
from jobs.owner import Owner
from jobs.spec import ForeignSpec, JobSpec, read_stored

# A step has at most 18 of the 19 digits of a bigint.
_NAME = re.compile(r"ft:.*:([0-9a-f]{8})(?::ckpt-step-([0-9]{1,18}))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class NamedCheckpoint:
    """What a name stands for; `path`, relative to the data folder, and the time are None where the checkpoint is no
    longer kept."""

    job_id: str
    path: str | None
    created_at: datetime | None


def checkpoint_name(spec: JobSpec | ForeignSpec, *, job_id: str, step: int) -> str:
    """The API's name for a checkpoint, under which another job may start from it."""
    name = tuned_model_id(base_model=spec.model or "unknown", suffix=spec.suffix, job_id=job_id)
    return f"{name}:ckpt-step-{step}"


def find(db: Database, *, owner: Owner, name: str) -> NamedCheckpoint | None:
    """What a name stands for, or None where it is not the name of a checkpoint of a job of this owner."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] is None:
        return None
    step = int(match[2])
    with db.read() as session:
        for job in session.scalars(_makers(match[1], owner=owner)):
            if checkpoint_name(read_stored(job.spec), job_id=job.id, step=step) == name:
                kept = session.execute(
                    select(Checkpoint.path, Checkpoint.created_at).where(
                        Checkpoint.job_id == job.id, Checkpoint.step == step
                    )
                ).one_or_none()
                path, created_at = (None, None) if kept is None else kept
                return NamedCheckpoint(job.id, path, created_at)
    return None


def hold_maker(session: Session, *, organization_id: str, name: str) -> None:
    """Keep the job that made a model or a checkpoint from being deleted until the end of the transaction, in which
    another job comes to be that starts from it, whatever its project. Of another model there is nothing to keep.

    Raises:
        InvalidRequestError: it has just been deleted.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return
    query = _makers(match[1], owner=Owner(organization_id)).with_for_update(read=True, key_share=True)
    if session.scalars(query).first() is None:
        raise InvalidRequestError(
            f"The model {name!r} does not exist any more: its job was deleted.", code="model_not_found", param="model"
        )


def _makers(digits: str, *, owner: Owner) -> Select[Job]:
    """The jobs (one, but for a coincidence) whose ids begin with these digits."""
    # The primary key serves a prefix as a range; `~` is behind every digit.
    first = f"ftjob-{digits}"
    return select(Job).where(owner.owns(Job), Job.id >= first, Job.id <= f"{first}~")
