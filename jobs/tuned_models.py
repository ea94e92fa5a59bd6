"""Tuned models and checkpoints as folders: found by name, deleted, and packed for a download."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import delete, select

from jobs.db import Database
from jobs.errors import InvalidStateError, NotFoundError
from jobs.models import Job, TunedModel
from jobs.owner import Owner, user_name
from jobs.settings import JobsSettings
from jobs.status import TERMINAL

_MANIFEST_NAME = "MANIFEST.json"
# Of a checkpoint, what only the resumption of its run needs (lomo_core/checkpoint.py).
_OF_RUN = frozenset({"optimizer.safetensors", "trainer_state.json"})
_ARCHIVE_FOLDER = "model"
_CHUNK_BYTES = 1 << 20


def delete_model(db: Database, settings: JobsSettings, *, owner: Owner, model_id: str) -> None:
    """Remove a tuned model: its row, then its folder.

    Raises:
        NotFoundError: no such model of this owner.
        InvalidStateError: a job that has not ended starts from it.
    """
    with db.transaction() as session:
        owned = select(TunedModel).where(TunedModel.id == model_id, owner.owns(TunedModel))
        model = session.scalar(owned.with_for_update())
        if model is None:
            raise NotFoundError(f"No such tuned model: {model_id}", code="model_not_found", param="model")
        # Whoever queues a job that starts from this model holds the job that made it (`checkpoint_names.hold_maker`).
        session.get(Job, model.job_id, with_for_update=True)
        user = session.scalar(
            select(user_name(model)).where(
                Job.organization_id == model.organization_id,
                Job.status.not_in(TERMINAL),
                Job.spec["model"].astext == model_id,
            )
        )
        if user is not None:
            raise InvalidStateError(
                f"{model_id} is the base model of {user}, which has not ended: cancel the job first.", param="model"
            )
        folder = _checked_folder(settings.data_dir / model.path, runs_dir=settings.runs_dir)
        session.execute(delete(TunedModel).where(TunedModel.id == model_id))
    # Moved aside first, so that half of it is never taken for a model.
    trash = folder.with_name(f".tmp-old-{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _checked_folder(folder: Path, *, runs_dir: Path) -> Path:
    """The folder by its real path. It comes from our own row; but what is deleted for good is looked at twice."""
    root, parent = runs_dir.resolve(), folder.parent.resolve()
    is_below = parent.is_relative_to(root) and parent != root
    if not is_below or folder.name in ("", ".", "..") or folder.is_symlink():
        raise InvalidStateError(
            "The model's folder is not one of a run, so nothing was deleted: whoever runs the server must look at it.",
            param="model",
        )
    return parent / folder.name


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    file: BinaryIO
    num_bytes: int

    @property
    def header(self) -> bytes:
        info = tarfile.TarInfo(f"{_ARCHIVE_FOLDER}/{self.name}")
        info.size = self.num_bytes
        info.mode = 0o644
        # GNU's form has sizes above 8 GiB.
        return info.tobuf(tarfile.GNU_FORMAT)

    @property
    def padding(self) -> bytes:
        return bytes(-self.num_bytes % tarfile.BLOCKSIZE)


class ModelArchive:
    """A model folder as an uncompressed tar: of the files in its manifest, without what only a run's resumption needs.

    The files are opened at once, so that a deletion in between harms nothing, and each is read in chunks.

    Raises:
        NotFoundError: the folder is gone or not whole.
    """

    def __init__(self, folder: Path, *, name: str) -> None:
        self._members: list[_Member] = []
        try:
            for file_name, num_bytes in _listed(folder):
                self._members.append(_open(folder / file_name, num_bytes))
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.close()
            raise NotFoundError(
                f"The files of {name} are no longer whole on this server.", code="model_not_found", param="model"
            ) from error

    @property
    def num_bytes(self) -> int:
        """Length of the whole archive."""
        return sum(len(m.header) + m.num_bytes + len(m.padding) for m in self._members) + 2 * tarfile.BLOCKSIZE

    def chunks(self) -> Iterator[bytes]:
        """The archive, piece by piece; the files are closed at its end."""
        try:
            for member in self._members:
                yield member.header
                left = member.num_bytes
                while left > 0:
                    chunk = member.file.read(min(left, _CHUNK_BYTES))
                    if not chunk:
                        # The announced length can no longer be kept: the connection breaks, as it must.
                        raise EOFError(f"{member.name} has become shorter while it was read")
                    left -= len(chunk)
                    yield chunk
                yield member.padding
            yield bytes(2 * tarfile.BLOCKSIZE)
        finally:
            self.close()

    def close(self) -> None:
        """Close the files."""
        for member in self._members:
            member.file.close()


def _listed(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of a manifest's files that make a model."""
    manifest = json.loads((folder / _MANIFEST_NAME).read_text(encoding="utf-8"))
    found = []
    for entry in manifest["files"]:
        name, num_bytes = str(entry["name"]), int(entry["size"])
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"{name!r} is not a plain name")
        if name not in _OF_RUN:
            found.append((name, num_bytes))
    return found


def _open(path: Path, num_bytes: int) -> _Member:
    """Open a plain file of this size; a link is refused by the system (ELOOP)."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
    if os.fstat(file.fileno()).st_size != num_bytes:
        file.close()
        raise ValueError(f"{path.name} has another size than its manifest says")
    return _Member(path.name, file, num_bytes)
