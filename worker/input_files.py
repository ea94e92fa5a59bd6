"""The files of a job as its engine can read them: those of the data folder where they lie, those of an object store as
copies in a folder of the job's, fetched before the engine starts and removed with what else the job alone needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from jobs import loose_objects, reads, storage
from jobs.db import Database
from jobs.errors import FileDamagedError, InvalidRequestError, NotFoundError, StorageError
from jobs.models import File
from jobs.owner import Owner
from jobs.step_metrics import ResultFile

# Between tries. Each asks the store twice already, and takes a second to some where it does not answer.
_RETRY_AFTER_S = 2.0
_POLL_S = 0.1  # how late it is seen meanwhile that the job is not wanted any more

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFiles:
    """How a host comes by the files of one job."""

    data_dir: Path
    """Absolute."""
    folder: Path
    """For copies."""
    patience_s: float
    """How long a store may give no answer."""
    find_row: Callable[[str], File | None]
    """The file's row, by its id; waits for the database."""
    heed: Callable[[], None]
    """Called often while a file is fetched; what it raises ends that."""
    wait: Callable[[float], object]
    """Waits so many seconds, or less if the worker stops."""

    def find(self, file_id: str, *, param: str) -> Path:
        """Where the file's bytes are on this host, fetched if need be. `param` is the request's field.

        Raises:
            InvalidRequestError: they are nowhere, or not as they were uploaded.
            StorageError: the store has not answered for as long as that is borne.
        """
        path = self.data_dir / "files" / file_id
        if path.is_file():
            return path
        file = self.find_row(file_id)
        if file is None or not storage.is_object(file.path):
            raise InvalidRequestError(
                f"The file {file_id} is not in the worker's data folder. Server and workers must share it.",
                code="file_not_found",
                param=param,
            )
        copy = self.folder / file_id
        if not copy.is_file():
            try:
                self._fetch(file, copy)
            except NotFoundError as error:
                raise InvalidRequestError(error.message, code="file_not_found", param=param) from error
            except FileDamagedError as error:
                raise InvalidRequestError(error.message, code=error.code, param=param) from error
        return copy

    def _fetch(self, file: File, copy: Path) -> None:
        assert file.path is not None  # noqa: S101 - it names an object
        begin = time.monotonic()
        while True:
            try:
                storage.fetch(file.path, copy, num_bytes=file.num_bytes, sha256=file.sha256, heed=self.heed)
            except StorageError:
                if time.monotonic() - begin > self.patience_s:
                    raise
                self._pause()
            else:
                log.info("file_fetched", file_id=file.id, after_s=round(time.monotonic() - begin, 1))
                return

    def _pause(self) -> None:
        end = time.monotonic() + _RETRY_AFTER_S
        while time.monotonic() < end:
            self.heed()
            self.wait(_POLL_S)


def row_finder(db: Database, *, owner: Owner) -> Callable[[str], File | None]:
    """Finds rows of an owner's files, expired ones too: a job keeps what it was created with."""
    return lambda file_id: reads.find_stored_file(db, owner=owner, file_id=file_id)


def send_result(db: Database, result: ResultFile, *, local: Path, storage_url: str) -> ResultFile:
    """Bring a result file to the store, and remove it here. Returns it as it lies there.

    Raises:
        StorageError: the store does not take it; it is still here.
    """
    url = storage.object_url(storage_url, result.file_id)
    loose_objects.announce(db, url)
    storage.put(local, url)
    local.unlink()
    return replace(result, path=url)
