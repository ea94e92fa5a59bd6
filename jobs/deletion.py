"""The end of a job's traces: its rows and its folder.

Whatever a job has written, from checkpoints to its result file, lies in `runs/<job id>`, and this folder alone is
removed: no path that stands in a row is followed, nor a symbolic link. The rows go first, in one transaction; a folder
that cannot be removed then costs disk space, and nobody takes half of it for a model. Only a result file may lie in an
object store instead, and is then left to the workers' reaper (`loose_objects.py`).
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path

import structlog
from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from jobs.checkpoint_names import checkpoint_name
from jobs.db import Database
from jobs.errors import InvalidStateError
from jobs.ids import tuned_model_id
from jobs.loose_objects import drop
from jobs.models import Event, File, Job, Metric
from jobs.owner import Owner, user_name
from jobs.repository import lock_owned
from jobs.spec import read_stored
from jobs.status import TERMINAL, JobStatus

_JOB_ID = re.compile(r"ftjob-[0-9a-f]{24}")
# Some 0.3 s of the 5 s that a statement has (`jobs/db.py`).
_ROWS_AT_ONCE = 100_000

log = structlog.get_logger(__name__)


def delete_job(db: Database, *, owner: Owner, job_id: str, runs_dir: Path) -> int:
    """Remove a job that has ended, with its events, figures, checkpoints, models and result files. Returns the bytes
    that became free on the disk.

    Raises:
        NotFoundError: no such job of this owner.
        InvalidStateError: the job has not ended, or a job that has not ended starts from what it made.
    """
    with db.transaction() as session:
        job = lock_owned(session, owner=owner, job_id=job_id)
        if JobStatus(job.status) not in TERMINAL:
            raise InvalidStateError(f"Job {job_id} has not ended and cannot be deleted: cancel it first.")
        user = _find_user(session, job)
        if user is not None:
            raise InvalidStateError(
                f"Job {job_id} cannot be deleted: {user}, which has not ended, starts from its model."
            )
        for path in session.scalars(delete(File).where(File.job_id == job.id).returning(File.path)).all():
            drop(session, path)
        _delete_lines(session, job)
        session.execute(delete(Job).where(Job.id == job.id))
    return _remove_folder(runs_dir, job_id)


def _delete_lines(session: Session, job: Job) -> None:
    """Remove a job's events and figures, of which there may be millions, so that no statement runs out of time."""
    last_step = session.scalar(select(func.max(Metric.step)).where(Metric.job_id == job.id)) or 0
    for first in range(0, job.last_seq, _ROWS_AT_ONCE):
        last = first + _ROWS_AT_ONCE
        session.execute(delete(Event).where(Event.job_id == job.id, Event.seq > first, Event.seq <= last))
    for first in range(0, last_step + 1, _ROWS_AT_ONCE):
        last = first + _ROWS_AT_ONCE
        session.execute(delete(Metric).where(Metric.job_id == job.id, Metric.step >= first, Metric.step < last))


def _find_user(session: Session, job: Job) -> str | None:
    """What to call a job that has not ended and starts from this one's model, or from a checkpoint of it."""
    spec = read_stored(job.spec)
    name = tuned_model_id(base_model=spec.model or "unknown", suffix=spec.suffix, job_id=job.id)
    prefix = checkpoint_name(spec, job_id=job.id, step=0).removesuffix("0")
    base = Job.spec["model"].astext
    return session.scalar(
        select(user_name(job))
        .where(
            Job.organization_id == job.organization_id,
            Job.status.not_in(TERMINAL),
            or_(base == name, base.startswith(prefix, autoescape=True)),
        )
        .limit(1)
    )


def _remove_folder(runs_dir: Path, job_id: str) -> int:
    """Remove a job's folder and tell how much it held; a link in its place is removed, and not what it points to."""
    assert _JOB_ID.fullmatch(job_id), f"not a job's id: {job_id!r}"
    folder, num_bytes = runs_dir / job_id, 0
    try:
        if folder.is_symlink():
            folder.unlink()
            return 0
        num_bytes = _size_bytes(folder)
        shutil.rmtree(folder)
    except FileNotFoundError:
        return 0
    except OSError as error:
        log.warning("cannot_delete", path=str(folder), error=str(error))
        return max(0, num_bytes - _size_bytes(folder))
    return num_bytes


def _size_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, a file with several names in it counted once."""
    sizes: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(parent, name))  # noqa: PTH118 - of a hundred thousand names each is read once
            except FileNotFoundError:
                continue
            if stat.S_ISREG(found.st_mode):
                sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())
