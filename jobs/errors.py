"""Errors of the domain. The texts are for people; `code` is stable; HTTP is known to `server/errors.py` alone.

JobsError
  NotFoundError            no such job, file, model or checkpoint (or another project's)
  InvalidRequestError      a value is wrong: `param` says which
  InvalidStateError        the job's status does not allow it
  ConflictError            what was asked contradicts what was asked before
  BusyError                too much of this is under way: the same request succeeds later
  QuotaError               the organization may not use more of something
  StorageError             the object store does not answer, or refuses: the same request may succeed later
  FileDamagedError         an object of the store is not what was put there
  LeaseLostError           the writer's lease is gone: it must kill its engine and write nothing more
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class JobsError(Exception):
    """Base of the domain's errors: `code` in snake case, `param` the request field at fault or None."""

    code = "jobs_error"
    details: Mapping[str, Any] | None = None
    """More that a program can use; goes into the API's error object."""

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class NotFoundError(JobsError):
    """No such object for this caller."""

    code = "not_found"


class InvalidRequestError(JobsError):
    """The request holds a value that cannot be used."""

    code = "invalid_value"


class InvalidStateError(JobsError):
    """The object's present state does not allow the change."""

    code = "invalid_state"


class ConflictError(JobsError):
    """The request contradicts an earlier one, and will each time it is sent."""

    code = "conflict"


class BusyError(JobsError):
    """Too many such requests are under way; nothing is wrong with this one."""

    code = "busy"


class QuotaError(JobsError):
    """The organization has used what it may."""

    code = "insufficient_quota"

    def __init__(self, message: str, *, quota: str, used: float, limit: int, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.details = {"quota": quota, "used": used, "limit": limit}


class StorageError(JobsError):
    """The object store that holds the files' bytes could not be used."""

    code = "storage_unavailable"


class FileDamagedError(JobsError):
    """Stored bytes are not those that were uploaded."""

    code = "file_damaged"


class LeaseLostError(JobsError):
    """A guarded write touched no row: the job was reaped, claimed by another worker or ended."""

    code = "lease_lost"

    def __init__(self, job_id: str, attempt: int) -> None:
        super().__init__(f"attempt {attempt} of {job_id} no longer holds the lease")
        self.job_id = job_id
        self.attempt = attempt
