"""Checkpoints by name. One is called after the model that its job makes and the step, `ft:...:ckpt-step-88`, so that it
needs no column: the name tells 8 digits of the job's id, and the job's row what the rest has to be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sqlalchemy import select

from jobs.db import Database
from jobs.ids import tuned_model_id
from jobs.models import Checkpoint, Job
from jobs.spec import ForeignSpec, JobSpec, read_stored

# At most 18 of the 19 digits of a bigint.
_NAME = re.compile(r"ft:.*:([0-9a-f]{8}):ckpt-step-([0-9]{1,18})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class NamedCheckpoint:
    """What a name stands for; `path`, relative to the data folder, is None where the checkpoint is no longer kept."""

    job_id: str
    path: str | None


def checkpoint_name(spec: JobSpec | ForeignSpec, *, job_id: str, step: int) -> str:
    """The API's name for a checkpoint, under which another job may start from it."""
    name = tuned_model_id(base_model=spec.model or "unknown", suffix=spec.suffix, job_id=job_id)
    return f"{name}:ckpt-step-{step}"


def find(db: Database, *, organization_id: str, name: str) -> NamedCheckpoint | None:
    """What a name stands for, or None where it is not the name of a checkpoint of a job of this organization."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    step = int(match[2])
    with db.read() as session:
        # The primary key serves a prefix as a range; `~` is behind every digit.
        first = f"ftjob-{match[1]}"
        jobs = session.scalars(
            select(Job).where(Job.organization_id == organization_id, Job.id >= first, Job.id <= f"{first}~")
        )
        for job in jobs:
            if checkpoint_name(read_stored(job.spec), job_id=job.id, step=step) == name:
                path = session.scalar(
                    select(Checkpoint.path).where(Checkpoint.job_id == job.id, Checkpoint.step == step)
                )
                return NamedCheckpoint(job.id, path)
    return None
